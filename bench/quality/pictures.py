"""Pictures of the training-quality suite: loss over steps and seconds, the rates of ours, and what measuring costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.quality.optimizers import OURS
from bench.quality.results import Rows, Runs, final, standard_error
from bench.quality.store import points
from bench.quality.tables import label, rate_of
from bench.quality.tasks import EVERY_TASK

OUR_COLOURS = ("black", "crimson", "dimgray", "orangered", "darkviolet", "teal")
OTHERS = [plt.get_cmap("tab20")(i) for i in range(20) if i not in (6, 7, 14, 15)]  # no red and no grey: ours
Draw = Callable[[str, dict[str, Runs], Path, str], bool]


def save(figure: Figure, path: Path) -> bool:
    """Finish a figure's axes, write and close it."""
    for axes in figure.axes:
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def draw_losses(task: str, rows: dict[str, Runs], path: Path, where: str) -> bool:
    """The training loss of a task over steps and over seconds: the seeds' mean, and each seed faintly."""
    shown = {
        row: kept
        for row, runs in rows.items()
        if (kept := [run for run in runs if run.curve is not None and run.curve.seconds])
    }
    if not shown:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.8), layout="constrained", sharey=True)
    our = -1
    for number, (row, runs) in enumerate(shown.items()):
        ours = runs[0].name.base in OURS
        colour = OUR_COLOURS[(our := our + 1) % len(OUR_COLOURS)] if ours else OTHERS[number % len(OTHERS)]
        style = {"color": colour, "lw": 2.4 if ours else 1.3, "ls": "-" if ours else "--"}
        name = label(row).replace("*", "") + (f" ({rate})" if (rate := rate_of(runs[0])) else "")
        losses = [run.curve.loss for run in runs]
        shared = min(map(len, losses))
        for panel, times in zip(
            axes, ([points(run.steps) for run in runs], [run.curve.seconds for run in runs]), strict=True
        ):
            if len(runs) > 1:
                for x, y in zip(times, losses, strict=True):
                    panel.plot(x[: len(y)], y, color=colour, lw=0.5, alpha=0.4)
            x, y = ([statistics.fmean(of[i] for of in values) for i in range(shared)] for values in (times, losses))
            panel.plot(x, y, **style, label=name)
    starts = [run.start for runs in shown.values() for run in runs]
    low = min((v for runs in shown.values() for run in runs for v in run.curve.loss if v > 0), default=1.0)
    axes[0].set(xlabel="steps", ylabel="loss of training batches (mean of a 50th of the run)", yscale="log")
    axes[0].set_ylim(low * 0.95, 1.3 * max(*starts, low))  # what diverges leaves the picture
    axes[1].set(xlabel="seconds of training")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(f"{task}: {EVERY_TASK[task].about} ({where})", fontsize=10)
    return save(figure, path)


def draw_rates(task: str, rows: dict[str, Runs], path: Path, where: str) -> bool:
    """Each layer's rate over the steps, of the first row and seed that has them."""
    having = [(row, run) for row, runs in rows.items() for run in runs if run.curve is not None and run.curve.rates]
    if not having:
        return False
    row, run = having[0]
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for number, (layer, rates) in enumerate(run.curve.rates.items()):
        colour = plt.get_cmap("viridis")(number / len(run.curve.rates))
        axes.plot(points(run.steps)[: len(rates)], rates, color=colour, label=layer)
    title = f"{task}: {label(row).replace('*', '')}, seed {run.seed} ({where})"
    axes.set(xlabel="steps", ylabel="measured rate", yscale="log", title=title)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="layer, first to last")
    return save(figure, path)


def draw_costs(task: str, rows: dict[str, Runs], path: Path, where: str) -> bool:
    """Accuracy, or where the task has none the training loss, at the end over the seconds, by `update_every`.

    One point for each interval, with the standard errors of its seeds; nothing where fewer than three were run.
    """
    of = {}
    for runs in rows.values():
        options = dict(runs[0].name.options)
        if runs[0].name.base == "adamwlw" and set(options) <= {"update_every"}:
            of[f"T={options['update_every']}" if options else "default"] = runs
    if len(of) < 3:
        return False
    metric = "train" if next(iter(of.values()))[0].accuracy is None else "accuracy"
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for name, runs in of.items():
        values = [[final(run, key) for run in runs] for key in ("seconds", metric)]
        (x, y), errors = (statistics.fmean(v) for v in values), [standard_error(v) for v in values]
        axes.errorbar(x, y, *reversed(errors), fmt="o", color="crimson" if name == "default" else "black", capsize=3)
        axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points")
    what = "test accuracy, %" if metric == "accuracy" else "training loss"
    title = f"{task}: AdamWLW by update_every (T) ({where})"
    axes.set(xlabel="seconds of training", ylabel=what, title=title)
    return save(figure, path)


SWEPT_ROWS = (
    "adamw, best constant", "adamw, best cosine", "sgd, best constant", "sgd, best cosine", "sf_adamw, best constant",
)  # fmt: skip
PICTURES: dict[str, tuple[Draw, str, tuple[str, ...]]] = {  # of docs/images, each with its task and rows
    "quality-resnet.png": (draw_losses, "resnet", (*SWEPT_ROWS, "prodigy", *OURS)),
    "quality-ae_curves.png": (draw_losses, "ae_curves", (*SWEPT_ROWS, "kfac, best constant", "prodigy", *OURS)),
    "quality-gcn-rates.png": (draw_rates, "gcn", ("adamwlw",)),
}


def rows_at(task: str, rows: Rows, names: tuple[str, ...] | None = None) -> dict[str, Runs]:
    """The rows of a task, all or these, in this order."""
    return {name: rows[name][task] for name in names or rows if task in rows.get(name, {})}
