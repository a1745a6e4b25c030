"""The table of published workloads, from what bench.published has written."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.published.workloads import WORKLOADS
from bench.quality import store
from bench.quality.results import standard_error
from bench.quality.tables import Lines, label, markdown


def table(folder: Path) -> Lines:
    """A line for each workload and optimizer: what is published, and the mean over the seeds that did not collapse."""
    lines = []
    for name, workload in WORKLOADS.items():
        by_name: dict[str, list[store.Run]] = {}
        for run in store.read(folder / f"{name}.csv"):
            by_name.setdefault(str(run.name), []).append(run)
        percent = 100 if workload.metric == "accuracy" else 1
        for optimizer, runs in by_name.items():
            found = [percent * getattr(run, workload.metric) for run in runs if not run.collapsed]
            mean = f"{statistics.fmean(found):.4g} ± {standard_error(found):.2g}" if found else "none"
            lost = f", {len(runs) - len(found)} collapsed" if len(found) < len(runs) else ""
            published = f"{percent * workload.published:.4g}"
            lines.append([workload.task.about, label(optimizer), published, mean, f"{len(runs)}{lost}"])
    return markdown(["workload", "optimizer", "published", "here", "seeds"], lines)
