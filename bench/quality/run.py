"""Train every task with every optimizer and seed, one JSON a run; what is there already is skipped.

python -m bench.quality.run --tasks cnn,mlp --optimizers adamwlw,adamw:lr=1e-3 --seeds 0-2
python -m bench.quality.run --optimizers adamw,sgd --sweep --seeds 0-2
python -m bench.quality.report
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.quality.optimizers import OURS, RULES, SWEPT, Name, Trainer, parts, sweep
from bench.quality.problem import Problem, Task
from bench.quality.tasks import EVERY_TASK, TASKS
from lwas_fast.backends import describe

OUT = Path(__file__).parents[1] / "results" / "quality"
POINTS, CHECKS = 50, 6  # of a run's curve; evaluations after the one at the start, the last at the end
Run = tuple[Task, Name, int]


def start_memory(device: str) -> None:
    """Count peak memory from here, where the system can (Linux, CUDA)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is the process's, which the first run alone has to itself


def peak_memory(device: str) -> dict[str, int]:
    """Bytes: the process's peak with torch and the data in it, and on CUDA what tensors took."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.startswith("cuda"):
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return found


def warm_up(name: Name, problem: Problem) -> None:
    """Take two steps on a copy: torch sets much up on first use, which is no part of training."""
    trainer = Trainer(name, replace(problem, model=copy.deepcopy(problem.model)), 2, 0.0)
    for _ in range(2):
        trainer.step().item()


def train(run: Run, steps: int, full: bool, device: str, progress: Any = None) -> dict[str, Any]:
    """Train once.

    Args:
        run: Task, optimizer, seed.
        steps: How many.
        full: Whether in the GPU size.
        device: Where.
        progress: Called with the number of steps taken.

    Returns:
        What goes into the JSON. A run ends at the first loss that is not finite.
    """
    task, name, seed = run
    problem = task.build(seed, full, device)
    model = problem.model
    warm_up(name, problem)
    trainer = Trainer(name, problem, steps, task.weight_decay)
    start_memory(device)
    seconds, taken, finite = 0.0, 0, True
    losses: list[float] = []
    curve: dict[str, list[float]] = {"step": [], "seconds": [], "loss": []}
    rates: dict[str, list[float]] = {}
    evaluations: list[dict[str, float]] = []
    points = {round(steps * (i + 1) / POINTS) for i in range(POINTS)}
    checks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)}

    def evaluate() -> None:
        with trainer.evaluating():
            evaluations.append({"step": taken, "seconds": seconds, **problem.evaluate(model)})

    evaluate()
    for step in range(steps):
        begin = time.perf_counter()
        try:
            value = trainer.step().item()  # waits for the device
        except torch.linalg.LinAlgError:  # Shampoo, of a statistic that is not finite
            value = math.nan
        seconds += time.perf_counter() - begin
        taken, finite = step + 1, math.isfinite(value)
        losses.append(value)
        if not finite:
            break
        if taken in points:
            for key, number in (("step", taken), ("seconds", seconds), ("loss", sum(losses) / len(losses))):
                curve[key].append(number)
            losses.clear()
            for layer, rate in trainer.rates().items():
                rates.setdefault(layer, []).append(rate)
        if taken in checks:
            evaluate()
        if progress is not None:
            progress(taken)
    if not finite:
        evaluate()
    first, last = evaluations[0]["train"], evaluations[-1]["train"]
    return {
        "task": task.name,
        "about": task.about,
        "optimizer": str(name),
        "base": name.base,
        "options": dict(name.options),
        "weight_decay": dict(name.options).get("weight_decay", task.weight_decay),
        "seed": seed,
        "steps": steps,
        "full": full,
        "steps_taken": taken,
        "parameters": sum(p.numel() for p in model.parameters()),
        "environment": dict(describe()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "seconds": seconds,
        "curve": curve,
        **({"rates": rates} if rates else {}),
        "evaluations": evaluations,
        **peak_memory(device),
        "collapsed": not (finite and math.isfinite(last) and last <= first),
    }


def finite_only(value: Any) -> Any:
    """The same with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite_only(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_only(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all: a run cut short leaves no file that would be taken for a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(finite_only(content), indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def path_of(out: Path, run: Run) -> Path:
    """Where a run's JSON lies."""
    task, name, seed = run
    return out / task.name / f"{name.file}-seed{seed}.json"


def is_done(out: Path, run: Run, steps: int, full: bool) -> bool:
    """Whether a run's JSON is there.

    Raises:
        ValueError: It is there, but of another length or size.
    """
    path = path_of(out, run)
    if not path.is_file():
        return False
    held = json.loads(path.read_text())
    if (held["steps"], held["full"]) != (steps, full):
        raise ValueError(f"{path} is a run of {held['steps']} steps (full: {held['full']}): choose another --out")
    return True


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; what could fail only after minutes of training is refused here."""

    def seeds(text: str) -> list[int]:
        low, _, high = text.partition("-")
        if not (found := list(range(int(low), int(high or low) + 1))):
            raise argparse.ArgumentTypeError(f"{text} are no seeds: give the lower first")
        return found

    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"default: all ({','.join(TASKS)})")
    parser.add_argument(
        "--optimizers", nargs="+", default=list(OURS), metavar="NAME",
        help="names, by commas or spaces: adamwlw,adamw:lr=1e-3,schedule=cosine (an option goes on after a comma)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=seeds, default=[0], help="0, or 0-4")
    parser.add_argument("--sweep", action="store_true", help=f"all rates and schedules, of {', '.join(SWEPT)}")
    parser.add_argument("--steps", type=int, help="instead of the task's")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="the GPU's sizes")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER")
    args = parser.parse_args(argv)
    texts: list[str] = []
    for part in parts(",".join(args.optimizers)):
        if "=" in part and ":" not in part and texts:
            texts[-1] += f",{part}"  # a further option of the name before
        else:
            texts.append(part)
    try:
        names = [Name.parse(text) for text in texts]
        args.tasks = [EVERY_TASK[name] for name in args.tasks.split(",")]
    except (ValueError, KeyError) as error:
        parser.error(
            str(error) if isinstance(error, ValueError) else f"unknown task {error}: one of {', '.join(TASKS)}"
        )
    args.optimizers = [n for name in names for n in (sweep(name.base) if args.sweep and name.base in SWEPT else [name])]
    for name in args.optimizers:
        rule = RULES[name.base]
        if rule.module and importlib.util.find_spec(rule.module) is None:
            parser.error(f"{name} needs {rule.module}: pip install {rule.package}")
    if args.steps is not None and args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")  # Trainer breaks the cycle
    runs = [(task, name, seed) for seed in args.seeds for task in args.tasks for name in args.optimizers]
    lengths = {task.name: args.steps or (task.full_steps if args.full else task.steps) for task in args.tasks}
    try:
        runs = [run for run in runs if not is_done(args.out, run, lengths[run[0].name], args.full)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    failures = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for run in progress.track(runs, description="runs"):
            if path_of(args.out, run).is_file():  # by now: somebody else is at work here as well
                continue
            task, name, seed = run
            label, steps = f"{task.name}, {name}, seed {seed}", lengths[task.name]
            bar = progress.add_task(label, total=steps)
            try:
                found = train(run, steps, args.full, args.device, lambda k, bar=bar: progress.update(bar, completed=k))
            except (FileNotFoundError, ModuleNotFoundError, ValueError, TypeError) as error:  # others may be well
                failures.append(f"{label}: {error}")
                progress.console.print(f"FAILED {failures[-1]}")
                continue
            finally:
                progress.remove_task(bar)
            write(path_of(args.out, run), found)
            end = found["evaluations"][-1]
            told = ", ".join(f"{key} {end[key]:.4g}" for key in ("train", "test", "accuracy") if key in end)
            note = " COLLAPSED" if found["collapsed"] else ""
            progress.console.print(f"{label}: {told}, {found['seconds']:.1f} s{note}")
    if failures:
        sys.exit(f"error: {len(failures)} of {len(runs)} runs failed; the first was {failures[0]}")


if __name__ == "__main__":
    main()
