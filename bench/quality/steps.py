"""Steps to the same training loss: those that the best of a rival's sweeps took over those that ours took.

A run's curve is its training loss on the fixed evaluation set at the weights that are judged, at its checks, in
between on a line of its logarithm, and the least so far: what is asked is when a loss was first reached. The target is
the rival's final loss. Where ours reaches it, at step s of N, the ratio is N / s. Where ours does not, it is the step
at which the rival first reached the final loss of ours, over N, and below 1. Nothing before the first check is
resolved: with twelve checks a ratio lies between 1/12 and 12.

A run of ours that collapsed has never got there: its ratio is the least there is, and the table says so. A seed on
which the rival collapsed is left out, and the table says so. Over the seeds that both have it is the geometric mean,
and ± the standard error of the logarithm, times the mean. By wall-clock it is the same ratio times the rival's seconds
a step over those of ours, undisturbed (`results.undisturb`).

That the rival has N steps also where it had its final loss before favours ours a little.

The rival is the best of all rates and schedules of its kind: the one of lowest mean final training loss on the seeds
that all have, chosen for each task on the runs that are shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from bench.quality.results import Found, Rows, Runs, mean, mean_loss, paired, rows_of, standard_error
from bench.quality.store import Run, checked
from bench.quality.tables import NAMES, decimals, markdown

Kinds = Mapping[str, tuple[str, ...]]  # of rivals: the optimizers that count as one
_OF_ALL: Kinds = {"AdamW": ("adamw",), "Schedule-Free": ("sf_adamw", "sf_plus"), "Muon": ("muon",)}
RIVALS: dict[str, Kinds] = {
    "muonlw": _OF_ALL,
    "adamwlw": _OF_ALL,
    "sgdlw": {"SGD-m": ("sgd",)},
}
LEAST = 1e-30  # a loss of 0 has no logarithm


def path(run: Run) -> list[tuple[int, float]]:
    """The steps of a run's checks, each with the least loss so far."""
    between = run.curve.checks["train"][1:-1]
    losses = [v if v is not None and math.isfinite(v) else math.inf for v in (run.start, *between, run.train)]
    return list(zip(checked(run), accumulate((max(loss, LEAST) for loss in losses), min), strict=True))


def reached(run: Run, loss: float) -> float:
    """The step at which a loss was first reached, no sooner than the first check; infinite where it was not."""
    way, loss = path(run), max(loss, LEAST)
    first = way[1][0]
    for (before, high), (step, low) in pairwise(way):
        if high <= loss:
            return first
        if low <= loss:
            return max(first, before + (step - before) * math.log(high / loss) / math.log(high / low))
    return math.inf


def ratio(ours: Run, theirs: Run) -> float:
    """Steps of theirs over ours to the same loss; NaN where theirs collapsed, the least where ours did."""
    if ours.collapsed:
        return path(theirs)[1][0] / theirs.steps
    if theirs.collapsed:
        return math.nan
    step = reached(ours, theirs.train)
    return theirs.steps / step if math.isfinite(step) else reached(theirs, ours.train) / ours.steps


@dataclass(frozen=True)
class Gain:
    """How many times as fast ours was on a task.

    Attributes:
        steps: The ratio, the geometric mean over seeds.
        error: Its standard error.
        time: The same by wall-clock.
        seeds: How many count.
        left_out: Seeds on which the rival collapsed.
        collapsed: Runs of ours that did.
    """

    steps: float
    error: float
    time: float
    seeds: int
    left_out: int = 0
    collapsed: int = 0


def gain(ours: Runs, theirs: Runs) -> Gain | None:
    """The ratio over the seeds that both have; None where no pair is left that has curves."""
    pairs = [
        (a, b) for a, b in paired(ours, theirs) if all(run.curve and run.curve.checks.get("train") for run in (a, b))
    ]
    counted = [(a, b, math.log(value)) for a, b in pairs if not math.isnan(value := ratio(a, b))]
    if not counted:
        return None
    logs = [value for _, _, value in counted]
    paces = [math.log(b.seconds / b.taken / (a.seconds / a.taken)) for a, b, _ in counted]
    steps = math.exp(statistics.fmean(logs))
    return Gain(
        steps=steps,
        error=steps * standard_error(logs),
        time=steps * math.exp(statistics.fmean(paces)),
        seeds=len(counted),
        left_out=len(pairs) - len(counted),
        collapsed=sum(a.collapsed for a, _, _ in counted),
    )


def of_kind(bases: Iterable[str], rows: Rows, task: str) -> list[Runs]:
    """The best rate of each schedule, and the default, of these optimizers; no variants."""
    return [rows[row][task] for row in rows if row.partition(", best ")[0] in bases and task in rows[row]]


def best_of(bases: Iterable[str], rows: Rows, task: str, ours: Runs) -> Runs | None:
    """The best of all schedules, on the seeds that ours and all of them have; None where there are none.

    Where all have a collapse on a seed of ours, one of those with the fewest.
    """
    seeds = {run.seed for run in ours}
    candidates = [runs for runs in of_kind(bases, rows, task) if seeds & {run.seed for run in runs}]
    common = seeds.intersection(*({run.seed for run in runs} for runs in candidates)) or seeds

    def order(runs: Runs) -> tuple[int, float]:
        collapsed = sum(run.collapsed for run in runs if run.seed in seeds)
        return collapsed, mean_loss([run for run in runs if run.seed in common])

    return min(candidates, key=order, default=None)


def chosen(runs: Runs, bases: tuple[str, ...]) -> str:
    """The schedule and rate, with the optimizer's name where its kind has several."""
    name = runs[0].name
    options = dict(name.options)
    schedule = str(options.get("schedule", "constant")).replace("_", " + ")
    text = f"{schedule}, {options['lr']:g}" if "lr" in options else "default"
    return text if name.base == bases[0] else f"{NAMES.get(name.base, name.base)}, {text}"


def bold(loses: bool, text: str) -> str:
    """Where ours is worse."""
    return f"**{text}**" if loses else text


def told(found: Gain) -> str:
    """The ratio in steps as a cell."""
    text = f"{found.steps:.2f}" + (f" ± {found.error:.2f}" if found.seeds > 1 else "")
    text = bold(found.steps < 1, text)
    text += f" ({found.collapsed}/{found.seeds} collapsed)" if found.collapsed else ""
    return text + (f" ({found.seeds} of {found.seeds + found.left_out} seeds)" if found.left_out else "")


def on_test(ours: Runs, candidates: list[Runs]) -> str:
    """The test metric of ours, and the best of the rival's schedules, each at its rate of least training loss."""
    metric, best = ("test", min) if ours[0].accuracy is None else ("accuracy", max)
    mine, theirs = mean(ours, metric), best(mean(runs, metric) for runs in candidates)
    places = 1 if metric == "accuracy" else decimals(mine)
    text = f"{mine:.{places}f} / {theirs:.{places}f}" + " %" * (metric == "accuracy")
    return bold(best(mine, theirs) != mine, text)


def summary(gains: Mapping[str, Gain]) -> list[str]:
    """The geometric means over tasks, of steps and of time, with the number of tasks and the worst one's name."""
    if not gains:
        return ["", ""]
    steps, time = (statistics.geometric_mean(getattr(g, of) for g in gains.values()) for of in ("steps", "time"))
    worst = min(gains, key=lambda about: gains[about].steps)
    of = f"{len(gains)} tasks; worst: {worst}" if len(gains) > 1 else "1 task"
    return [f"{bold(steps < 1, f'{steps:.2f}')} ({of})", bold(time < 1, f"{time:.2f}")]


def table(ours: str, rows: Rows, tasks: Mapping[str, str], kinds: Kinds | None = None) -> list[str]:
    """Steps of the best of each kind over those of ours, by task; the worst first, and below the geometric mean.

    Args:
        ours: Which of ours.
        rows: All.
        tasks: What to call each.
        kinds: Of rivals. The first is told in full, of the others only ratios; what has no runs is left out.
    """
    kinds = RIVALS[ours] if kinds is None else kinds
    present = {about: rows[ours][task] for task, about in tasks.items() if task in rows.get(ours, {})}
    task_of = {about: task for task, about in tasks.items()}
    gains: dict[str, dict[str, Gain]] = {kind: {} for kind in kinds}
    cells: dict[str, dict[str, list[str]]] = {kind: {} for kind in kinds}
    for kind, bases in kinds.items():
        for about, mine in present.items():
            theirs = best_of(bases, rows, task_of[about], mine)
            if theirs is not None and (found := gain(mine, theirs)) is not None:
                test = on_test(mine, of_kind(bases, rows, task_of[about]))
                time = bold(found.time < 1, f"{found.time:.2f}")
                gains[kind][about] = found
                cells[kind][about] = [chosen(theirs, bases), told(found), time, test]
    shown = [kind for kind in kinds if gains[kind]]
    if not shown:
        return []
    full, *others = shown
    heads = ["task", f"best {full}", f"steps, {full} / ours", "by time", f"test: ours / {full}"]
    for kind in others:
        heads += [f"steps, {kind} / ours", "by time"]
    lines = []
    for about in sorted(gains[full], key=lambda about: gains[full][about].steps):
        further = (cell for kind in others for cell in cells[kind].get(about, ["", "", "", ""])[1:3])
        lines.append([about, *cells[full][about], *further])
    last = ["geometric mean", "", *summary(gains[full]), ""]
    return markdown(heads, [*lines, [*last, *(cell for kind in others for cell in summary(gains[kind]))]])


def text_of(found: Found) -> str:
    """The tables of a folder's tasks, each under its title."""
    rows, names = rows_of(found), {task: task for task in found}
    made = {NAMES[ours]: table(ours, rows, names) for ours in RIVALS}
    title = "Steps to the same training loss: of the best of a kind over those of"
    return "".join("\n".join(["", f"## {title} {name}", "", *lines, ""]) for name, lines in made.items() if lines)
