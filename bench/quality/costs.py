"""Tables of what steps cost, from the JSONs of bench/test_step.py and bench/test_update.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import told
from bench.quality.tables import markdown

ROUTES = {"autograd": "`opt.backward(loss)`", "finite differences": "`opt.step(closure)`"}


def read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """What each benchmark told, and where and by which commit it was measured."""
    content, benchmarks = told.load(path)
    commit = content["commit_info"].get("id", "unknown")[:7]
    return [benchmark["extra_info"] for benchmark in benchmarks], f"{told.where(content)}; commit {commit}."


def span(values: list[float]) -> str:
    """The least and the most."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def short(path: Path) -> list[str]:
    """A line a case: the mean of the first 500 steps by model; what an ordinary step and what `opt.step()` take."""
    infos, where = read(path)
    models = list(dict.fromkeys(info["workload"] for info in infos))
    update = ["`opt.step()` alone"] if any("ratio_update" in info for info in infos) else []
    lines = []
    for case in dict.fromkeys(info["case"] for info in infos):
        of = {info["workload"]: info for info in infos if info["case"] == case}
        line = [told.name_of(case, ROUTES), *(f"{of[m]['ratio_mean']:.2f}" if m in of else "" for m in models)]
        line.append(span([info["ratio"] for info in of.values()]))
        line += [span([info["ratio_update"] for info in of.values() if "ratio_update" in info]) for _ in update]
        lines.append(line)
    return [*markdown(["", *models, "ordinary step", *update], lines), "", where]


def steps(path: Path) -> list[str]:
    """A line for each case and model, with memory."""
    infos, where = read(path)
    columns = {"mean of 500": "ratio_mean"}
    if any("ratio_mean_long" in info for info in infos):
        columns["mean of 5000"] = "ratio_mean_long"
    columns |= {"ordinary step": "ratio", "step that measures": "ratio_measuring"}
    if any("ratio_update" in info for info in infos):
        columns["`opt.step()` alone"] = "ratio_update"
    memory = {"memory, ordinary": "peak_bytes", "memory, measuring": "peak_bytes_measuring"}
    lines = []
    for info in sorted(infos, key=lambda info: info["case"]):
        times = [f"{info[key]:.2f}" if key in info else "" for key in columns.values()]
        bytes_ = [f"{info[key] / info['theirs_peak_bytes']:.2f}" for key in memory.values()]
        lines.append([told.name_of(info["case"], ROUTES), info["workload"], *times, *bytes_])
    return [*markdown(["", "model", *columns, *memory], lines), "", where]


def updates(path: Path) -> list[str]:
    """A line for each case and number of threads, models across."""
    infos, where = read(path)
    models = list(dict.fromkeys(info["workload"] for info in infos))
    cells: dict[str, dict[str, str]] = {}
    for info in infos:
        name = told.name_of(info["case"], ROUTES) + told.setting_of(info)
        cells.setdefault(name, {})[info["workload"]] = f"{info['ratio']:.2f}"
    lines = [[name, *(of.get(model, "") for model in models)] for name, of in sorted(cells.items())]
    return [*markdown(["", *models], lines), "", where]
