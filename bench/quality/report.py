"""Tables and pictures from the JSONs of bench.quality.run: python -m bench.quality.report [FOLDER] [--out FOLDER]."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.quality.optimizers import OURS
from bench.quality.pictures import draw, draw_costs, draw_rates
from bench.quality.results import is_variant, load, rows_of
from bench.quality.run import OUT
from bench.quality.tables import tables


def main(argv: list[str] | None = None) -> None:
    """Write quality.md; draw each task's losses, the rates of each of ours that is asked for, and what T costs."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=OUT)
    parser.add_argument("--out", type=Path, help="default: the same folder")
    parser.add_argument("--rates", nargs="*", default=list(OURS), metavar="NAME", help="draw these one's rates")
    parser.add_argument(
        "--draw", nargs="*", metavar="ROW", help="draw these rows' losses; default: all without options"
    )
    args = parser.parse_args(argv)
    try:
        found = load(args.folder)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    rows = rows_of(found)
    asked = [*(args.draw or ()), *(name for name in args.rates if name not in OURS)]
    if unknown := sorted(set(asked) - set(rows)):
        parser.exit(1, f"error: no row is named {', '.join(unknown)}; there are {', '.join(rows)}\n")
    out = args.out or args.folder
    out.mkdir(parents=True, exist_ok=True)
    text = tables(found)
    (out / "quality.md").write_text(text)
    print(text)
    shown = {r: of_task for r, of_task in rows.items() if (r in args.draw if args.draw else not is_variant(r))}
    for task in found:
        drawn = draw(task, shown, out / f"{task}.png")
        drawn += draw_rates(task, {row: rows.get(row, {}) for row in args.rates}, out)
        for ours in OURS:
            drawn += draw_costs(task, ours, rows, out / f"{task}-{ours}-costs.png")
        for path in drawn:
            print("drawn:", path)


if __name__ == "__main__":
    main()
