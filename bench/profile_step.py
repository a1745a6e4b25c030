"""Train a benchmark model with AdamWLW for a profiler: steps without a measurement and steps with one, named ranges on.

    python bench/profile_step.py VGG16-BN                          # plain: to be run under nsys
    python bench/profile_step.py VGG16-BN --trace out/             # under torch's profiler
    python bench/profile_step.py VGG16-BN --trace out/ --draw docs/images/trace.png

The trace is Chrome's format: open it at ui.perfetto.dev. The table is printed and lies beside it.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from models import MODELS
from torch.profiler import ProfilerActivity, profile, record_function

from lwas_fast import AdamWLW, profiling

CUDA = torch.cuda.is_available()
EVERY = 3
RANGES = {"step": "0.85", "lwas::curvature": "C1", "lwas::rates": "C2", "lwas::update": "C0"}


def train(model: str, steps: int, hvp: str, warm: int) -> object:
    """Return a function that takes `steps` steps, after `warm` that were taken already."""
    torch.manual_seed(0)
    problem = MODELS[model]("cuda" if CUDA else "cpu", full=CUDA)
    opt = AdamWLW(problem.model.named_parameters(), update_every=EVERY, hvp=hvp)

    def run(count: int) -> None:
        for _ in range(count):
            with record_function("step"), torch.cuda.nvtx.range("step") if CUDA else nullcontext():
                opt.zero_grad()
                opt.backward(problem.loss if hvp == "finite_difference" else problem.loss())
                opt.step()
        if CUDA:
            torch.cuda.synchronize()

    run(warm)
    return lambda: run(steps)


def events_of(trace: Path) -> list[dict]:
    """The complete events of a Chrome trace whose names are among RANGES, in the order of their start."""
    events = json.loads(trace.read_text())["traceEvents"]
    found = [e for e in events if e.get("ph") == "X" and e["name"] in RANGES and e.get("cat") == "user_annotation"]
    return sorted(found, key=lambda e: e["ts"])


def draw(trace: Path, path: Path, title: str) -> None:
    """Draw the ranges of a trace over time."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    events = events_of(trace)
    start = events[0]["ts"]
    figure, axes = plt.subplots(figsize=(11, 2.3), layout="constrained")
    for name, colour in RANGES.items():
        spans = [((e["ts"] - start) / 1e3, e["dur"] / 1e3) for e in events if e["name"] == name]
        if name == "step":
            axes.broken_barh(spans, (0, 1), color=colour, edgecolor="white", lw=2, label="step: forward and backward")
        else:
            axes.broken_barh(spans, (0.15, 0.7), color=colour, label=name)
    axes.set(xlabel="ms", yticks=[], title=title, ylim=(-0.05, 1.5))
    axes.legend(ncols=4, fontsize=8, loc="upper center")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS, nargs="?", default="VGG16-BN")
    parser.add_argument("--steps", type=int, default=2 * EVERY)
    parser.add_argument("--hvp", choices=["autograd", "finite_difference"], default="autograd")
    parser.add_argument("--trace", type=Path, metavar="FOLDER")
    parser.add_argument("--draw", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    profiling.annotate()
    run = train(arguments.model, arguments.steps, arguments.hvp, warm=2 * EVERY)
    if arguments.trace is None:
        run()
        return
    arguments.trace.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    with profile(activities=activities) as found:
        run()
    trace = arguments.trace / "trace.json"
    found.export_chrome_trace(str(trace))
    averages = found.key_averages()
    by = "self_device_time_total" if CUDA else "self_cpu_time_total"
    table = averages.table(sort_by=by, row_limit=15, max_name_column_width=48)
    ranges = [
        f"{e.key:18} {e.count:4} times  {e.cpu_time_total / e.count / 1e3:9.3f} ms each"
        for e in averages
        if e.key in RANGES
    ]
    text = "\n".join([*ranges, "", table])
    (arguments.trace / "table.txt").write_text(text + "\n")
    print(text)
    print("trace:", trace)
    if arguments.draw:
        device = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
        draw(trace, arguments.draw, f"{arguments.model}, AdamWLW measuring every {EVERY} steps, {device}")


if __name__ == "__main__":
    main()
