"""What `make trust` shows: for each promise how often it was tried, and how often it held.

A test counts with the `tally` fixture; the table is put together from all tests, in whichever processes they ran.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Of the update's tests, those that plant faults in its sources are taken into the table.
sys.path.append(str(Path(__file__).parents[1] / "update"))

GUARANTEES = Path(__file__).parents[2] / "docs" / "guarantees.md"
START, END = "<!-- tried: written by make trust ARGS=--write -->\n", "<!-- tried: end -->"


class Row:
    """One promise, as one test tried it."""

    def __init__(self, what: str):
        self.what, self.tried = what, 0
        self.missed: list[str] = []

    def held(self, whether: object, case: object = "") -> None:
        """Count one case; `case` tells in the failure which one did not hold."""
        self.tried += 1
        if not whether:
            self.missed.append(str(case))


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str], Any]:
    """Give what counts the cases of one promise, and fails at its end if one did not hold.

    ``with tally("what is promised") as row: row.held(condition, case)``
    """

    @contextmanager
    def counting(what: str) -> Iterator[Row]:
        row = Row(what)
        yield row
        record_property("trust", [what, row.tried, row.tried - len(row.missed)])
        assert row.tried > 0, f"{what}: nothing was tried"
        assert not row.missed, f"{what}: {len(row.missed)} of {row.tried} did not hold:\n" + "\n".join(row.missed[:20])

    return counting


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write", action="store_true", help="put the table of what held into docs/guarantees.md")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows: dict[str, tuple[int, int, set[str]]] = {}
    reports = [r for name in ("passed", "failed") for r in terminalreporter.stats.get(name, ()) if r.when == "call"]
    for report in sorted(reports, key=lambda report: report.nodeid):
        for name, value in report.user_properties:
            if name == "trust":
                what, tried, held = value
                before, held_before, files = rows.get(what, (0, 0, set()))
                rows[what] = before + tried, held_before + held, files | {report.nodeid.split("::")[0]}
    if not rows:
        return
    lines = ["| what | tried | held | tests |", "|---|--:|--:|---|"]
    lines += [
        f"| {what} | {tried:,} | {held:,} | {', '.join(f'`{name}`' for name in sorted(files))} |"
        for what, (tried, held, files) in rows.items()
    ]
    terminalreporter.section("what was promised, tried and held")
    terminalreporter.line("\n".join(lines))
    if config.getoption("--write", False):
        text = GUARANTEES.read_text(encoding="utf-8")
        before, rest = text.split(START)
        GUARANTEES.write_text(before + START + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")
