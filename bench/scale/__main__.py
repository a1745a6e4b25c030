"""What a run on many ranks costs with FSDP2, by arithmetic: nothing of this was measured on a cluster.

Layers, messages, memory and the schedule are the package's own, recorded from steps of models on the meta device; only
the seconds come from constants, which are options.

python -m bench.scale --models 7B --ranks 8,64
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NamedTuple

from bench.scale.cost import LOGITS, Machine, cost, fused_bytes, measured_steps
from bench.scale.model import SHAPES, fake_ranks, on_meta, shard
from bench.scale.recorded import Step, here, layers_of, nbytes, parameters_of, record, state_bytes
from lwas_fast import SGDLW, AdamWLW

OPTIMIZERS = {"adamw": AdamWLW, "sgd": SGDLW}


class Case(NamedTuple):
    """A model on so many ranks: counts and bytes of the first rank, which holds no less than others."""

    model: str
    ranks: int
    parameters: int
    local: int
    buffers: int
    tensors: int
    layers: int
    weights: int
    state: int
    ordinary: Step
    measuring: Step
    accumulated: Step
    measurements: list[int]


def case(name: str, ranks: int, optimizer: str, steps: int, plain: bool = False) -> Case:
    """Record what steps take of a model that is not there; `plain`: without the compiled update."""
    with fake_ranks(ranks) as mesh:
        model = shard(on_meta(SHAPES[name]), mesh)
        opt = OPTIMIZERS[optimizer](model)
        params = list(model.parameters())
        record(opt, measures=True, plain=plain)  # the first makes the state
        ordinary, measuring = (record(opt, measures, plain=plain) for measures in (False, True))
        (group,) = opt.param_groups
        return Case(
            name,
            ranks,
            parameters_of(model),
            sum(part.numel() for part in here(params)),
            len(opt.rule.buffers(group)),
            len(params),
            layers_of(opt),
            nbytes(params),
            state_bytes(opt),
            ordinary,
            measuring,
            record(opt, measures=True, accumulated=True, plain=plain),
            list(measured_steps(group, steps)),
        )


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size(count: float) -> str:
    """Bytes, with a unit of powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"


def seconds(value: float) -> str:
    """Seconds or milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def of_messages(step: Step) -> str:
    """How many messages, and their bytes together."""
    return f"{len(step.messages)}, {size(sum(message.size for message in step.messages))}"


def report(cases: list[Case], machine: Machine, args: argparse.Namespace) -> str:
    """The tables."""
    of_models = {found.model: found for found in cases}.values()
    messages = table(
        ["model", "parameters", "tensors", "layers", "ordinary step: messages", "step that measures: messages"],
        (
            [f.model, f"{f.parameters / 1e9:.2f} B", f"{f.tensors}", f"{f.layers}"]
            + [of_messages(f.ordinary), of_messages(f.measuring)]
            for f in of_models
        ),
    )
    times = []
    for f in cases:
        steps, part = (f.ordinary, f.measuring), len(f.measurements) / args.steps
        in_torch = fused_bytes(f.local, f.buffers)
        found = cost(machine, f.parameters, in_torch, f.ranks, args.tokens, steps, part)
        ordinary, measuring, mean = (100 * more / found.torch for more in found[1:])
        times.append(
            [f.model, f"{f.ranks}", seconds(found.torch), seconds(found.ordinary), f"{ordinary:.2f} %"]
            + [seconds(found.measuring), f"{measuring:.0f} %", f"{mean:.2f} %"]
        )
    spent = table(
        ["model", "ranks", "step with torch's", "an ordinary step adds", "share", "a measurement adds", "share"]
        + [f"mean of {args.steps}"],
        times,
    )
    memory = table(
        ["model", "ranks", "weights", "gradients", "state", "ordinary step", "step that measures"]
        + ["with accumulation"],
        (
            [f.model, f"{f.ranks}", size(f.weights), size(f.ordinary.held - f.weights - f.state), size(f.state)]
            + [size(step.peak) for step in (f.ordinary, f.measuring, f.accumulated)]
            for f in cases
        ),
    )
    first = cases[0]
    peaks = ", ".join(f"{s.peak / first.local:.0f}" for s in (first.ordinary, first.measuring, first.accumulated))
    moved = " and ".join(f"{step.moved / first.local:.0f}" for step in (first.ordinary, first.measuring))
    logits = size(4 * LOGITS * args.tokens * SHAPES[first.model].vocabulary)
    notes = (
        f"{len(first.measurements)} of the first {args.steps} steps measure. Bytes a parameter in the last three "
        f"columns: {peaks}. Bytes a parameter read and written by the optimizer, in an ordinary step and in one that "
        f"measures: {moved}. Of a model that returns its logits a step that measures holds {logits} more."
    )
    return "\n\n".join([messages, spent, memory, notes])


def main() -> None:
    """Read the command line and print the tables."""
    parse = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__.splitlines()[0])
    parse.add_argument("--models", default="1B,7B,13B,70B", help=f"of {', '.join(SHAPES)}")
    parse.add_argument("--ranks", default="8,64,1024", help="that share the parameters")
    parse.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parse.add_argument("--tokens", type=int, default=8192, help="of each rank in a step")
    parse.add_argument("--steps", type=int, default=10_000, help="of the run")
    parse.add_argument("--flops", type=float, default=989e12, help="most operations a second of a rank")
    parse.add_argument("--mfu", type=float, default=0.4, help="share of these that training gets")
    parse.add_argument("--memory-bandwidth", type=float, default=3.35e12, help="bytes a second")
    parse.add_argument("--latency", type=float, default=20e-6, help="of an all-reduce, for each doubling of ranks, s")
    parse.add_argument("--node", type=int, default=8, help="ranks of one node")
    parse.add_argument("--inside", type=float, default=450e9, help="bytes a second of a collective within a node")
    parse.add_argument("--outside", type=float, default=50e9, help="bytes a second of a rank's link to other nodes")
    parse.add_argument("--plain", action="store_true", help="plain torch takes the update: nothing could be compiled")
    args = parse.parse_args()
    machine = Machine(args.flops, args.mfu, args.memory_bandwidth, args.latency, args.node, args.inside, args.outside)
    ranks = [int(number) for number in args.ranks.split(",")]
    models = args.models.split(",")
    cases = [case(name, number, args.optimizer, args.steps, args.plain) for name in models for number in ranks]
    print(report(cases, machine, args))


if __name__ == "__main__":
    main()
