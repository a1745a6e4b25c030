"""The training-quality suite's results in Markdown: finals, ours against each, equal wall-clock, variants of ours."""

from __future__ import annotations

import math
import statistics

from bench.quality.optimizers import OURS
from bench.quality.results import Rows, Runs, final, is_variant, loss_after, mean, rows_of, standard_error

METRICS = {
    "train": "Final training loss, on a fixed subset in eval mode (lower is better)",
    "test": "Final test loss (lower is better)",
    "accuracy": "Final test accuracy, % (higher is better)",
    "seconds": "Seconds of training",
}
Found = dict[str, dict[str, Runs]]


def cell(runs: Runs, metric: str) -> str:
    """Mean, standard error over seeds, the swept rate, and how many runs collapsed.

    A run that ended in NaN has no final loss and is not in the mean; the cell says that it collapsed.
    """
    values = [value for run in runs if math.isfinite(value := final(run, metric))]
    collapsed = sum(run["collapsed"] for run in runs)
    if not values:
        return f"({collapsed}/{len(runs)} collapsed)" if collapsed else ""
    digits = 1 if metric in ("accuracy", "seconds") else 4
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {standard_error(values):.{digits}f}"
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
    lines.append("The best rate of a sweep is the one of lowest mean final training loss on these same runs.")
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
        by = {t: mean(rows[ours][t], "train") / mean(of_task[t], "train") - 1 for t in tasks if t in of_task}
        if row in OURS or not by:
            continue
        counted = [value for value in by.values() if math.isfinite(value)]
        below = f"{sum(value <= 0 for value in counted)} of {len(counted)}"
        lines.append([row, *(f"{by[t]:+.1%}" if t in by and math.isfinite(by[t]) else "" for t in tasks), below])
    return table(
        f"Final training loss of {ours} against each (below 0: ours is lower)", ["", *tasks, "at or below"], lines
    )


def equal_time(ours: str, rows: Rows) -> list[str]:
    """The training loss of the others when a whole run of one of ours is over."""
    tasks, lines = list(rows.get(ours, {})), []
    budget = {task: mean(rows[ours][task], "seconds") for task in tasks}
    for row, of_task in rows.items():
        cells = []
        for task in tasks:
            runs = of_task.get(task, [])
            losses = [x for run in runs if math.isfinite(x := loss_after(run, budget[task]))]
            part = mean(runs, "seconds") / budget[task]  # of ours' time, its whole run
            note = f" (over at {part:.0%})" if part < 0.995 and row != ours else ""
            cells.append(f"{statistics.fmean(losses):.4f}{note}" if losses else "-" if runs else "")
        if any(cells):
            lines.append([row, *cells])
    heads = ["", *(f"{task}, {budget[task]:.0f} s" for task in tasks)]
    return table(f"Mini-batches' loss after the time that a run of {ours} takes (the average's is lower)", heads, lines)


def variants(base: str, rows: Rows) -> list[str]:
    """By how much options of one of ours raise (+) or lower (-) its final training loss, on the seeds of both."""
    default, lines = rows.get(base, {}), []
    others = {row: of_task for row, of_task in rows.items() if row.startswith(f"{base}:")}
    tasks = [task for task in default if any(task in of_task for of_task in others.values())]
    for row, of_task in others.items():
        by: dict[str, float] = {}
        for task in tasks:
            seeds = {run["seed"] for run in of_task.get(task, [])}
            both = [run for run in default[task] if run["seed"] in seeds]
            if both:
                ratio = mean(of_task[task], "train") / mean(both, "train")
                by[task] = ratio - 1 if math.isfinite(ratio) else math.inf
        cells = ["" if t not in by else f"{by[t]:+.0%}" if by[t] < math.inf else "collapsed" for t in tasks]
        if by:
            lines.append([f"`{row.partition(':')[2]}`", *cells, f"{statistics.median(by.values()):+.0%}"])
    return table(f"Options of {base}: final training loss against the default's", ["", *tasks, "median"], lines)


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
