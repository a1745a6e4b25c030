"""Pictures of the training-quality suite: loss over steps and seconds, and the rates of ours."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from bench.quality.optimizers import OURS
from bench.quality.results import Rows

OUR_COLOURS = ("black", "crimson", "dimgray", "orangered", "darkviolet", "teal")


def draw(task: str, rows: Rows, path: Path) -> None:
    """The training loss of a task over steps and over seconds: the seeds' mean, and each seed faintly."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.8), layout="constrained", sharey=True)
    shown = {row: of_task[task] for row, of_task in rows.items() if task in of_task}
    our = -1
    for number, (row, runs) in enumerate(shown.items()):
        ours = runs[0]["base"] in OURS
        colour = OUR_COLOURS[(our := our + 1) % len(OUR_COLOURS)] if ours else plt.get_cmap("tab20")(number % 20)
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
    for panel in axes:
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    first = next(iter(shown.values()))[0]
    figure.suptitle(f"{task}: {first['about']} ({first['environment']['device']})", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="layer, first to last")
        drawn.append(folder / f"{task}-{row.replace(':', '_').replace(',', '_')}-rates.png")
        figure.savefig(drawn[-1], dpi=130)
        plt.close(figure)
    return drawn
