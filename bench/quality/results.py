"""The JSONs of bench.quality.run, read and put into the rows of tables and pictures.

Of optimizers that are swept the best rate is taken for each task and schedule: the one of lowest mean final training
loss over the seeds, of those run on the most seeds (a sweep on one seed may be followed by its best rates on more). It
is chosen on runs that are shown, which favours it a little.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from bench.quality.optimizers import OURS, PARAMETER_FREE, RULES, SCHEDULES, SWEPT, SWEPT_WITH
from bench.quality.tasks import EVERY_TASK

# Options that change numbers and not the work of a step. Not the cap: a layer near it takes a second pass.
COSTLESS = SWEPT_WITH | {"betas", "ramp_steps"}

Runs = list[dict]  # of one task and optimizer, over the seeds
Rows = dict[str, dict[str, Runs]]  # row -> task -> runs


def load(folder: Path) -> dict[str, dict[str, Runs]]:
    """Read every run.

    Returns:
        Task -> optimizer -> runs by seed, in undisturbed seconds.

    Raises:
        FileNotFoundError: There are none.
        ValueError: Runs of one task differ in length or size, and cannot be compared.
    """
    found: dict[str, dict[str, Runs]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*/*-seed*.json")):
        run = json.loads(path.read_text())
        found[run["task"]][run["optimizer"]].append(run)
    if not found:
        raise FileNotFoundError(f"{folder} holds no runs: python -m bench.quality.run makes them")
    for task, optimizers in found.items():
        if len(sizes := {(run["steps"], run["full"]) for runs in optimizers.values() for run in runs}) > 1:
            raise ValueError(f"{task}: runs of different sizes (steps, full): {sorted(sizes)}")
        undisturb(list(optimizers.values()))
        for runs in optimizers.values():
            runs.sort(key=lambda run: run["seed"])
    return {name: found[name] for name in EVERY_TASK if name in found}


def undisturb(optimizers: list[Runs]) -> None:
    """Give each run of a task the pace of the fastest with the same work: whatever else ran can only have slowed it."""
    alike: dict[str, Runs] = defaultdict(list)
    for run in (run for runs in optimizers for run in runs):
        options = {key: value for key, value in run["options"].items() if key not in COSTLESS}
        alike[f"{run['base']} {sorted(options.items())}"].append(run)
    for runs in alike.values():
        pace = min(run["seconds"] / run["steps_taken"] for run in runs)
        for run in runs:
            share = pace * run["steps_taken"] / run["seconds"]
            run["seconds"] *= share
            run["curve"]["seconds"] = [share * time for time in run["curve"]["seconds"]]


def final(run: dict, metric: str) -> float:
    """A metric at the end of a run; NaN where it was not finite or the task has none."""
    value = run["seconds"] if metric == "seconds" else run["evaluations"][-1].get(metric)
    return math.nan if value is None else value * (100 if metric == "accuracy" else 1)


def final_loss(run: dict) -> float:
    """On the training set, in evaluation mode."""
    return final(run, "train")


def mean_loss(runs: Runs) -> float:
    """What a rate is chosen by: the mean final training loss, infinite where a run collapsed."""
    return math.inf if any(run["collapsed"] for run in runs) else statistics.fmean(map(final_loss, runs))


def best_rate(candidates: list[Runs]) -> Runs:
    """The runs of the best rate; where every rate has a collapse, of the one with the fewest."""
    most = max(map(len, candidates))
    whole = [runs for runs in candidates if len(runs) == most]
    best = min(whole, key=lambda runs: (mean_loss(runs), sum(run["collapsed"] for run in runs)))
    chosen = ", ".join(f"{key} {best[0]['options'][key]:g}" for key in ("lr", "damping") if key in best[0]["options"])
    rate = f"{chosen}, best of {len(candidates)}"
    return [{**run, "rate": rate} for run in best]


def rows_of(found: dict[str, dict[str, Runs]]) -> Rows:
    """The rows of the tables in their order: swept, parameter-free, others, ours."""
    rows: Rows = defaultdict(dict)
    for task, optimizers in found.items():
        swept: dict[str, list[Runs]] = defaultdict(list)
        for name, runs in optimizers.items():
            options = runs[0]["options"]
            if runs[0]["base"] in SWEPT and set(options) <= SWEPT_WITH and "lr" in options:
                swept[f"{runs[0]['base']}, best {options.get('schedule', 'constant')}"].append(runs)
            else:
                rows[name][task] = runs
        for row, candidates in swept.items():
            rows[row][task] = best_rate(candidates)
    first = [f"{base}, best {schedule}" for base in SWEPT for schedule in SCHEDULES]
    bases = [*SWEPT, *PARAMETER_FREE, *(b for b in RULES if b not in (*SWEPT, *PARAMETER_FREE, *OURS)), *OURS]

    def place(row: str) -> tuple[int, str]:
        return (first.index(row) if row in first else 10 + bases.index(row.partition(":")[0]), row)

    return {row: rows[row] for row in sorted(rows, key=place)}


def is_variant(row: str) -> bool:
    """Whether a row is of an optimizer with options other than what is swept."""
    return ":" in row


def mean(runs: Runs, metric: str) -> float:
    """Over the seeds, of those that ended with a number; NaN where none did."""
    values = [value for run in runs if math.isfinite(value := final(run, metric))]
    return statistics.fmean(values) if values else math.nan


def paired(ours: Runs, theirs: Runs) -> list[tuple[dict, dict]]:
    """The runs of the seeds that both have: other seeds have other weights, mini-batches, and losses."""
    by_seed = {run["seed"]: run for run in theirs}
    return [(run, by_seed[run["seed"]]) for run in ours if run["seed"] in by_seed]


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def loss_after(run: dict, seconds: float) -> float:
    """The mini-batches' mean loss at a time, between two points of the curve in proportion; the last when it was over.

    NaN before the first point, and where the run ended in NaN before that time.
    """
    times, losses = run["curve"]["seconds"], run["curve"]["loss"]
    after = next((i for i, time in enumerate(times) if time >= seconds), None)
    if after is None:
        return losses[-1] if run["steps_taken"] == run["steps"] else math.nan
    if after == 0:
        return losses[0] if times[0] == seconds else math.nan
    share = (seconds - times[after - 1]) / (times[after] - times[after - 1])
    return losses[after - 1] + share * (losses[after] - losses[after - 1])
