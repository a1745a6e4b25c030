"""What the demo shows: a progress bar while it trains, then a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

matplotlib.use("Agg")  # draws into files only: there may be no display
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from lwas_fast import plot_rates  # noqa: E402

# Blue and orange keep their distance for the colour-blind and in grey.
COLOURS = ("#0b5fa5", "#e07b00")
ADAMW_RATE = 1e-3
CONSOLE = Console(highlight=False)


@dataclass
class Run:
    """What was measured while and after training with one optimizer."""

    name: str
    losses: list[float] = field(default_factory=list)  # of each step's batch, before that step
    rates: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (step, of each layer)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)  # diagnostics of each
    seconds: float = 0.0
    train_loss: float = float("nan")
    test_loss: float = float("nan")
    test_accuracy: float = float("nan")

    def add_step(self, loss: float, seconds: float) -> None:
        """Record a step."""
        self.losses.append(loss)
        self.seconds += seconds

    def add_rates(self, rates: dict[str, float], layers: dict[str, dict[str, float]]) -> None:
        """Record the layers' rates at the step that was recorded last, and what else is known of them."""
        self.rates.append((len(self.losses) - 1, rates))
        self.layers = layers

    def smooth_losses(self) -> list[float]:
        """Average the losses exponentially over about 20 steps, without the bias to the first one."""
        keep, total, weight, smooth = 0.95, 0.0, 0.0, []
        for loss in self.losses:
            total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
            smooth.append(total / weight)
        return smooth

    def status(self) -> str:
        """Say where training stands: the loss of the last steps and the spread of the rates."""
        recent = self.losses[-20:]
        text = f"loss {sum(recent) / len(recent):.3f}"
        if self.rates:
            latest = self.rates[-1][1].values()
            text += f", rates {min(latest):.0e} to {max(latest):.0e}"
        return text


class Bars:
    """A progress bar for each run, and a table of the layers; with no terminal, a line at each quarter instead."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=CONSOLE,
            expand=True,
        )
        self.live = Live(self.bars, console=CONSOLE)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        if CONSOLE.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.stop()

    def advance(self, run: Run) -> None:
        """Show that `run` is one step further."""
        done = len(run.losses)
        if run.name not in self.tasks:
            self.tasks[run.name] = self.bars.add_task(run.name, total=self.steps, status="")
        self.bars.update(self.tasks[run.name], completed=done, status=run.status())
        if run.layers:
            self.live.update(Group(self.bars, table_of(run.layers)))
        if not CONSOLE.is_terminal and done % max(1, self.steps // 4) == 0:
            say(f"{run.name}: step {done} of {self.steps}, {run.status()}")


def table_of(layers: dict[str, dict[str, float]]) -> Table:
    """What an optimizer's diagnostics tell of each layer."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer")
    for head in ("measured rate", "applied", "descent", "curvature", "measurements", "capped steps"):
        table.add_column(head, justify="right")
    for name, row in layers.items():
        numbers = [f"{row[key]:.2e}" for key in ("rate", "applied", "descent", "curvature")]
        table.add_row(name, *numbers, f"{row['refreshes']:.0f}", f"{row['capped']:.0f}")
    return table


def say(text: str) -> None:
    """Print a paragraph."""
    CONSOLE.print(text, soft_wrap=not CONSOLE.is_terminal)


def print_table(runs: Sequence[Run], what: str, where: str) -> None:
    """Print what was measured, and what one step cost beside the other."""
    table = Table(title=what, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for head in ("test accuracy", "test loss", "train loss", "seconds", "ms/step"):
        table.add_column(head, justify="right")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.test_accuracy:.2%}",
            f"{run.test_loss:.4f}",
            f"{run.train_loss:.4f}",
            f"{run.seconds:.1f}",
            f"{1e3 * run.seconds / len(run.losses):.1f}",
        )
    CONSOLE.print(table)
    ours, theirs = runs
    say(
        f"Losses are cross-entropy after training, with BatchNorm's running statistics. Time is that of the "
        f"steps alone, on {where}: {ours.name} took {ours.seconds / theirs.seconds:.2f} times as long as "
        f"{theirs.name}, curvature included. One seed: a look, not a benchmark."
    )


def draw(runs: Sequence[Run], what: str, out: Path) -> None:
    """Draw the losses of all runs, and each layer's rate in those that have rates."""
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for run, colour in zip(runs, COLOURS, strict=True):
            left.plot(run.losses, color=colour, alpha=0.15, linewidth=0.8)
            left.plot(run.smooth_losses(), color=colour, linewidth=1.8, label=run.name)
        _finish(left, "training loss (batch, smoothed)")
        left.set_ylim(0, 1.05 * max(max(run.smooth_losses()[10:], default=1) for run in runs))
        for run in runs:
            plot_rates(run.rates, right)
        right.axhline(ADAMW_RATE, color=COLOURS[1], linestyle="--", linewidth=1.2, label="AdamW's 1e-3")
        _finish(right, "measured rate of each layer (log scale)", loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.suptitle(what, fontsize=10)
        figure.savefig(out, dpi=130)
        plt.close(figure)


def _finish(axes: Axes, title: str, **legend: Any) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, **legend)
