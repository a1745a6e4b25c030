"""Run each trainer's script with AdamWLW and with torch's AdamW at three rates; print the table of docs/trainers.md.

    python -m examples.trainers [NAMES...] [--write]

AdamW takes the place of AdamWLW in the script's own text, in one line. How many measurements were due and taken is
counted by hooks on the optimizer's step, on rank 0 of a script that runs in several processes. Exits with 1 where one
that was due was not taken.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "trainers.md"
RATES = ("3e-4", "1e-3", "3e-3")
SCRIPTS = {
    "plain": "your own loop",
    "hf_trainer": "HF Trainer: accumulation, clipping, best checkpoint",
    "accelerate_loop": "Accelerate: accumulation, clipping",
    "accelerate_ddp": "Accelerate, two processes: DDP, accumulation, clipping",
    "lightning_trainer": "Lightning, automatic: accumulation, clipping, best checkpoint",
    "lightning_ddp": "Lightning, two processes: DDP, accumulation, clipping, best checkpoint",
    "lightning_fsdp": "Lightning, two processes: FSDP2, accumulation, clipping, best checkpoint",
    "lightning_manual": "Lightning, manual: bf16, clipping",
    "fabric_loop": "Fabric: bf16, clipping",
    "timm_loop": "timm: ViT, bf16, loss scaler, clipping",
    "geometric": "PyTorch Geometric: GAT",
    "peft_lora": "peft: LoRA on BERT",
    "finetune": "fine-tuning a small CNN on 200 images",
}
PROCESSES = {"accelerate_ddp": 2, "lightning_ddp": 2, "lightning_fsdp": 2}  # others: one
HEAD = (
    "| trainer and script | lines that differ | measured | loss | torch's AdamW (best of three rates) |",
    "| --- | --- | --- | --- | --- |",
)
OURS = re.compile(r"\bAdamWLW\((\w+)\)")


def with_adamw(text: str, rate: str) -> str:
    """A script with torch's AdamW in the place of ours."""
    return OURS.sub(rf"torch.optim.AdamW(\1.parameters(), lr={rate})", text)


def run_here(name: str, rate: str | None) -> None:
    """Run a script in this process and print what it did, as JSON."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from examples.trainers.torchvision import declare_torchvision
    from lwas_fast.optimizer import LayerwiseOptimizer

    declare_torchvision()
    due: list[bool] = []
    taken: list[bool] = []
    together: set[int] = set()

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        together.add(torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
        if isinstance(optimizer, LayerwiseOptimizer):
            due.append(optimizer.curvature_due)

    def after(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if isinstance(optimizer, LayerwiseOptimizer):
            taken.append(any(group["last_refresh"] == group["steps"] - 1 for group in optimizer.param_groups))

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
    text = (HERE / f"{name}.py").read_text()
    text = text if rate is None else with_adamw(text, rate)
    shown, names = io.StringIO(), {"__name__": "__main__"}
    with contextlib.redirect_stdout(shown):
        exec(compile(text, f"{name}.py", "exec"), names)
    if together != {PROCESSES.get(name, 1)}:  # each by itself would give fine losses, too
        raise SystemExit(f"{name} took steps in groups of {together} processes")
    if int(os.environ.get("RANK", 0)) == 0:
        loss = re.findall(r"^loss ([\d.]+)", shown.getvalue(), re.MULTILINE)[-1]
        print(json.dumps({"loss": float(loss), "due": sum(due), "taken": sum(taken)}), flush=True)
    if name in PROCESSES:
        # At once, with `names` alive: to free DDP's reducer is to end gloo's group, and that may wait for ever, with
        # Python's lock, for a thread of gloo's that waits for Python's lock. With torch's AdamW, too.
        os._exit(0)


def run(name: str, rate: str | None = None) -> dict[str, float]:
    """Run a script in a process of its own, or in as many as it takes."""
    command = [sys.executable, "-m", "examples.trainers", "--here", name, *([] if rate is None else [rate])]
    if name in PROCESSES:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES[name])]
        command[2:2] = [*launcher, "-m"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(name: str) -> tuple[str, bool]:
    """A script's row of the table, and whether all measurements due were taken."""
    text = (HERE / f"{name}.py").read_text()
    pairs = zip(text.splitlines(), with_adamw(text, "0").splitlines(), strict=True)
    lines = sum(one != other for one, other in pairs)
    ours, theirs = run(name), {rate: run(name, rate)["loss"] for rate in RATES}
    best = min(theirs, key=theirs.__getitem__)
    losses = f"{ours['loss']:.4f}", f"{theirs[best]:.4f}"
    mine = losses[0] if ours["loss"] <= theirs[best] else f"**{losses[0]}**"
    cells = (
        f"{SCRIPTS[name]} (`{name}.py`)",
        str(lines),
        f"{ours['taken']} of {ours['due']}",
        mine,
        f"{losses[1]} ({best})",
    )
    return f"| {' | '.join(cells)} |", ours["taken"] == ours["due"] > 0


def write(rows: dict[str, str]) -> None:
    """Put rows into the table of docs/trainers.md; those of other scripts stay as they are."""
    start, end = "<!-- trainers -->", "<!-- end of trainers -->"
    before, rest = PAGE.read_text().split(start)
    table, after = rest.split(end)
    known = {found[1]: line for line in table.splitlines() if (found := re.search(r"\(`(\w+)\.py`\)", line))} | rows
    lines = [*HEAD, *(known[name] for name in SCRIPTS if name in known)]
    PAGE.write_text(before + start + "\n\n" + "\n".join(lines) + "\n\n" + end + after)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(SCRIPTS))
    parser.add_argument("--write", action="store_true", help="put the table into docs/trainers.md")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        return run_here(args.names[0], *args.names[1:] or [None])
    rows, good = {}, True
    print("\n".join(HEAD))
    for name in args.names or SCRIPTS:
        rows[name], all_taken = row(name)
        print(rows[name], flush=True)
        good = good and all_taken
    if args.write:
        write(rows)
    sys.exit(not good)


if __name__ == "__main__":
    main()
