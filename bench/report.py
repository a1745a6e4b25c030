"""Print the ratios of a benchmark's JSON as a table: python bench/report.py FILE.json [FILE.json ...]."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def load(path: Path) -> tuple[dict, list[dict]]:
    """Read pytest-benchmark's JSON.

    Returns:
        What it says of the machine, and the benchmarks that have a ratio.
    """
    content = json.loads(path.read_text())
    return content["machine_info"], [b for b in content["benchmarks"] if "ratio" in b["extra_info"]]


def table_of(machine: dict, benchmarks: list[dict]) -> Table:
    """One row a case, one column a workload; each cell our median over the other's, and our median."""
    workloads = list(dict.fromkeys(b["extra_info"]["workload"] for b in benchmarks))
    ours = machine["lwas_fast"]
    table = Table(title=f"ours / theirs (our median) on {ours['device']}, torch {ours['torch']}")
    table.add_column("case")
    for workload in workloads:
        table.add_column(workload, justify="right")
    rows: dict[str, dict[str, str]] = {}
    for b in benchmarks:
        info = b["extra_info"]
        name = info["case"]
        name += f", {info['threads']} threads" if info.get("threads") else ""
        name += ", CPU time" if info.get("measure") == "launch" else ""
        median = b["stats"]["median"] * 1e3
        rows.setdefault(name, {})[info["workload"]] = f"{info['ratio']:.2f} ({median:.3g} ms)"
    for name, cells in rows.items():
        table.add_row(name, *(cells.get(workload, "") for workload in workloads))
    return table


def main() -> None:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    console = Console(width=180)
    for path in parser.parse_args().files:
        machine, benchmarks = load(path)
        console.print(table_of(machine, benchmarks))


if __name__ == "__main__":
    main()
