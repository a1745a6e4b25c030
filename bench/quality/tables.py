"""Tables in Markdown: finals, ours against each, equal wall-clock, variants of ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial

from bench.quality.optimizers import OURS, PARAMETER_FREE, SWEPT, parts
from bench.quality.results import (
    Found,
    Rows,
    Runs,
    final,
    loss_after,
    mean,
    paired,
    rows_of,
    standard_error,
    without_variants,
)
from bench.quality.store import Run
from bench.quality.tasks import EVERY_TASK

NAMES = {
    "adamw": "AdamW", "sgd": "SGD-m", "sf_adamw": "Schedule-Free AdamW", "sf_sgd": "Schedule-Free SGD",
    "shampoo": "Shampoo", "kfac": "KFAC", "adahessian": "AdaHessian", "sophia_h": "Sophia-H", "prodigy": "Prodigy",
    "muon": "Muon + AdamW", "sf_refined": "Refined Schedule-Free AdamW", "sf_plus": "ScheduleFree+",
    "dadapt_adam": "D-Adaptation Adam", "dog": "DoG", "muonlw": "MuonLW", "adamwlw": "AdamWLW",
    "sgdlw": "SGDLW",
}  # fmt: skip
SCHEDULED = {"cosine": "cosine", "warmup": "warm-up", "warmup_cosine": "warm-up and cosine"}
METRICS = {
    "train": "Final training loss, on a fixed subset in eval mode (lower is better)",
    "test": "Final test loss (lower is better)",
    "accuracy": "Final test accuracy, % (higher is better)",
    "seconds": "Seconds of training, at the fastest run's pace",
}
Lines = list[str]


def label(row: str) -> str:
    """A row's name as one reads it; ours are bold."""
    name, _, swept = row.partition(", best ")
    schedule, comma, averaged = swept.partition(", ")
    base, _, options = name.partition(":")
    if base in OURS:
        return f"**{NAMES[base]}**" + (f", {options}" if options else "")
    if schedule:
        constant = "" if base in PARAMETER_FREE else "constant "
        rate = f"{constant}rate" if schedule == "constant" else f"rate + {SCHEDULED[schedule]}"
        return f"{NAMES[base]}, best {rate}{comma}{averaged}"
    return f"{NAMES[base]}, {options or 'default'}" if options or base in SWEPT else NAMES[base]


def rate_of(run: Run) -> str:
    """The rate that a sweep has found, KFAC's with the damping, an average's with its share; empty where none was."""
    options = dict(run.name.options)
    if run.name.base not in SWEPT or "lr" not in options:
        return ""
    more = (f", {key} {options[key]:g}" for key in ("damping", "average") if key in options)
    return f"{options['lr']:g}" + "".join(more)


def markdown(heads: list[str], lines: Iterable[list[str]]) -> Lines:
    """A table; nothing where it has no lines."""
    lines = list(lines)
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines)] if lines else []


def decimals(value: float) -> int:
    """How many show four significant digits, of values below 1000."""
    return 4 if not value else max(0, 3 - math.floor(math.log10(abs(value))))


def percent(share: float) -> str:
    """With one digit, and without the sign, which the heading has."""
    return f"{share:+.1%}"[:-1]


def final_loss(run: Run) -> float:
    """On the training set."""
    return run.train


def change(ours: Runs, theirs: Runs, loss: Callable[[Run], float] = final_loss) -> tuple[float, str]:
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
    text = percent(share) + (f" ± {error:.1%}"[:-1] if len(finite) > 1 else "")
    return share, text + (f" ({len(finite)}/{len(pairs)})" if len(finite) < len(pairs) else "")


def cell(runs: Runs, metric: str) -> str:
    """Mean, standard error over seeds, the swept rate, and how many runs collapsed.

    A run that ended in NaN has no final loss and is not in the mean; the cell says that it collapsed. Seconds have no
    error: runs of one row have one pace.
    """
    values = [value for run in runs if math.isfinite(value := final(run, metric))]
    if metric == "seconds":
        return f"{statistics.fmean(values):.1f}"
    texts = []
    if values:
        error = standard_error(values)
        places = 1 if metric == "accuracy" else decimals(statistics.fmean(values))
        texts.append(f"{statistics.fmean(values):.{places}f}" + (f" ± {error:.{places}f}" if error else ""))
        texts += [f"({rate})"] if (rate := rate_of(runs[0])) else []
    if collapsed := sum(run.collapsed for run in runs):
        texts.append(f"({collapsed}/{len(runs)} collapsed)")
    return " ".join(texts)


def sizes(found: Found, tasks: Iterable[str]) -> Lines:
    """A list of what the tasks are."""
    runs = {task: next(iter(found[task].values()))[0] for task in tasks if task in found}
    return [f"- {t}: {EVERY_TASK[t].about}; {run.steps} steps, {run.parameters} weights" for t, run in runs.items()]


def finals(metric: str, rows: Rows, tasks: Iterable[str]) -> Lines:
    """A metric at the end: optimizers down, tasks across; beside the training loss, how many runs collapsed."""
    every = {task: [run for of_task in rows.values() for run in of_task.get(task, [])] for task in tasks}
    columns = [task for task, runs in every.items() if any(getattr(run, metric) is not None for run in runs)]
    lines = []
    for row, of_task in rows.items():
        shown = [run for task in columns for run in of_task.get(task, [])]
        if shown:
            cells = [cell(of_task[task], metric) if task in of_task else "" for task in columns]
            count = [f"{sum(run.collapsed for run in shown)} of {len(shown)}"] if metric == "train" else []
            lines.append([label(row), *cells, *count])
    return markdown(["optimizer", *columns, *(["collapsed"] if metric == "train" else [])], lines)


def against(ours: str, rows: Rows, tasks: Iterable[str]) -> Lines:
    """By how much the final training loss of one of ours is above (+) or below (-) each other row's."""
    columns, lines = [task for task in tasks if task in rows.get(ours, {})], []
    for row, of_task in rows.items():
        by = {task: change(rows[ours][task], of_task[task]) for task in columns if task in of_task}
        if by and row not in OURS:
            counted = [share for share, _ in by.values() if math.isfinite(share)]
            below = f"{sum(share <= 0 for share in counted)} of {len(counted)}"
            lines.append([label(row), *(by[task][1] if task in by else "" for task in columns), below])
    return markdown(["", *columns, "at or below"], lines)


def equal_time(ours: str, rows: Rows, tasks: Iterable[str]) -> Lines:
    """The same of mini-batches' losses when a whole run of one of ours is over; the average's would be lower."""

    def drawn(row: str, task: str) -> Runs:
        return [run for run in rows.get(row, {}).get(task, []) if run.curve is not None and run.curve.loss]

    budget = {task: mean(mine, "seconds") for task in tasks if (mine := drawn(ours, task))}
    lines = []
    for row in (row for row in rows if row not in OURS):
        changes = (
            change(drawn(ours, task), drawn(row, task), partial(loss_after, seconds=seconds))
            for task, seconds in budget.items()
        )
        if any(cells := [text for _, text in changes]):
            lines.append([label(row), *cells])
    return markdown(["", *(f"{task}, {seconds:.0f} s" for task, seconds in budget.items())], lines)


def variants(
    base: str, rows: Rows, tasks: Iterable[str], shown: Callable[[set[str]], bool] = lambda options: True
) -> Lines:
    """By how much options raise (+) or lower (-) the final training loss of `base`, on the seeds of both.

    Args:
        base: One of ours, perhaps with an option, which the others have as well.
        rows: All.
        tasks: Where.
        shown: Of the further options' names: whether to show a row that has them.
    """
    name, _, fixed = base.partition(":")
    default, others = {task: runs for task in tasks if (runs := rows.get(base, {}).get(task))}, {}
    for row, of_task in rows.items():
        options = parts(row.partition(":")[2])
        further = [option for option in options if option != fixed]
        if row.startswith(f"{name}:") and row != base and (not fixed or fixed in options):
            by = {task: change(of_task[task], runs) for task, runs in default.items() if task in of_task}
            if by and shown({option.partition("=")[0] for option in further}):
                others[",".join(further)] = by
    columns = [task for task in default if any(task in by for by in others.values())]
    lines = []
    for options, by in others.items():
        median = percent(statistics.median(share for share, _ in by.values()))
        lines.append([f"`{options}`", *(by[task][1] if task in by else "" for task in columns), median])
    return markdown(["", *columns, "median"], lines)


def text_of(found: Found, where: str) -> str:
    """All tables of a folder, each under its title."""
    rows, tasks = rows_of(found), list(found)
    plain = without_variants(rows)
    made = [(f"Tasks, on {where}", sizes(found, tasks))]
    made += [(title, finals(metric, plain, tasks)) for metric, title in METRICS.items()]
    for ours in OURS:
        name = NAMES[ours]
        made += [
            (f"Final training loss of {name} against each, % on common seeds (below 0: ours is lower)",
             against(ours, plain, tasks)),
            (f"Mini-batches' loss of {name} against each when its run is over, % on common seeds",
             equal_time(ours, plain, tasks)),
            (f"Options of {name}: final training loss against the default's, % on common seeds",
             variants(ours, rows, tasks)),
        ]  # fmt: skip
    return "\n\n".join("\n".join([f"## {title}", "", *lines]) for title, lines in made if lines) + "\n"
