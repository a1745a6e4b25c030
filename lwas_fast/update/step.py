"""A step of all parameters that have a gradient: what could go wrong is checked first, then it is taken."""

from __future__ import annotations

from collections.abc import Sequence

from lwas_fast.layers import Layout
from lwas_fast.profiling import span
from lwas_fast.rule import Part, Rule, Scaling
from lwas_fast.update import extension
from lwas_fast.update.average import check_state, follow
from lwas_fast.update.compiled import compiled_step
from lwas_fast.update.plain import plain_step


def prepare(layout: Layout, rule: Rule) -> list[tuple[Part, bool]]:
    """Find what moves, and whether compiled code moves it; nothing is changed.

    Raises:
        RuntimeError: ``fused=True``, and the compiled update cannot serve; or a state of the other mode.
    """
    parts = []
    for bucket in layout.buckets:
        if present := [i for i, p in enumerate(bucket.params) if p.grad is not None]:
            group, selection = layout.group_of(bucket), bucket.select(present)
            check_state(layout, rule, group, selection.params[0])
            compiled = extension.serves(rule, group, bucket)
            parts.append((Part(bucket, selection, group, [layout.state_of(bucket, i) for i in present]), compiled))
    return parts


def run(layout: Layout, rule: Rule, parts: Sequence[tuple[Part, bool]], scaling: Scaling) -> None:
    """Take the step, and count it in the groups that moved."""
    numbers = {part.bucket.group for part, _ in parts}
    follow(layout, rule, numbers)
    with span("update"):
        for part, compiled in parts:
            layout.state.update(zip(part.selection.params, part.states, strict=True))
            (compiled_step if compiled else plain_step)(rule, part, scaling)
    for number in numbers:
        layout.groups[number]["steps"] += 1
