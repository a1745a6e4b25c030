"""Train every task with every optimizer and seed, one line a run; what is there already is skipped.

python -m bench.quality.run --tasks cnn,mlp --optimizers adamwlw,adamw:lr=1e-3 --seeds 0-2
python -m bench.quality.run --optimizers adamw,sgd --sweep --seeds 0-2
python -m bench.quality.run --optimizers adamw:average=0.05 --sweep --schedules constant,warmup
python -m bench.quality.report

Lines, environments and curves: bench/quality/store.py.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.quality import store
from bench.quality.optimizers import OURS, RULES, SCHEDULES, SWEPT, Name, Trainer, parts, sweep
from bench.quality.problem import Problem, Task
from bench.quality.store import OUT, Curve, Run, points
from bench.quality.tasks import EVERY_TASK, TASKS
from lwas_fast.installed import describe

Asked = tuple[Task, Name, int]  # a seed's run


def start_memory(device: str) -> None:
    """Count peak memory from here, where the system can (Linux, CUDA)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is the process's, which the first run alone has to itself


def peak_memory(device: str) -> int:
    """MiB: the process's peak with torch and the data in it; on CUDA what tensors took."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2**20)
    unit = 1 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def environment() -> dict[str, str]:
    """What is installed, on what device, with how many cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {**dict(describe()), "cores": str(cores)}


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it, results aside; empty outside of git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=OUT.parents[2], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""


def warm_up(name: Name, problem: Problem) -> None:
    """Take two steps on a copy: torch sets much up on first use, which is no part of training."""
    trainer = Trainer(name, replace(problem, model=copy.deepcopy(problem.model)), 2, 0.0)
    for _ in range(2):
        trainer.step().item()


def best_check(losses: list[float]) -> int:
    """Where a loss was lowest; what is not a number is never."""
    return min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)


def train(asked: Asked, steps: int, full: bool, device: str, progress: Any = None) -> Run:
    """Train once.

    Args:
        asked: Task, optimizer, seed.
        steps: How many.
        full: Whether in the GPU size.
        device: Where.
        progress: Called with the number of steps taken.

    Returns:
        The run, without commit and environment. It ends at the first loss that is not finite.
    """
    task, name, seed = asked
    problem = task.build(seed, full, device)
    model = problem.model
    warm_up(name, problem)
    trainer = Trainer(name, problem, steps, task.weight_decay)
    start_memory(device)
    seconds, taken, finite = 0.0, 0, True
    losses: list[float] = []
    curve = Curve([], [], {}, {})
    drawn = set(points(steps))
    checks = set(points(steps, task.checks))

    def evaluate(test: bool = True) -> None:
        with trainer.evaluating():
            for metric, value in problem.evaluate(model, test).items():
                curve.checks.setdefault(metric, []).append(value)

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
        if taken in drawn:
            curve.seconds.append(seconds)
            curve.loss.append(sum(losses) / len(losses))
            losses.clear()
            for layer, rate in trainer.rates().items():
                curve.rates.setdefault(layer, []).append(rate)
        if taken in checks:
            evaluate(test=task.best or taken == steps)
        if progress is not None:
            progress(taken)
    if not finite:
        evaluate()
    start, last = curve.checks["train"][0], curve.checks["train"][-1]
    judged = best_check(curve.checks["test"]) if task.best else -1
    return Run(
        task=task.name,
        name=name,
        seed=seed,
        steps=steps,
        taken=taken,
        full=full,
        parameters=sum(p.numel() for p in model.parameters()),
        weight_decay=dict(name.options).get("weight_decay", task.weight_decay),
        start=start,
        train=curve.checks["train"][judged],
        test=curve.checks["test"][judged],
        accuracy=curve.checks["accuracy"][judged] if "accuracy" in curve.checks else None,
        collapsed=not (finite and math.isfinite(last) and last <= start),
        seconds=seconds,
        peak_mib=peak_memory(device),
        commit="",
        environment=0,
        curve=curve,
    )


def missing(out: Path, asked: list[Asked], lengths: dict[str, int], full: bool) -> list[Asked]:
    """What is not there yet.

    Raises:
        ValueError: A run is there, but of another length or size.
    """
    held = {run.key: run for task in lengths for run in store.read(out / f"{task}.csv")}
    for task, name, seed in asked:
        run = held.get((task.name, str(name), seed))
        if run is not None and (run.steps, run.full) != (lengths[task.name], full):
            raise ValueError(
                f"{out / task.name}.csv has {name}, seed {seed}, with {run.steps} steps (full: {run.full}): "
                "choose another --out"
            )
    return [(task, name, seed) for task, name, seed in asked if (task.name, str(name), seed) not in held]


def seeds(text: str) -> list[int]:
    """Read `0`, or `0-4`."""
    low, _, high = text.partition("-")
    if not (found := list(range(int(low), int(high or low) + 1))):
        raise argparse.ArgumentTypeError(f"{text} are no seeds: give the lower first")
    return found


def joined(given: Sequence[str]) -> list[str]:
    """Take names apart that came by commas or spaces, each with its options."""
    texts: list[str] = []
    for part in parts(",".join(given)):
        if "=" in part and ":" not in part and texts:
            texts[-1] += f",{part}"  # a further option of the name before
        else:
            texts.append(part)
    return texts


def refuse_missing(parser: argparse.ArgumentParser, names: Sequence[Name]) -> None:
    """End with the command that installs what an optimizer needs and does not find."""
    for name in names:
        rule = RULES[name.base]
        if rule.module and importlib.util.find_spec(rule.module) is None:
            parser.error(f"{name} needs {rule.module}: pip install {rule.package}")


def step_count(text: str) -> int:
    """Read a number of steps."""
    if (steps := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return steps


def add_how(parser: argparse.ArgumentParser, out: Path) -> None:
    """Add what `run_missing` wants to know, and from which seeds."""
    parser.add_argument("--seeds", type=seeds, default=[0], help="0, or 0-4")
    parser.add_argument("--steps", type=step_count, help="instead of the task's")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="the GPU's sizes")
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; what could fail only after minutes of training is refused here."""

    def schedules(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(SCHEDULES):
            raise argparse.ArgumentTypeError(
                f"unknown {', '.join(sorted(unknown))}: choose from {', '.join(SCHEDULES)}"
            )
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"default: all ({','.join(TASKS)})")
    parser.add_argument(
        "--optimizers", nargs="+", default=list(OURS), metavar="NAME",
        help="names, by commas or spaces: adamwlw,adamw:lr=1e-3,schedule=cosine (an option goes on after a comma)",
    )  # fmt: skip
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"all rates and schedules, of {', '.join(SWEPT)}; further options (average=0.05) are kept",
    )
    parser.add_argument(
        "--schedules", type=schedules, default=(), metavar="NAMES",
        help=f"of the sweep, of {','.join(SCHEDULES)}; default: each optimizer's own",
    )  # fmt: skip
    add_how(parser, OUT)
    args = parser.parse_args(argv)
    try:
        names = [Name.parse(text) for text in joined(args.optimizers)]
        args.tasks = [EVERY_TASK[name] for name in args.tasks.split(",")]
    except (ValueError, KeyError) as error:
        parser.error(
            str(error) if isinstance(error, ValueError) else f"unknown task {error}: one of {', '.join(TASKS)}"
        )
    args.optimizers = [
        n for name in names for n in (sweep(name, args.schedules) if args.sweep and name.base in SWEPT else [name])
    ]
    refuse_missing(parser, args.optimizers)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    args = parse(argv)
    every = [(task, name, seed) for seed in args.seeds for task in args.tasks for name in args.optimizers]
    lengths = {task.name: args.steps or (task.full_steps if args.full else task.steps) for task in args.tasks}
    run_missing(every, lengths, args)


def run_missing(every: list[Asked], lengths: dict[str, int], args: argparse.Namespace) -> None:
    """Run what is not in `args.out` yet, and write it there; `args.full` and `args.device` say how.

    Raises:
        SystemExit: A run is there with another length, or one failed.
    """
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")  # Trainer breaks the cycle
    try:
        runs = missing(args.out, every, lengths, args.full)
    except ValueError as error:
        sys.exit(f"error: {error}")
    made_by, made_in = commit(), environment()
    failures = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for asked in progress.track(runs, description="runs"):
            task, name, seed = asked
            if (task.name, str(name), seed) in {run.key for run in store.read(args.out / f"{task.name}.csv")}:
                continue  # by now: somebody else is at work here as well
            label, steps = f"{task.name}, {name}, seed {seed}", lengths[task.name]
            bar = progress.add_task(label, total=steps)
            try:
                run = train(asked, steps, args.full, args.device, lambda k, bar=bar: progress.update(bar, completed=k))
            except (FileNotFoundError, ModuleNotFoundError, ValueError, TypeError) as error:  # others may be well
                failures.append(f"{label}: {error}")
                progress.console.print(f"FAILED {failures[-1]}")
                continue
            finally:
                progress.remove_task(bar)
            run.commit = made_by
            store.add(args.out, run, made_in)
            told = f"train {run.train:.4g}, test {run.test:.4g}"
            told += "" if run.accuracy is None else f", accuracy {run.accuracy:.4g}"
            note = " COLLAPSED" if run.collapsed else ""
            progress.console.print(f"{label}: {told}, {run.seconds:.1f} s{note}")
    if failures:
        sys.exit(f"error: {len(failures)} of {len(runs)} runs failed; the first was {failures[0]}")


if __name__ == "__main__":
    main()
