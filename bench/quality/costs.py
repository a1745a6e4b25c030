"""Tables of what steps cost, from the JSONs of bench/test_step.py and bench/test_update.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.quality.tables import markdown

OURS = {"AdamW": "AdamWLW", "SGD-m": "SGDLW"}
ROUTES = {"autograd": "`opt.backward(loss)`", "finite differences": "`opt.step(closure)`"}


def load(path: Path) -> tuple[list[dict[str, Any]], str]:
    """What each benchmark told, and where and by which commit it was measured."""
    content = json.loads(path.read_text())
    machine = content["machine_info"]
    where = f"{machine['lwas_fast']['device']}, {machine['cores']} cores, torch {machine['lwas_fast']['torch']}"
    told = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    return [
        info for info in told if "ratio" in info
    ], f"{where}; commit {content['commit_info'].get('id', 'unknown')[:7]}."


def name_of(case: str) -> str:
    """A case by our names: `AdamW, autograd` is AdamWLW by `opt.backward(loss)`."""
    rule, _, rest = case.partition(", ")
    return ", ".join(filter(None, (OURS.get(rule, rule), ROUTES.get(rest, rest.replace(", against fused", "")))))


def span(values: list[float]) -> str:
    """The least and the most."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def short(path: Path) -> list[str]:
    """A line a case: the mean of the first 500 steps by model; what an ordinary step and what `opt.step()` take."""
    told, where = load(path)
    models = list(dict.fromkeys(info["workload"] for info in told))
    update = ["`opt.step()` alone"] if any("ratio_update" in info for info in told) else []
    lines = []
    for case in dict.fromkeys(info["case"] for info in told):
        of = {info["workload"]: info for info in told if info["case"] == case}
        line = [name_of(case), *(f"{of[m]['ratio_mean']:.2f}" if m in of else "" for m in models)]
        line.append(span([info["ratio"] for info in of.values()]))
        line += [span([info["ratio_update"] for info in of.values() if "ratio_update" in info]) for _ in update]
        lines.append(line)
    return [*markdown(["", *models, "ordinary step", *update], lines), "", where]


def steps(path: Path) -> list[str]:
    """A line for each case and model, with memory."""
    told, where = load(path)
    columns = {"mean of 500": "ratio_mean", "ordinary step": "ratio", "step that measures": "ratio_measuring"}
    if any("ratio_update" in info for info in told):
        columns["`opt.step()` alone"] = "ratio_update"
    memory = {"memory, ordinary": "peak_bytes", "memory, measuring": "peak_bytes_measuring"}
    lines = []
    for info in sorted(told, key=lambda info: info["case"]):
        times = [f"{info[key]:.2f}" if key in info else "" for key in columns.values()]
        bytes_ = [f"{info[key] / info['theirs_peak_bytes']:.2f}" for key in memory.values()]
        lines.append([name_of(info["case"]), info["workload"], *times, *bytes_])
    return [*markdown(["", "model", *columns, *memory], lines), "", where]


def updates(path: Path) -> list[str]:
    """A line for each case and number of threads, models across."""
    told, where = load(path)
    models = list(dict.fromkeys(info["workload"] for info in told))
    cells: dict[str, dict[str, str]] = {}
    for info in told:
        name = name_of(info["case"])
        if threads := info.get("threads"):
            name += f", {threads} thread{'s' * (threads > 1)}"
        name += ", CPU time" if info.get("measure") == "launch" else ""
        cells.setdefault(name, {})[info["workload"]] = f"{info['ratio']:.2f}"
    lines = [[name, *(of.get(model, "") for model in models)] for name, of in sorted(cells.items())]
    return [*markdown(["", *models], lines), "", where]
