"""The training-quality suite's results in Markdown: finals, ours against each, equal wall-clock, variants of ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

from bench.quality.optimizers import OURS
from bench.quality.results import (
    Rows,
    Runs,
    final,
    final_loss,
    is_variant,
    loss_after,
    mean,
    paired,
    rows_of,
    standard_error,
)

METRICS = {
    "train": "Final training loss, on a fixed subset in eval mode (lower is better)",
    "test": "Final test loss (lower is better)",
    "accuracy": "Final test accuracy, % (higher is better)",
    "seconds": "Seconds of training, at the fastest run's pace",
}
Found = dict[str, dict[str, Runs]]


def decimals(value: float) -> int:
    """How many show four significant digits, of values below 1000."""
    return 4 if not value else max(0, 3 - math.floor(math.log10(abs(value))))


def change(ours: Runs, theirs: Runs, loss: Callable[[dict], float] = final_loss) -> tuple[float, str]:
    """By how much the loss of `ours` is above (+) or below (-) that of `theirs`, on the seeds of both.

    Returns:
        The share, infinite where nothing is left to compare; and in %, ± its standard error over seeds. Seeds where a
        run ended in NaN are left out, and it says so.
    """
    pairs = [(loss(a), loss(b)) for a, b in paired(ours, theirs)]
    finite = [(a, b) for a, b in pairs if math.isfinite(a + b)]
    if not finite:
        return math.inf, "collapsed" if pairs else ""
    base = statistics.fmean(b for _, b in finite)
    differences = [(a - b) / base for a, b in finite]
    share, error = statistics.fmean(differences), standard_error(differences)
    text = f"{share:+.1%}"[:-1] + (f" ± {error:.1%}"[:-1] if len(finite) > 1 else "")
    return share, text + (f" ({len(finite)}/{len(pairs)})" if len(finite) < len(pairs) else "")


def cell(runs: Runs, metric: str) -> str:
    """Mean, standard error over seeds, the swept rate, and how many runs collapsed.

    A run that ended in NaN has no final loss and is not in the mean; the cell says that it collapsed.
    """
    values = [value for run in runs if math.isfinite(value := final(run, metric))]
    collapsed = sum(run["collapsed"] for run in runs)
    if not values:
        return f"({collapsed}/{len(runs)} collapsed)" if collapsed else ""
    error = standard_error(values)
    places = 1 if metric in ("accuracy", "seconds") else decimals(statistics.fmean(values))
    text = f"{statistics.fmean(values):.{places}f}" + (f" ± {error:.{places}f}" if error else "")
    text += f" ({rate})" if (rate := runs[0].get("rate")) else ""
    return text + (f" ({collapsed}/{len(runs)} collapsed)" if collapsed else "")


def table(title: str, heads: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table under its title; nothing where it has no lines."""
    if not lines:
        return []
    return ["", f"## {title}", "", *(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))]


def introduction(found: Found, rows: Rows) -> list[str]:
    """Where and how often was measured, and what the tasks are."""
    every = [run for optimizers in found.values() for runs in optimizers.values() for run in runs]
    environments = {tuple((run["environment"][k]) for k in ("device", "torch", "threads")) for run in every}
    where = "; ".join(
        f"{device}, torch {torch}, CPU threads: {threads}" for device, torch, threads in sorted(environments)
    )
    seeds = sorted({len(runs) for of_task in rows.values() for runs in of_task.values()})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    lines = [f"Mean ± standard error over seeds ({span} a cell; {where})."]
    lines.append(
        "The best rate of a sweep is the one of lowest mean final training loss on these same runs. A run has "
        "collapsed where it ended in NaN or above the loss it started from."
    )
    sizes = [next(iter(optimizers.values()))[0] for optimizers in found.values()]
    return [*lines, "", *(f"- {r['task']}: {r['about']}; {r['steps']} steps, {r['parameters']} weights" for r in sizes)]


def finals(metric: str, found: Found, rows: Rows) -> list[str]:
    """A metric at the end: optimizers down, tasks across."""
    runs = {task: [run for of in optimizers.values() for run in of] for task, optimizers in found.items()}
    tasks = [t for t in found if metric == "seconds" or any(metric in run["evaluations"][-1] for run in runs[t])]
    lines = []
    for row, of_task in rows.items():
        shown = [run for task in tasks for run in of_task.get(task, [])]
        if shown:
            cells = [cell(of_task[task], metric) if task in of_task else "" for task in tasks]
            lines.append([row, *cells, f"{sum(run['collapsed'] for run in shown)} of {len(shown)}"])
    return table(METRICS[metric], ["optimizer", *tasks, "collapsed"], lines if tasks else [])


def against(ours: str, rows: Rows) -> list[str]:
    """By how much the final training loss of one of ours is above (+) or below (-) each other row's."""
    tasks, lines = list(rows.get(ours, {})), []
    for row, of_task in rows.items():
        by = {task: change(rows[ours][task], of_task[task]) for task in tasks if task in of_task}
        if row in OURS or not by:
            continue
        counted = [share for share, _ in by.values() if math.isfinite(share)]
        below = f"{sum(share <= 0 for share in counted)} of {len(counted)}"
        lines.append([row, *(by[task][1] if task in by else "" for task in tasks), below])
    title = f"Final training loss of {ours} against each, % on common seeds (below 0: ours is lower)"
    return table(title, ["", *tasks, "at or below"], lines)


def equal_time(ours: str, rows: Rows) -> list[str]:
    """The same of mini-batches' losses when a whole run of one of ours is over; the average's would be lower."""
    tasks, lines = list(rows.get(ours, {})), []
    budget = {task: mean(rows[ours][task], "seconds") for task in tasks}
    for row, of_task in rows.items():
        cells = []
        for task in tasks:
            runs = of_task.get(task, [])
            _, text = change(rows[ours][task], runs, partial(loss_after, seconds=budget[task]))
            part = mean(runs, "seconds") / budget[task]  # of ours' time, its whole run
            cells.append(text + (f" (over at {part:.0%})" if text and part < 0.995 else ""))
        if row not in OURS and any(cells):
            lines.append([row, *cells])
    heads = ["", *(f"{task}, {budget[task]:.0f} s" for task in tasks)]
    title = f"Mini-batches' loss of {ours} against each when its run is over, % on common seeds"
    return table(title, heads, lines)


def variants(base: str, rows: Rows) -> list[str]:
    """By how much options of one of ours raise (+) or lower (-) its final training loss, on the seeds of both."""
    default, lines = rows.get(base, {}), []
    others = {row: of_task for row, of_task in rows.items() if row.startswith(f"{base}:")}
    tasks = [task for task in default if any(task in of_task for of_task in others.values())]
    for row, of_task in others.items():
        by = {task: change(of_task[task], default[task]) for task in tasks if task in of_task}
        if by:
            median = f"{statistics.median(share for share, _ in by.values()):+.1%}"[:-1]
            lines.append([f"`{row.partition(':')[2]}`", *(by[t][1] if t in by else "" for t in tasks), median])
    return table(
        f"Options of {base}: final training loss against the default's, % on common seeds",
        ["", *tasks, "median"],
        lines,
    )


def tables(found: Found) -> str:
    """All tables in Markdown."""
    rows = rows_of(found)
    plain = {row: of_task for row, of_task in rows.items() if not is_variant(row)}
    lines = introduction(found, rows)
    for metric in METRICS:
        lines += finals(metric, found, plain)
    for ours in OURS:
        lines += against(ours, plain) + equal_time(ours, plain)
    for ours in OURS:
        lines += variants(ours, rows)
    return "\n".join(lines) + "\n"
