"""Tables and pictures from the JSONs of bench.quality.run: python -m bench.quality.report [FOLDER] [--out FOLDER].

Of optimizers that are swept the best rate is taken for each task and schedule: the one of lowest mean final training
loss over the seeds, of those run on the most seeds (a sweep on one seed may be followed by its best rates on more). It
is chosen on runs that are shown, which favours it a little.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from bench.quality.optimizers import OURS, PARAMETER_FREE, RULES, SCHEDULES, SWEPT, SWEPT_WITH
from bench.quality.run import OUT
from bench.quality.tasks import EVERY_TASK

METRICS = {
    "train": "Final training loss, on a fixed subset in eval mode (lower is better)",
    "test": "Final test loss (lower is better)",
    "accuracy": "Final test accuracy, % (higher is better)",
    "seconds": "Seconds of training",
}
OUR_COLOURS = ("black", "crimson", "dimgray", "orangered", "darkviolet", "teal")
Runs = list[dict]  # of one task and optimizer, over the seeds
Rows = dict[str, dict[str, Runs]]  # row -> task -> runs


def load(folder: Path) -> dict[str, dict[str, Runs]]:
    """Read every run.

    Returns:
        Task -> optimizer -> runs by seed.

    Raises:
        FileNotFoundError: There are none.
        ValueError: Runs of one task differ in length or size, and cannot be compared.
    """
    found: dict[str, dict[str, Runs]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*/*-seed*.json")):
        run = json.loads(path.read_text())
        found[run["task"]][run["optimizer"]].append(run)
    if not found:
        raise FileNotFoundError(f"{folder} holds no runs: python -m bench.quality.run makes them")
    for task, optimizers in found.items():
        if len(sizes := {(run["steps"], run["full"]) for runs in optimizers.values() for run in runs}) > 1:
            raise ValueError(f"{task}: runs of different sizes (steps, full): {sorted(sizes)}")
        for runs in optimizers.values():
            runs.sort(key=lambda run: run["seed"])
    return {name: found[name] for name in EVERY_TASK if name in found}


def final(run: dict, metric: str) -> float:
    """A metric at the end of a run; NaN where it was not finite or the task has none."""
    value = run["seconds"] if metric == "seconds" else run["evaluations"][-1].get(metric)
    return math.nan if value is None else value * (100 if metric == "accuracy" else 1)


def mean_loss(runs: Runs) -> float:
    """What a rate is chosen by: the mean final training loss, infinite where a run collapsed."""
    return math.inf if any(run["collapsed"] for run in runs) else statistics.fmean(final(r, "train") for r in runs)


def best_rate(candidates: list[Runs]) -> Runs:
    """The runs of the best rate; where every rate has a collapse, of the one with the fewest."""
    most = max(map(len, candidates))
    whole = [runs for runs in candidates if len(runs) == most]
    best = min(whole, key=lambda runs: (mean_loss(runs), sum(run["collapsed"] for run in runs)))
    rate = f"lr {best[0]['options']['lr']:g}, best of {len(candidates)}"
    return [{**run, "rate": rate} for run in best]


def rows_of(found: dict[str, dict[str, Runs]]) -> Rows:
    """The rows of the tables in their order: swept, parameter-free, others, ours."""
    rows: Rows = defaultdict(dict)
    for task, optimizers in found.items():
        swept: dict[str, list[Runs]] = defaultdict(list)
        for name, runs in optimizers.items():
            options = runs[0]["options"]
            if runs[0]["base"] in SWEPT and set(options) <= SWEPT_WITH and "lr" in options:
                swept[f"{runs[0]['base']}, best {options.get('schedule', 'constant')}"].append(runs)
            else:
                rows[name][task] = runs
        for row, candidates in swept.items():
            rows[row][task] = best_rate(candidates)
    first = [f"{base}, best {schedule}" for base in SWEPT for schedule in SCHEDULES]
    bases = [*SWEPT, *PARAMETER_FREE, *(b for b in RULES if b not in (*SWEPT, *PARAMETER_FREE, *OURS)), *OURS]

    def place(row: str) -> tuple[int, str]:
        return (first.index(row) if row in first else 10 + bases.index(row.partition(":")[0]), row)

    return {row: rows[row] for row in sorted(rows, key=place)}


def cell(runs: Runs, metric: str) -> str:
    """Mean, standard error over seeds, the swept rate, and how many runs collapsed.

    A run that ended in NaN has no final loss and is not in the mean; the cell says that it collapsed.
    """
    values = [value for run in runs if math.isfinite(value := final(run, metric))]
    collapsed = sum(run["collapsed"] for run in runs)
    if not values:
        return f"({collapsed}/{len(runs)} collapsed)" if collapsed else ""
    digits = 1 if metric in ("accuracy", "seconds") else 4
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"
    text += f" ({rate})" if (rate := runs[0].get("rate")) else ""
    return text + (f" ({collapsed}/{len(runs)} collapsed)" if collapsed else "")


def tables(found: dict[str, dict[str, Runs]]) -> str:
    """All tables in Markdown."""
    rows = rows_of(found)
    every = [run for optimizers in found.values() for runs in optimizers.values() for run in runs]
    environments = {tuple((run["environment"][k]) for k in ("device", "torch", "threads")) for run in every}
    where = "; ".join(
        f"{device}, torch {torch}, CPU threads: {threads}" for device, torch, threads in sorted(environments)
    )
    seeds = sorted({len(runs) for of_task in rows.values() for runs in of_task.values()})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    lines = [f"Mean ± standard error over seeds ({span} a cell; {where})."]
    lines.append("The best rate of a sweep is the one of lowest mean final training loss on these same runs.")
    sizes = [next(iter(optimizers.values()))[0] for optimizers in found.values()]
    lines += ["", *(f"- {r['task']}: {r['about']}; {r['steps']} steps, {r['parameters']} weights" for r in sizes)]
    for metric, title in METRICS.items():
        measured = {run["task"] for run in every if metric == "seconds" or metric in run["evaluations"][-1]}
        tasks = [task for task in found if task in measured]
        if not tasks:
            continue
        lines += ["", f"## {title}", "", "| optimizer | " + " | ".join(tasks) + " | collapsed |"]
        lines.append("|---" * (len(tasks) + 2) + "|")
        for row, of_task in rows.items():
            cells = [cell(of_task[task], metric) if task in of_task else "" for task in tasks]
            runs = [run for task in tasks for run in of_task.get(task, [])]
            count = f"{sum(run['collapsed'] for run in runs)} of {len(runs)}"
            lines.append(f"| {row} | " + " | ".join(cells) + f" | {count} |")
    return "\n".join(lines) + "\n"


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


def main(argv: list[str] | None = None) -> None:
    """Write quality.md, one picture a task, and one of the rates of each of ours."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=OUT)
    parser.add_argument("--out", type=Path, help="default: the same folder")
    args = parser.parse_args(argv)
    try:
        found = load(args.folder)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    out = args.out or args.folder
    out.mkdir(parents=True, exist_ok=True)
    text = tables(found)
    (out / "quality.md").write_text(text)
    print(text)
    rows = rows_of(found)
    for task in found:
        draw(task, rows, out / f"{task}.png")
        for path in (out / f"{task}.png", *draw_rates(task, rows, out)):
            print("drawn:", path)


if __name__ == "__main__":
    main()
