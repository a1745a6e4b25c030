"""From a layer's rate to what multiplies its direction in a step: gain, cap, ramp, warm-up."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lwas_fast.rule import Rule
from lwas_fast.selection import RMS_FLOOR
from lwas_fast.table import Column

# A step is bounded by the norms expected before it. When it has been taken the true ones are known, and it is corrected
# if it was longer than so many times the cap.
SLACK = 1.25


class Control(NamedTuple):
    """What turns a layer's rate into its step: the same for all layers of a group.

    Attributes:
        warming: Whether this is a step of the warm-up.
        warmup_rate: The rate then, and of layers never measured.
        gain: What measured rates are multiplied by before the cap.
        ramp: Share of the bounded rate that is applied: the ramp's, times the rule's persistence.
        cap: Share of its norm by which a layer is to move at most; `SLACK` times that before it is corrected.
        largest_rate: Largest rate, whatever the norms: with decoupled decay, decaying by more than `cap` is a runaway
            as well. Infinite where there is no such decay.
    """

    warming: bool
    warmup_rate: float
    gain: float
    ramp: float
    cap: float
    largest_rate: float


def gain(beta: float, steps: int) -> float:
    """How much longer than the measured step a schedule-free one is, after so many steps.

    A step moves the iterate in full, but the weights that the step was measured at by ``1 - beta + beta / (steps + 1)``
    of it only: 1 would be right for the former, the inverse of that for the latter. This is their geometric mean, from
    1 at first to ``1 / sqrt(1 - beta)``; docs/method.md has what was measured about it.
    """
    return 1 / math.sqrt(1 - beta + beta / (steps + 1))


def control(rule: Rule, group: dict[str, Any]) -> Control:
    """Read off a group, with ``steps`` done so far, what its next step needs."""
    since_warmup = group["steps"] - group["warmup_steps"]
    warming = since_warmup < 0
    ramp = 1.0 if warming or not group["ramp_steps"] else min(1.0, (since_warmup + 1) / group["ramp_steps"])
    cap, decay = float(rule.cap(group)), float(group["weight_decay"]) if rule.decoupled else 0.0  # of tensors, too
    largest = cap / decay if decay > 0 else math.inf
    longer = gain(rule.share(group), group["steps"]) if group["schedule_free"] else 1.0
    ramp *= 1.0 if warming else rule.persistence(group)
    return Control(warming, group["warmup_rate"], longer, ramp, cap, largest)


def stepped(
    table: Tensor,
    sizes: Tensor,
    elements: Tensor,
    lengths: Tensor,
    moves: Tensor | bool,
    skips: Tensor | bool,
    lr: float | Tensor,
    control: Control,
) -> Tensor:
    """Work out what multiplies each of L layers' directions in this step.

    Args:
        table: (L, len(Column)) statistics.
        sizes: (L,) squared norm of the layer's weights.
        elements: (L,) how many these are, in the table's dtype.
        lengths: (L,) squared norm of the direction that is applied.
        moves: (L,) bool, whether anything of the layer moves; on a CPU also one for all.
        skips: Likewise, whether elements of it are left alone.
        lr: The group's multiplier.
        control: The rest of what holds for all of them.

    Returns:
        The new table: `APPLIED` is the answer, `LENGTH` and `SIZE` are for the next, `CAPPED` and `SKIPPED` count.
    """
    new = table.clone()
    if not table.is_cpu:
        _stepped(torch, lr, control, new, sizes, elements, lengths, moves, skips)
        return new
    # numpy takes a third of torch's time for so few numbers, which is what a step of a small model would consist of.
    numbers: list[Any] = [x.numpy() for x in (new, sizes, elements, lengths)]
    numbers += [x.numpy() if isinstance(x, Tensor) else x for x in (moves, skips)]
    with np.errstate(all="ignore"):
        _stepped(np, float(lr), control, *numbers)
    return new


def _stepped(
    xp: Any,
    lr: float | Tensor,
    control: Control,
    new: Any,
    squared_sizes: Any,
    elements: Any,
    squared_lengths: Any,
    moves: Any,
    skips: Any,
) -> None:
    """Bring a table up to date in place, in torch or in numpy."""
    lengths, sizes = xp.sqrt(squared_lengths), xp.maximum(xp.sqrt(squared_sizes), RMS_FLOOR * xp.sqrt(elements))
    weight, expected, size = new[:, Column.WEIGHT], new[:, Column.LENGTH], new[:, Column.SIZE]
    if control.warming:
        rate = xp.full_like(weight, control.warmup_rate)
    else:
        rate = xp.where(weight > 0, new[:, Column.AVERAGE] / weight * control.gain, control.warmup_rate)
    bound = largest_rate(xp, sizes, lengths, control)
    foreseen = xp.minimum(rate, largest_rate(xp, size, expected, control))
    known = (size > 0) & (new[:, Column.ELEMENTS] == elements)  # the layer has taken a step, with these tensors
    foreseen = xp.where(known, foreseen, math.inf)
    step = xp.minimum(xp.where(foreseen > SLACK * bound, bound, foreseen), rate)
    new[:, Column.APPLIED] = xp.where(moves, step * (lr * control.ramp), 0.0)
    new[:, Column.CAPPED] += moves & (step < rate)
    new[:, Column.SKIPPED] += skips
    new[:, Column.LENGTH] = xp.where(moves, expected_lengths(xp, xp.where(known, expected, 0.0), lengths), expected)
    new[:, Column.SIZE] = xp.where(moves, sizes, size)
    new[:, Column.ELEMENTS] = xp.where(moves, elements, new[:, Column.ELEMENTS])


def largest_rate(xp: Any, sizes: Any, lengths: Any, control: Control) -> Any:
    """The largest rate of layers with these norms; nothing but the decay bounds it where there is no direction."""
    bound = xp.where(lengths > 0, control.cap * sizes / lengths, math.inf)
    bound = xp.where(bound == bound, bound, 0.0)  # NaN: both norms overflowed
    return xp.where(bound < control.largest_rate, bound, control.largest_rate)


def expected_lengths(xp: Any, before: Any, now: Any) -> Any:
    """Norms to expect of the next directions: the root mean square over about five steps.

    An outlier counts as twice the average, and an average of longer directions as four times this one, so that it does
    not shorten steps for long. A step without a direction, or with one that overflowed, does not count.
    """
    average = xp.where(before < 4 * now, before, 4 * now)
    ratio = now / average
    ratio = xp.where(ratio > 2, 2.0, ratio)
    averaged = average * xp.sqrt(0.8 + 0.2 * ratio * ratio)
    counts = (now > 0) & (now < math.inf)
    return xp.where(counts, xp.where(before > 0, averaged, now), before)
