"""The table of published workloads, from what bench.published has written."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.published.workloads import WORKLOADS
from bench.quality import store
from bench.quality.results import Runs, standard_error
from bench.quality.tables import Lines, label, markdown


def by_optimizer(runs: Runs, metric: str) -> list[tuple[str, Runs, list[float]]]:
    """Each optimizer's runs, and the metric of those that did not collapse."""
    named: dict[str, Runs] = {}
    for run in runs:
        named.setdefault(str(run.name), []).append(run)
    return [(name, of, [getattr(run, metric) for run in of if not run.collapsed]) for name, of in named.items()]


def table(folder: Path) -> Lines:
    """A line for each workload and optimizer: what is published, and the mean over the seeds that did not collapse."""
    lines = []
    for name, workload in WORKLOADS.items():
        percent = 100 if workload.metric == "accuracy" else 1
        for optimizer, runs, values in by_optimizer(store.read(folder / f"{name}.csv"), workload.metric):
            found = [percent * value for value in values]
            mean = f"{statistics.fmean(found):.4g} ± {standard_error(found):.2g}" if found else "none"
            lost = f", {len(runs) - len(found)} collapsed" if len(found) < len(runs) else ""
            published = f"{percent * workload.published:.4g}"
            lines.append([workload.task.about, label(optimizer), published, mean, f"{len(runs)}{lost}"])
    return markdown(["workload", "optimizer", "published", "here", "seeds"], lines)
