"""Tables and pictures from the JSONs of bench.quality.run: python -m bench.quality.report [FOLDER] [--out FOLDER]."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.quality.optimizers import OURS
from bench.quality.pictures import draw, draw_rates
from bench.quality.results import is_variant, load, rows_of
from bench.quality.run import OUT
from bench.quality.tables import tables


def main(argv: list[str] | None = None) -> None:
    """Write quality.md, one picture a task, and one a task of the rates of each of ours that is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=OUT)
    parser.add_argument("--out", type=Path, help="default: the same folder")
    parser.add_argument("--rates", nargs="*", default=list(OURS), metavar="NAME", help="draw these one's rates")
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
    plain = {row: of_task for row, of_task in rows.items() if not is_variant(row)}
    for task in found:
        draw(task, plain, out / f"{task}.png")
        for path in (out / f"{task}.png", *draw_rates(task, {row: rows.get(row, {}) for row in args.rates}, out)):
            print("drawn:", path)


if __name__ == "__main__":
    main()
