"""The pages' tables: which they are, and how they come to stand in README.md and docs/*.md.

A table stands between <!-- table: NAME --> and <!-- end of table -->, each alone on its line. What is between is
written by `python -m bench.quality.report` and by nobody else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bench.quality import costs, published, steps
from bench.quality.optimizers import OURS
from bench.quality.results import Found, rows_of, without_variants
from bench.quality.schedules import SCHEDULES
from bench.quality.tables import against, equal_time, finals, sizes, variants

ROOT = Path(__file__).parents[2]
MAIN = (
    "cnn", "mlp", "few", "ae_fashion", "ae_curves", "ae_faces", "transformer", "lstm", "gcn", "vgg11", "resnet",
)  # fmt: skip
MORE = ("mlp_32", "mlp_512", "mlp_1024", "masked", "vgg16", "vit", "gpt", "bn", "mixer")
HEADLINE = {  # the tasks of steps to the same loss, which are in the order of the worst
    "cnn": "CNN, Fashion-MNIST",
    "mlp": "MLP, Fashion-MNIST",
    "few": "CNN, 1000 images",
    "ae_fashion": "autoencoder, Fashion-MNIST",
    "ae_curves": "autoencoder, curves",
    "ae_faces": "autoencoder, faces",
    "transformer": "transformer, characters",
    "masked": "transformer, masked characters",
    "vit": "ViT, CIFAR-10",
    "lstm": "LSTM, characters",
    "gcn": "GCN, Cora",
    "vgg11": "VGG11, CIFAR-10",
    "resnet": "ResNet-8, CIFAR-10",
    "gpt": "transformer, tied, 3000 steps",
    "bn": "ResNet-8, wide, 3000 steps",
    "mixer": "MLP-Mixer, 3000 steps",
}
ADAMW = tuple(f"adamw, best {schedule}" for schedule in SCHEDULES)
SCHEDULE_FREE, MUON = ({kind: steps.RIVALS["muonlw"][kind]} for kind in ("Schedule-Free", "Muon"))


def tables(found: Found, results: Path) -> dict[str, Callable[[], list[str]]]:
    """Every table by its name in the pages."""
    rows = rows_of(found)
    plain = without_variants(rows)
    short = {row: plain[row] for row in (*ADAMW, *OURS) if row in plain}
    return {
        "results": lambda: steps.table("muonlw", plain, HEADLINE),
        "steps schedule-free": lambda: steps.table("muonlw", plain, HEADLINE, SCHEDULE_FREE),
        "steps muon": lambda: steps.table("muonlw", plain, HEADLINE, MUON),
        "steps adamwlw": lambda: steps.table("adamwlw", plain, HEADLINE),
        "steps sgdlw": lambda: steps.table("sgdlw", plain, HEADLINE),
        "costs": lambda: costs.short(results / "step-cpu.json"),
        "step": lambda: costs.steps(results / "step-cpu.json"),
        "update": lambda: costs.updates(results / "update-cpu.json"),
        "plain": lambda: costs.updates(results / "plain-cpu.json"),
        "step gpu": lambda: costs.steps(results / "step-h200.json"),
        "update gpu": lambda: costs.updates(results / "update-h200.json"),
        "tasks": lambda: sizes(found, MAIN),
        "train": lambda: finals("train", plain, MAIN),
        "accuracy": lambda: finals("accuracy", plain, MAIN),
        "test": lambda: finals("test", plain, [task for task in MAIN if task.startswith("ae_")]),
        "seconds": lambda: finals("seconds", plain, MAIN),
        "against muonlw": lambda: against("muonlw", plain, MAIN),
        "against adamwlw": lambda: against("adamwlw", plain, MAIN),
        "against sgdlw": lambda: against("sgdlw", plain, MAIN),
        "equal time muonlw": lambda: equal_time("muonlw", plain, MAIN),
        "equal time adamwlw": lambda: equal_time("adamwlw", plain, MAIN),
        "equal time sgdlw": lambda: equal_time("sgdlw", plain, MAIN),
        "more tasks": lambda: sizes(found, MORE),
        "more train": lambda: finals("train", short, MORE),
        "more accuracy": lambda: finals("accuracy", short, MORE),
        "more against muonlw": lambda: against("muonlw", short, MORE),
        "more against adamwlw": lambda: against("adamwlw", short, MORE),
        "more against sgdlw": lambda: against("sgdlw", short, MORE),
        "scale adamwlw": lambda: variants("adamwlw", rows, found, lambda options: options == {"times"}),
        "scale sgdlw": lambda: variants("sgdlw:weight_decay=0", rows, found, lambda options: options == {"times"}),
        "published": lambda: published.table(results / "published"),
    }


START, END = "<!-- table: ", "<!-- end of table -->"
TABLE = re.compile(rf"^{START}(.+?) -->\n((?:(?!{START}).)*?)^{END}$", re.MULTILINE | re.DOTALL)


def filled(text: str, made: dict[str, Callable[[], list[str]]]) -> str:
    """A page with its tables written anew.

    Raises:
        ValueError: A marker has no other, or a name is of no table.
    """

    def fill(match: re.Match[str]) -> str:
        if match[1] not in made:
            raise ValueError(f"no table is named {match[1]!r}; there are {', '.join(made)}")
        return "\n".join([f"{START}{match[1]} -->", "", *made[match[1]](), "", END])

    if not text.count(START) == text.count(END) == len(TABLE.findall(text)):
        raise ValueError(f"a marker ({START}NAME -->, {END}) lacks its other")
    return TABLE.sub(fill, text)


def pages(root: Path) -> list[Path]:
    """Where tables may stand."""
    return [path for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if path.is_file()]


def stale(root: Path, made: dict[str, Callable[[], list[str]]]) -> dict[Path, tuple[str, str]]:
    """The pages that are not what they should be: what they are, and should be.

    Raises:
        ValueError: As `filled`, with the page's name.
    """
    found = {}
    for path in pages(root):
        text = path.read_text()
        try:
            new = filled(text, made)
        except ValueError as error:
            raise ValueError(f"{path.relative_to(root)}: {error}") from None
        if new != text:
            found[path] = (text, new)
    return found
