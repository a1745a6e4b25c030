"""A step of all parameters that have a gradient: what could go wrong is checked first, then it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from lwas_fast import shards
from lwas_fast.layers import Layout, check_dense
from lwas_fast.profiling import span
from lwas_fast.rule import Part, Rule, Scaling
from lwas_fast.update import extension
from lwas_fast.update.average import check_state, follow
from lwas_fast.update.compiled import compiled_step, step_of_shards
from lwas_fast.update.plain import plain_step


class Ready(NamedTuple):
    """What is to take a step.

    Attributes:
        part: See `rule.Part`.
        states: As `Layout.enter` takes them: whole ones.
        compiled: Whether compiled code takes it.
    """

    part: Part
    states: list[dict[str, Any]]
    compiled: bool


def prepare(layout: Layout, rule: Rule) -> list[Ready]:
    """Find what moves, and whether compiled code moves it; nothing is changed.

    Raises:
        TypeError: A gradient is sparse.
        RuntimeError: ``fused=True``, and the compiled update cannot serve; or a state of the other mode.
    """
    parts = []
    for bucket in layout.buckets:
        found = [p.grad for p in bucket.params]
        if present := [i for i, gradient in enumerate(found) if gradient is not None]:
            gradients = [gradient for gradient in found if gradient is not None]
            if [gradient.layout for gradient in gradients].count(torch.strided) < len(gradients):
                check_dense(layout.groups, attrgetter("grad"))
            group, selection = layout.group_of(bucket), bucket.select(present)
            check_state(layout, rule, group, selection.params[0])
            compiled = extension.serves(rule, group, bucket)
            states = here = layout.states_of(bucket, selection)
            if selection.shards is not None:
                here = [shards.local_state(state, rule.buffers(group)) for state in states]
                gradients = list(map(shards.local_like, selection.params, gradients))
            parts.append(Ready(Part(bucket, selection, group, here, gradients), states, compiled))
    return parts


def run(layout: Layout, rule: Rule, parts: Sequence[Ready], scaling: Scaling) -> None:
    """Take the step, and count it in the groups that moved."""
    numbers = {ready.part.bucket.group for ready in parts}
    follow(layout, rule, numbers)
    layout.enter({ready.part.selection: ready.states for ready in parts})
    with span("update"):
        in_two_parts = []
        for ready in parts:
            if ready.compiled and ready.part.selection.shards is None:
                compiled_step(rule, ready.part, scaling)
            else:
                in_two_parts.append(ready)
        if in_two_parts and torch.compiler.is_compiling():  # on a CPU numbers are read, which a trace cannot
            torch.compiler.disable(_in_two_parts)(rule, in_two_parts, scaling)  # type: ignore[no-untyped-call]
        elif in_two_parts:
            _in_two_parts(rule, in_two_parts, scaling)
    for number in numbers:
        layout.groups[number]["steps"] += 1


def _in_two_parts(rule: Rule, parts: Sequence[Ready], scaling: Scaling) -> None:
    """Take steps whose sums are added up over processes between their parts: in one message, if on one mesh."""
    waiting = []
    for ready in parts:
        step = (step_of_shards if ready.compiled else plain_step)(rule, ready.part, scaling)
        if (sums := next(step, None)) is not None:
            waiting.append((step, sums, ready.part.selection.shards))
    totals = shards.add_up([sums for _, sums, _ in waiting], [of for _, _, of in waiting])
    for (step, _, _), of_all in zip(waiting, totals, strict=True):
        with suppress(StopIteration):
            step.send(of_all)
