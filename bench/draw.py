"""Draw what test_step.py and test_scaling.py have measured: python bench/draw.py FILE.json [...] --out FOLDER."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from told import OURS, load, name_of, where

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROUTES = {"autograd": "backward", "finite differences": "closure"}  # of opt.backward(loss) and opt.step(closure)
PARTS = {"forward and backward": "0.75", "curvature": "C1", "rates": "C2", "update": "C0"}


def draw_step(benchmarks: list[dict], device: str, path: Path) -> None:
    """The mean step's ratio for each model and route, and what a measuring step is made of.

    Not MuonLW's: on the MLP it would dwarf all others.
    """
    benchmarks = [b for b in benchmarks if not b["case"].startswith("Muon")]
    cases = list(dict.fromkeys(b["case"] for b in benchmarks))
    models = list(dict.fromkeys(b["workload"] for b in benchmarks))
    found = {(b["workload"], b["case"]): b for b in benchmarks}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    width = 0.8 / len(cases)
    for c, case in enumerate(cases):
        places = [m + (c - (len(cases) - 1) / 2) * width for m in range(len(models))]
        mean = [found[model, case]["ratio_mean"] for model in models]
        ordinary = [found[model, case]["ratio"] for model in models]
        left.bar(places, mean, width * 0.92, color=f"C{c}", label=name_of(case, ROUTES))
        left.plot(places, ordinary, "k_", markersize=11, label="ordinary step alone" if c == 0 else None)
        bottom = [0.0] * len(models)
        for part, colour in PARTS.items():
            height = [found[model, case]["parts"].get(part, 0.0) for model in models]
            label = part if c == 0 else None
            right.bar(places, height, width * 0.92, bottom=bottom, color=colour, edgecolor="white", lw=0.5, label=label)
            bottom = [b + h for b, h in zip(bottom, height, strict=True)]
        for place, top in zip(places, bottom, strict=True):
            right.text(place, top + 0.05, name_of(case, ROUTES), rotation=90, ha="center", va="bottom", fontsize=7)
    for axes, title in (
        (left, "mean of the first 500 steps / torch's fused step"),
        (right, "a step that measures / torch's fused step"),
    ):
        axes.set(xticks=range(len(models)), xticklabels=models, title=title)
        axes.axhline(1, color="black", lw=0.8, ls=":")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(0, max(b["ratio_mean"] for b in benchmarks) * 1.3)
    right.set_ylim(0, right.get_ylim()[1] * 1.55)
    left.legend(fontsize=8, ncols=3, loc="upper left")
    right.legend(fontsize=8, ncols=2, loc="upper left")
    figure.suptitle(device, fontsize=9)
    figure.savefig(path, dpi=130)


LABELS = {"width": "columns of one layer of 64 rows", "depth": "layers, of 2 million parameters together"}


def draw_scaling(benchmarks: list[dict], device: str, path: Path) -> None:
    """Time and memory of both sides over a layer's width, and over depth at equal parameters."""
    axes_of = [axis for axis in LABELS if any(b["axis"] == axis for b in benchmarks)]
    figure, axes = plt.subplots(2, len(axes_of), figsize=(5.5 * len(axes_of), 7), layout="constrained", squeeze=False)
    for column, axis in enumerate(axes_of):
        time, memory = axes[:, column]
        for c, rule in enumerate(("AdamW", "SGD-m")):
            mine = [b for b in benchmarks if b["axis"] == axis and b["case"].startswith(rule)]
            sizes = [b["size"] for b in mine]
            theirs = [b["theirs_median"] * 1e3 for b in mine]
            ours = [t * b["ratio_mean"] for t, b in zip(theirs, mine, strict=True)]
            time.plot(sizes, ours, f"C{c}o-", ms=4, label=f"{OURS[rule]}, mean of 500 steps")
            time.plot(sizes, theirs, f"C{c}x--", ms=4, label=f"torch's fused {rule}")
            for key, style, label in (
                ("peak_bytes_measuring", "^:", f"{OURS[rule]}, measuring"),
                ("peak_bytes", "o-", f"{OURS[rule]}, ordinary"),
                ("theirs_peak_bytes", "x--", f"torch's {rule}"),
            ):
                memory.plot(sizes, [b[key] / 2**20 for b in mine], f"C{c}{style}", ms=4, label=label)
        time.set(ylabel="ms a step", yscale="log")
        memory.set(ylabel="MiB of a step\nbeyond parameters and state", xlabel=LABELS[axis])
        if axis == "width":
            memory.set_yscale("log")
        else:
            memory.set_ylim(bottom=0)
        for a in (time, memory):
            a.set_xscale("log")
            a.grid(alpha=0.3)
            a.legend(fontsize=8)
            a.spines[["top", "right"]].set_visible(False)
    figure.suptitle(device, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Draw each kind of result that the files hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), metavar="FOLDER")
    arguments = parser.parse_args()
    for file in arguments.files:
        content, benchmarks = load(file)
        benchmarks = [b["extra_info"] for b in benchmarks if "ratio_mean" in b["extra_info"]]
        scaling = [b for b in benchmarks if "axis" in b]
        steps = [b for b in benchmarks if "axis" not in b]
        for name, found, draw in (("step", steps, draw_step), ("scaling", scaling, draw_scaling)):
            if found:
                path = arguments.out / f"{name}.png"
                draw(found, where(content), path)
                print("drawn:", path)


if __name__ == "__main__":
    main()
