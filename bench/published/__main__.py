"""Train a published workload in its recipe's own setting; what is there already is skipped.

python -m bench.published nanogpt --optimizers adamw,adamwlw --seeds 0-4
python -m bench.published nanogpt --optimizers adamw:lr=3e-3,sf_adamw:lr=1e-2,warmup_steps=100
python -m bench.published gcn --seeds 0-99
python -m bench.published resnet20 --full --optimizers sgd,adamwlw

An optimizer that the recipe names has the recipe's options, but for those given here: `adamw` is nanoGPT's, and
`adamw:lr=3e-3` the same with another rate. All others have their own defaults, and all have the recipe's weight decay,
each in its own kind, and its clipping. Runs are kept as bench/quality/store.py says.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from bench.published.workloads import WORKLOADS, Workload
from bench.quality import store
from bench.quality.optimizers import OURS, Name, parts
from bench.quality.published import by_optimizer
from bench.quality.results import standard_error
from bench.quality.run import add_how, joined, refuse_missing, run_missing

OUT = store.OUT.parent / "published"


def in_recipe(text: str, workload: Workload) -> Name:
    """An optimizer's name with the options that the recipe gives it."""
    base, _, given = text.partition(":")
    has = {part.partition("=")[0] for part in parts(given)}
    own = parts(workload.recipe.get(base, ""))
    return Name.parse(f"{base}:" + ",".join(filter(None, [given, *(o for o in own if o.partition("=")[0] not in has)])))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the workload's task comes as `args.workload`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted({name.removesuffix("_full") for name in WORKLOADS}))
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="default: the recipe's, and ours")
    add_how(parser, OUT)
    args = parser.parse_args(argv)
    name = args.name + "_full" * args.full
    if name not in WORKLOADS:
        parser.error(f"{args.name} is for {'a CPU: leave out' if args.full else 'a GPU: add'} --full")
    args.workload = workload = WORKLOADS[name]
    try:
        args.optimizers = [in_recipe(text, workload) for text in joined(args.optimizers or [*workload.recipe, *OURS])]
    except ValueError as error:
        parser.error(str(error))
    refuse_missing(parser, args.optimizers)
    return args


def summary(workload: Workload, runs: list[store.Run]) -> list[str]:
    """What is published, and the mean over the seeds of each optimizer; those of lost runs are told apart."""
    lines = [f"{workload.metric}, published: {workload.published:g} ({workload.source})"]
    lines += [f"differs: {workload.differs}"] if workload.differs else []
    for name, of, found in by_optimizer(runs, workload.metric):
        mean = f"{statistics.fmean(found):.4f} ± {standard_error(found):.4f}" if found else "none"
        seconds = statistics.fmean(run.seconds for run in of)
        told = f", {len(of) - len(found)} collapsed" if len(found) < len(of) else ""
        lines.append(f"  {name}: {mean} ({len(of)} seeds{told}; {of[0].steps} steps, {seconds:.0f} s)")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then say what is there."""
    args = parse(argv)
    task = args.workload.task
    every = [(task, name, seed) for seed in args.seeds for name in args.optimizers]
    run_missing(every, {task.name: args.steps or task.steps}, args)
    print("\n".join(summary(args.workload, store.read(args.out / f"{task.name}.csv"))))


if __name__ == "__main__":
    main()
