"""Pictures of the training-quality suite: loss over steps and seconds, the rates of ours, and what measuring costs."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.quality.optimizers import OURS
from bench.quality.results import Rows, final, standard_error

OUR_COLOURS = ("black", "crimson", "dimgray", "orangered", "darkviolet", "teal")
OTHERS = [plt.get_cmap("tab20")(i) for i in range(20) if i not in (6, 7, 14, 15)]  # no red and no grey: ours


def save(figure: Figure, path: Path) -> Path:
    """Finish a figure's axes, write and close it."""
    for axes in figure.axes:
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw(task: str, rows: Rows, path: Path) -> list[Path]:
    """The training loss of a task over steps and over seconds: the seeds' mean, and each seed faintly."""
    shown = {row: of_task[task] for row, of_task in rows.items() if task in of_task}
    if not shown:
        return []
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.8), layout="constrained", sharey=True)
    our = -1
    for number, (row, runs) in enumerate(shown.items()):
        ours = runs[0]["base"] in OURS
        colour = OUR_COLOURS[(our := our + 1) % len(OUR_COLOURS)] if ours else OTHERS[number % len(OTHERS)]
        style = {"color": colour, "lw": 2.4 if ours else 1.3, "ls": "-" if ours else "--"}
        label = f"{row.partition(',')[0]}, {row.split()[-1]}, {rate}" if (rate := runs[0].get("rate")) else row
        curves = [run["curve"] for run in runs]
        shared = min(len(curve["loss"]) for curve in curves)
        for panel, key in zip(axes, ("step", "seconds"), strict=True):
            if len(curves) > 1:
                for curve in curves:
                    panel.plot(curve[key], curve["loss"], color=style["color"], lw=0.5, alpha=0.4)
            mean = {k: [statistics.fmean(c[k][i] for c in curves) for i in range(shared)] for k in (key, "loss")}
            panel.plot(mean[key], mean["loss"], **style, label=label)
    starts = [run["evaluations"][0]["train"] for runs in shown.values() for run in runs]
    low = min((v for runs in shown.values() for run in runs for v in run["curve"]["loss"] if v > 0), default=1.0)
    axes[0].set(xlabel="steps", ylabel="loss of training batches (mean of a 50th of the run)", yscale="log")
    axes[0].set_ylim(low * 0.95, 1.3 * max(*starts, low))  # what diverges leaves the picture
    axes[1].set(xlabel="seconds of training")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    first = next(iter(shown.values()))[0]
    figure.suptitle(f"{task}: {first['about']} ({first['environment']['device']})", fontsize=10)
    return [save(figure, path)]


def draw_rates(task: str, rows: Rows, folder: Path) -> list[Path]:
    """Each layer's rate over the steps, a picture for each of ours that has them; of the first seed."""
    drawn = []
    for row, of_task in rows.items():
        run = of_task[task][0] if task in of_task else {}
        if "rates" not in run:
            continue
        figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
        for number, (layer, rates) in enumerate(run["rates"].items()):
            axes.plot(
                run["curve"]["step"], rates, color=plt.get_cmap("viridis")(number / len(run["rates"])), label=layer
            )
        axes.set(xlabel="steps", ylabel="measured rate", yscale="log", title=f"{task}: {row}, seed {run['seed']}")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="layer, first to last")
        drawn.append(save(figure, folder / f"{task}-{row.replace(':', '_').replace(',', '_')}-rates.png"))
    return drawn


def draw_costs(task: str, base: str, rows: Rows, path: Path) -> list[Path]:
    """Accuracy, or where the task has none the training loss, at the end over the seconds, by `update_every`.

    One point for each interval, with the standard errors of its seeds; nothing where fewer than three were run.
    """
    of = {}
    for of_task in rows.values():
        runs = of_task.get(task, [])
        if runs and runs[0]["base"] == base and set(runs[0]["options"]) <= {"update_every"}:
            of[f"T={runs[0]['options']['update_every']}" if runs[0]["options"] else "default"] = runs
    if len(of) < 3:
        return []
    metric = "accuracy" if "accuracy" in next(iter(of.values()))[0]["evaluations"][-1] else "train"
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for label, runs in of.items():
        values = [[final(run, key) for run in runs] for key in ("seconds", metric)]
        (x, y), errors = (statistics.fmean(v) for v in values), [standard_error(v) for v in values]
        axes.errorbar(x, y, *reversed(errors), fmt="o", color="crimson" if label == "default" else "black", capsize=3)
        axes.annotate(label, (x, y), xytext=(6, 6), textcoords="offset points")
    what = "test accuracy, %" if metric == "accuracy" else "training loss"
    axes.set(xlabel="seconds of training", ylabel=what, title=f"{task}: {base} by update_every (T)")
    return [save(figure, path)]
