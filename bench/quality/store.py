"""The files that runs are kept in.

* TASK.csv: one line a run, in the columns below: what a run ended with, no more.
* environments.json: what was installed on what device, each once, by the number that the lines give.
* curves.jsonl: a line for each run that has a curve. `python -m bench.quality.report --thin` drops those that neither
  a picture nor a table needs.

Losses and accuracy are of the weights that are judged (`Trainer.evaluating`). A commit is the one that was checked out
when the run began, with a + where the working tree differed from it; of runs up to November 2026, the one that their
result came with.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.quality.optimizers import Name

OUT = Path(__file__).parents[1] / "results" / "quality"
CURVES, ENVIRONMENTS = "curves.jsonl", "environments.json"
POINTS, CHECKS = 50, 12  # of a run's curve; evaluations after the one at the start, the last at the end
CHECKS_BEFORE = 6  # of runs up to November 2026; twelve include these, and cost as much without the test set
Key = tuple[str, str, int]  # task, name, seed


@dataclass
class Curve:
    """A run's way.

    Attributes:
        seconds: At each point; none where nothing draws them.
        loss: Mean of the mini-batches since the point before.
        checks: The training loss at the start and after each twelfth of the run (`checked`), or where it ended; None
            for NaN. The test set's metrics at the start and the end, until they are thinned out.
        rates: Each layer's rate at each point, of ours.
    """

    seconds: list[float]
    loss: list[float]
    checks: dict[str, list[float | None]]
    rates: dict[str, list[float]]


@dataclass
class Run:
    """A run: its columns in the table, with `name` in two (optimizer, options), and its curve where it has one."""

    task: str
    name: Name
    seed: int
    steps: int  # asked for
    taken: int
    full: bool  # in the GPU's size
    parameters: int
    weight_decay: float
    start: float  # loss before the first step
    train: float
    test: float
    accuracy: float | None  # of the test set; none where targets are no classes
    collapsed: bool  # ended in NaN, or above its start
    seconds: float
    peak_mib: int  # of the process; on CUDA what tensors took
    commit: str
    environment: int
    curve: Curve | None = None

    @property
    def key(self) -> Key:
        return self.task, str(self.name), self.seed


COLUMNS: dict[str, Callable[[str], Any]] = {
    "task": str, "optimizer": str, "options": str, "seed": int, "steps": int, "taken": int, "full": "yes".__eq__,
    "parameters": int, "weight_decay": float, "start": float, "train": float, "test": float,
    "accuracy": lambda text: float(text) if text else None, "collapsed": "yes".__eq__, "seconds": float,
    "peak_mib": int, "commit": str, "environment": int,
}  # fmt: skip


def points(steps: int, count: int | None = None) -> list[int]:
    """The steps that a run's curve has points at, or so many checks."""
    count = POINTS if count is None else count
    return sorted({round(steps * (i + 1) / count) for i in range(count)} - {0})


def checked(run: Run) -> list[int]:
    """The steps of a run's training losses in `checks`, from their number alone.

    A run that was broken off has one where it ended, and those before tell of how many there would have been.
    """
    made = len(run.curve.checks["train"]) - 1
    if run.taken == run.steps:
        return [0, *points(run.steps, made)]
    for count in (CHECKS, CHECKS_BEFORE):
        before = [step for step in points(run.steps, count) if step < run.taken]
        if len(before) == made - 1:
            return [0, *before, run.taken]
    raise ValueError(f"{run.key}: {made} checks in {run.taken} of {run.steps} steps")


def read(path: Path) -> list[Run]:
    """The runs of one task's table, without curves; none where there is no table."""
    if not path.is_file():
        return []
    runs = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            cells = {column: of_text(line[column]) for column, of_text in COLUMNS.items()}
            name = Name.parse(f"{cells.pop('optimizer')}:{cells.pop('options')}")
            runs.append(Run(name=name, **cells))
    return runs


def read_curves(folder: Path) -> dict[Key, Curve]:
    """Every curve; of two of one run (the first was cut short before its line was written) the last."""
    curves = {}
    if (folder / CURVES).is_file():
        for line in (folder / CURVES).read_text().splitlines():
            content = json.loads(line)
            key = content.pop("task"), content.pop("name"), content.pop("seed")
            curves[key] = Curve(**content)
    return curves


def read_all(folder: Path) -> list[Run]:
    """Every run with its curve."""
    curves = read_curves(folder)
    runs = [run for path in sorted(folder.glob("*.csv")) for run in read(path)]
    for run in runs:
        run.curve = curves.get(run.key)
    return runs


def line_of(run: Run) -> str:
    """A run as a line of its table: 7 digits, which change no table's text."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)

    optimizer, _, options = str(run.name).partition(":")
    cells = {**vars(run), "optimizer": optimizer, "options": options}
    csv.writer(line := io.StringIO(), lineterminator="\n").writerow(text(cells[column]) for column in COLUMNS)
    return line.getvalue()


def curve_line(key: Key, curve: Curve) -> str:
    """A curve as a line of JSON: 6 digits of what tables at equal wall-clock are made of, 4 of the rest."""

    def short(values: list[float], digits: int) -> list[float | None]:
        return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]

    content: dict[str, Any] = dict(zip(("task", "name", "seed"), key, strict=True))
    content |= {"seconds": short(curve.seconds, 6), "loss": short(curve.loss, 6)}
    content |= {part: {k: short(v, 4) for k, v in getattr(curve, part).items()} for part in ("checks", "rates")}
    return json.dumps(content, separators=(",", ":")) + "\n"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder to oneself: the lock is on the folder itself, leaves no file, and ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write(path: Path, line: str) -> None:
    """Append in one system call: there whole or not at all, also where the process is killed."""
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def environments(folder: Path) -> dict[str, dict[str, str]]:
    """What runs were made in, by number."""
    path = folder / ENVIRONMENTS
    return json.loads(path.read_text()) if path.is_file() else {}


def number_of(folder: Path, environment: dict[str, str]) -> int:
    """An environment's number, given to it here where it is new."""
    known = environments(folder)
    for number, other in known.items():
        if other == environment:
            return int(number)
    known[str(number := len(known) + 1)] = environment
    replace(folder / ENVIRONMENTS, json.dumps(known, indent=1) + "\n")
    return number


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def add(folder: Path, run: Run, environment: dict[str, str]) -> bool:
    """Append a run, unless it is there by now; gives it its environment's number.

    Several processes may be at work in one folder, and each must see what the others have written before it numbers an
    environment or appends: hence a lock, and not only lines that are written at once. The line in the table comes
    last: what was cut short before has left nothing that is taken for a run.

    Returns:
        Whether it was not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.task}.csv"
    with locked(folder):
        if run.key in {other.key for other in read(path)}:
            return False
        run.environment = number_of(folder, environment)
        if run.curve is not None:
            write(folder / CURVES, curve_line(run.key, run.curve))
        write(path, ("" if path.is_file() else ",".join(COLUMNS) + "\n") + line_of(run))
    return True


def thin(folder: Path, curves: set[Key], seconds: set[Key], rates: set[Key]) -> None:
    """Drop all curves but these; seconds and the layers' rates of all but those; metrics of the test set."""
    with locked(folder):
        kept = {key: curve for key, curve in read_curves(folder).items() if key in curves | seconds | rates}
        for key, curve in kept.items():
            curve.seconds = curve.seconds if key in seconds else []
            curve.rates = curve.rates if key in rates else {}
            curve.checks = {metric: values for metric, values in curve.checks.items() if metric == "train"}
        replace(folder / CURVES, "".join(curve_line(key, kept[key]) for key in sorted(kept)))
