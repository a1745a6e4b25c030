"""Tables and pictures from what bench.quality.run has written.

python -m bench.quality.report              write the tables of README.md and docs/*.md, where their markers stand
python -m bench.quality.report --check      write nothing; tell what differs, and exit with 1 where something does
python -m bench.quality.report --pictures   draw docs/images/quality-*.png
python -m bench.quality.report --thin       drop the curves that no table and no picture needs, before committing
python -m bench.quality.report FOLDER       print all tables of another folder; with --out, pictures as well
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from bench.quality import pages, steps, store
from bench.quality.pictures import PICTURES, draw_costs, draw_losses, draw_rates, rows_at
from bench.quality.results import Found, Rows, is_variant, load, rows_of, without_variants
from bench.quality.tables import text_of

OTHER_PICTURES = """
the other pictures of docs/images:
  step.png, scaling.png   python bench/draw.py bench/results/step-cpu.json bench/results/scaling-cpu.json
  demo.png                make demo
  convergence.png         python -m bench.convergence --out docs/images/convergence.png
  trace.png               python bench/profile_step.py VGG16-BN --trace out --draw docs/images/trace.png
"""


def where(folder: Path) -> str:
    """What the runs were made on."""
    told = {f"{e['device']}, torch {e['torch']}, threads: {e['threads']}" for e in store.environments(folder).values()}
    return "; ".join(sorted(told))


def write_pages(root: Path, found: Found, check: bool) -> bool:
    """Write what is stale, or tell of it.

    Returns:
        Whether anything was.
    """
    different = pages.stale(root, pages.tables(found, root / "bench" / "results"))
    for path, (text, new) in different.items():
        name = str(path.relative_to(root))
        if check:
            lines = (part.splitlines(keepends=True) for part in (text, new))
            sys.stdout.writelines(difflib.unified_diff(*lines, name, f"{name}, written anew", n=0))
        else:
            path.write_text(new)
            print("written:", name)
    return bool(different)


def thin(folder: Path, rows: Rows) -> None:
    """Drop the curves that no table and no picture of the docs needs, and of the others what only pictures need."""
    curves = {run.key for of_task in without_variants(rows).values() for runs in of_task.values() for run in runs}
    seconds, rates = set(), set()
    for draw, task, names in PICTURES.values():
        keys = {run.key for runs in rows_at(task, rows, names).values() for run in runs}
        seconds |= keys if draw is draw_losses else set()
        rates |= keys if draw is draw_rates else set()
    store.thin(folder, curves, seconds, rates)


def draw_all(folder: Path, found: Found, rows: Rows, asked: list[str], out: Path) -> None:
    """Draw each task's losses (of all rows without options, or of those asked for), rates of ours, and what T costs."""
    names = tuple(asked or (row for row in rows if not is_variant(row)))
    for task in found:
        shown = rows_at(task, rows, names)
        drawn = {f"{task}.png": (draw_losses, shown), f"{task}-costs.png": (draw_costs, rows_at(task, rows))}
        for row, runs in shown.items():
            drawn[f"{task}-{runs[0].name.file}-rates.png"] = (draw_rates, {row: runs})
        for name, (draw, of) in drawn.items():
            if draw(task, of, out / name, where(folder)):
                print("drawn:", out / name)


def main(argv: list[str] | None = None, root: Path = pages.ROOT) -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.report", description=__doc__, epilog=OTHER_PICTURES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, nargs="?", help=f"of runs; default: {store.OUT.relative_to(pages.ROOT)}")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--thin", action="store_true")
    parser.add_argument("--out", type=Path, metavar="PICTURES", help="draw all tasks of FOLDER here, and quality.md")
    parser.add_argument("--draw", nargs="*", default=[], metavar="ROW", help="these rows; default: all without options")
    args = parser.parse_args(argv)
    folder = args.folder or store.OUT
    try:
        found = load(folder)
        rows = rows_of(found)
        if unknown := sorted(set(args.draw) - set(rows)):
            raise ValueError(f"no row is named {', '.join(unknown)}; there are {', '.join(rows)}")
        if args.thin:
            thin(folder, rows)
        elif args.pictures:
            for name, (draw, task, names) in PICTURES.items():
                path = root / "docs" / "images" / name
                draw(task, rows_at(task, rows, names), path, where(folder))
                print("drawn:", path)
        elif args.folder or args.out:
            print(text := text_of(found, where(folder)) + steps.text_of(found))
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "quality.md").write_text(text)
                draw_all(folder, found, rows, args.draw, args.out)
        else:
            if write_pages(root, found, args.check) and args.check:
                sys.exit(1)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
