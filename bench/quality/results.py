"""Runs, read and put into the rows of tables and pictures.

Of optimizers that are swept the best rate is taken for each task and schedule, of averages apart: the one of lowest
mean final training loss over the seeds, of those run on the most seeds (a sweep on one seed may be followed by its best
rates on more). It is chosen on runs that are shown, which favours it a little.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path

from bench.quality import store
from bench.quality.optimizers import OURS, PARAMETER_FREE, RULES, SWEPT, SWEPT_WITH
from bench.quality.schedules import SCHEDULES
from bench.quality.store import Run
from bench.quality.tasks import EVERY_TASK

# Options that change numbers and not the work of a step. Not the cap: a layer near it takes a second pass.
COSTLESS = SWEPT_WITH | {"betas", "ramp_steps"}

AVERAGED = ", averaged"  # at the end of a swept row's name

Runs = list[Run]  # of one task and optimizer, over the seeds
Found = dict[str, dict[str, Runs]]  # task -> optimizer -> runs by seed
Rows = dict[str, dict[str, Runs]]  # row -> task -> runs by seed


def load(folder: Path) -> Found:
    """Read every run, in undisturbed seconds.

    Raises:
        FileNotFoundError: There are none.
        ValueError: Runs of one task differ in length or size, and cannot be compared.
    """
    found: Found = defaultdict(lambda: defaultdict(list))
    for run in sorted(store.read_all(folder), key=lambda run: run.key):
        found[run.task][str(run.name)].append(run)
    if not found:
        raise FileNotFoundError(f"{folder} holds no runs: python -m bench.quality.run makes them")
    for task, optimizers in found.items():
        if len(sizes := {(run.steps, run.full) for runs in optimizers.values() for run in runs}) > 1:
            raise ValueError(f"{task}: runs of different sizes (steps, full): {sorted(sizes)}")
        undisturb([run for runs in optimizers.values() for run in runs])
    return {name: found[name] for name in EVERY_TASK if name in found}


def undisturb(runs: Runs) -> None:
    """Give each run of a task the pace of the fastest with the same work: whatever else ran can only have slowed it."""
    alike: dict[str, Runs] = defaultdict(list)
    for run in runs:
        options = [(key, value) for key, value in run.name.options if key not in COSTLESS]
        alike[f"{run.name.base} {options}"].append(run)
    for same in alike.values():
        pace = min(run.seconds / run.taken for run in same)
        for run in same:
            share = pace * run.taken / run.seconds
            run.seconds *= share
            if run.curve is not None:
                run.curve.seconds = [share * time for time in run.curve.seconds]


def final(run: Run, metric: str) -> float:
    """A metric at the end of a run; NaN where it was not finite or the task has none."""
    value = getattr(run, metric)
    return math.nan if value is None else value * (100 if metric == "accuracy" else 1)


def mean_loss(runs: Runs) -> float:
    """What a rate is chosen by: the mean final training loss, infinite where a run collapsed."""
    return math.inf if any(run.collapsed for run in runs) else statistics.fmean(run.train for run in runs)


def best_rate(candidates: list[Runs]) -> Runs:
    """The runs of the best rate; where every rate has a collapse, of the one with the fewest."""
    most = max(map(len, candidates))
    whole = [runs for runs in candidates if len(runs) == most]
    return min(whole, key=lambda runs: (mean_loss(runs), sum(run.collapsed for run in runs)))


def rows_of(found: Found) -> Rows:
    """The rows of the tables in their order: swept, parameter-free, others, ours."""
    rows: Rows = defaultdict(dict)
    for task, optimizers in found.items():
        swept: dict[str, list[Runs]] = defaultdict(list)
        for name, runs in optimizers.items():
            base, options = runs[0].name.base, dict(runs[0].name.options)
            schedule = options.get("schedule", "constant")
            if base in SWEPT and set(options) <= {*SWEPT_WITH, "average"} and "lr" in options and schedule in SCHEDULES:
                averaged = AVERAGED if "average" in options else ""
                swept[f"{base}, best {schedule}{averaged}"].append(runs)
            else:
                rows[name][task] = runs
        for row, candidates in swept.items():
            rows[row][task] = best_rate(candidates)
    first = [
        f"{base}, best {schedule}{averaged}" for base in SWEPT for schedule in SCHEDULES for averaged in ("", AVERAGED)
    ]
    bases = [*SWEPT, *PARAMETER_FREE, *(b for b in RULES if b not in (*SWEPT, *PARAMETER_FREE, *OURS)), *OURS]

    def place(row: str) -> tuple[int, str]:
        return (first.index(row) if row in first else len(first) + bases.index(row.partition(":")[0]), row)

    return {row: rows[row] for row in sorted(rows, key=place)}


def is_variant(row: str) -> bool:
    """Whether a row is of an optimizer with options other than what is swept."""
    return ":" in row


def without_variants(rows: Rows) -> Rows:
    """What is compared at equal steps and at equal wall-clock."""
    return {row: of_task for row, of_task in rows.items() if not is_variant(row)}


def mean(runs: Runs, metric: str) -> float:
    """Over the seeds, of those that ended with a number; NaN where none did."""
    values = [value for run in runs if math.isfinite(value := final(run, metric))]
    return statistics.fmean(values) if values else math.nan


def paired(ours: Runs, theirs: Runs) -> list[tuple[Run, Run]]:
    """The runs of the seeds that both have: other seeds have other weights, mini-batches, and losses."""
    by_seed = {run.seed: run for run in theirs}
    return [(run, by_seed[run.seed]) for run in ours if run.seed in by_seed]


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def loss_after(run: Run, seconds: float) -> float:
    """The mini-batches' mean loss at a time, between two points of the curve in proportion; the last when it was over.

    Every step is taken to last as long: what is left of seconds within a run is mostly what else the machine did. NaN
    before the first point, and where the run ended in NaN before that time.
    """
    losses = run.curve.loss
    times = [run.seconds / run.taken * step for step in store.points(run.steps)[: len(losses)]]
    after = next((i for i, time in enumerate(times) if time >= seconds), None)
    if after is None:
        return losses[-1] if run.taken == run.steps else math.nan
    if after == 0:
        return losses[0] if times[0] == seconds else math.nan
    share = (seconds - times[after - 1]) / (times[after] - times[after - 1])
    return losses[after - 1] + share * (losses[after] - losses[after - 1])
