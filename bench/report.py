"""Print the ratios of a benchmark's JSON as a table: python bench/report.py FILE.json [FILE.json ...]."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from told import load, setting_of, where


def group_of(benchmark: dict) -> str:
    """What its file measures: bench/test_update.py::... -> update."""
    return Path(benchmark["fullname"].split("::")[0]).stem.removeprefix("test_")


def cell_of(benchmark: dict) -> str:
    """A ratio and our median; or, of whole steps, the ratios of an ordinary one, a measuring one and the mean."""
    info = benchmark["extra_info"]
    if "ratio_mean" in info:
        return f"{info['ratio']:.2f} / {info['ratio_measuring']:.1f} / {info['ratio_mean']:.2f}"
    return f"{info['ratio']:.2f} ({info.get('seconds', benchmark['stats']['median']) * 1e3:.3g} ms)"


def table_of(place: str, group: str, benchmarks: list[dict]) -> Table:
    """Cases against workloads, the longer of the two downwards."""
    cells: dict[tuple[str, str], str] = {}
    for b in benchmarks:
        info = b["extra_info"]
        cells[info["case"] + setting_of(info), info["workload"]] = cell_of(b)
    rows, columns = (list(dict.fromkeys(key[k] for key in cells)) for k in (0, 1))
    turned = len(columns) > len(rows)
    if turned:
        rows, columns = columns, rows
    whole = any("ratio_mean" in b["extra_info"] for b in benchmarks)
    what = "ordinary step / step that measures / mean of 500" if whole else "our median"
    table = Table(title=f"{group}: ours / theirs ({what}) on {place}")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row, *(cells.get((c, row) if turned else (row, c), "") for c in columns))
    return table


def main() -> None:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    console = Console(width=180)
    for path in parser.parse_args().files:
        content, benchmarks = load(path)
        for group in dict.fromkeys(map(group_of, benchmarks)):
            console.print(table_of(where(content), group, [b for b in benchmarks if group_of(b) == group]))


if __name__ == "__main__":
    main()
