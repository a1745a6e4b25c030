r"""Curvature to step sizes in plain torch: closed form, averages, guards, for all layers of a bucket at once.

The step size along a direction d with descent \(\rho = -\langle g, d\rangle\) and curvature
\(\delta^2 = \langle d, H d\rangle\) is \(t = \rho / (\delta (\delta + \tfrac{M}{2}\rho))\), the minimiser of the
upper bound that self-concordance with constant M gives (Bahamou & Goldfarb, arXiv 2305.13664). Averages, noise
factor and guards are ours; `reference.py` defines them in the paper's notation.

Nothing here reads a number back from the device.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERVALS = (10, 100)  # least and most steps between refreshes; docs/method.md says why
HORIZON, HORIZON_REFRESHES = 100, 5  # rates are averaged over this many steps, and this many refreshes, at least
LEAST_SIGNAL = 1e-3  # the noise factor's lower clip: one noisy estimate must not stop a layer


class Column(IntEnum):
    """What a row of a bucket's table holds of a layer. Counters are exact up to 2**24."""

    AVERAGE = 0  # moving average of the closed form's step size, before bias correction
    WEIGHT = 1  # its weights' sum: 1 - beta**refreshes; 0 means never refreshed
    SIGNAL = 2  # moving average of <-d, momentum before this gradient>
    POWER = 3  # moving average of the descent, over the same refreshes
    DESCENT = 4  # rho of the last measurement
    CURVATURE = 5  # delta**2 of the last measurement, as sampled: before abs, decay and damping
    APPLIED = 6  # what multiplied the direction in the last step
    REFRESHES = 7
    NEGATIVE = 8  # refreshes that met negative curvature
    NONFINITE = 9  # refreshes dropped for a NaN, an infinity, or no curvature at all
    NO_DESCENT = 10  # refreshes dropped because the probe does not descend
    GROWTH = 11  # refreshes cut back by max_growth
    CAPPED = 12  # steps cut back by the cap
    SKIPPED = 13  # steps in which elements were left alone because their gradient was not finite
    LENGTH = 14  # norm of the direction in the last step
    SIZE = 15  # norm of the weights before the last step, not below its floor


class Sums(IntEnum):
    """What is summed up of each tensor, and so of each layer, in a measurement."""

    DESCENT = 0  # -<g, d>
    CURVATURE = 1  # <d, H d> as the estimator gives it
    SQUARE = 2  # ||d||^2
    SIGNAL = 3  # -<d, momentum before this gradient>; NaN when there is none yet


def interval(group: dict[str, Any]) -> int:
    """Steps from a refresh now to the next: fixed, or a tenth of those since warm-up, in bounds."""
    fixed: int | None = group["update_every"]
    least, most = INTERVALS
    by_age = min(max(least, int(group["steps"] - group["warmup_steps"]) // 10), most)
    return by_age if fixed is None else fixed


def memory(group: dict[str, Any]) -> float:
    """What the averages over refreshes keep of their past (beta) in a refresh now."""
    last = group["last_refresh"]
    elapsed = interval(group) if last is None else group["steps"] - last
    horizon = group["rate_horizon"]
    if horizon is None:
        horizon = max(HORIZON, HORIZON_REFRESHES * elapsed)
    return math.exp(-elapsed / horizon) if horizon > 0 else 0.0


def closed_form(descent: Tensor, curvature: Tensor, self_concordance: float = 2.0) -> Tensor:
    """The step size t = rho / (delta (delta + M/2 rho)).

    Args:
        descent: rho, any shape.
        curvature: delta**2, same shape, not negative.
        self_concordance: M; 0 gives the exact line search of a quadratic, rho / delta**2.

    Returns:
        t, same shape; infinite or NaN where delta is 0.
    """
    delta = curvature.sqrt()
    return descent / (delta * (delta + 0.5 * self_concordance * descent))


def current(table: Tensor, warmup_rate: float) -> Tensor:
    """The rates (L,) that a table stands for: averages, or `warmup_rate` for layers never refreshed."""
    weight = table[:, Column.WEIGHT]
    return torch.where(weight > 0, table[:, Column.AVERAGE] / weight, warmup_rate)


def refresh(table: Tensor, sums: Tensor, group: dict[str, Any]) -> Tensor:
    """Take one measurement into the statistics.

    Args:
        table: (L, len(Column)) statistics.
        sums: (L, len(Sums)) of this measurement.
        group: The hyperparameters.

    Returns:
        The new table. Where the measurement is unusable only `NEGATIVE`, `NONFINITE` or `NO_DESCENT` differs.
    """
    new = table.clone()
    descent, sampled, square, signal = sums.to(table.dtype).unbind(1)

    negative = sampled < 0
    curvature = sampled.abs() + (group["weight_decay"] + group["damping"]) * square
    rate = closed_form(descent, curvature, group["self_concordance"])
    skip = (sampled <= 0) if group["negative_curvature"] == "skip" else torch.zeros_like(negative)
    finite = torch.isfinite(descent) & torch.isfinite(curvature)
    # Without curvature the closed form has no answer; without descent it has a meaningless one.
    nonfinite = ~skip & (~finite | ((descent > 0) & ~torch.isfinite(rate)))
    no_descent = ~skip & ~nonfinite & (descent <= 0)
    usable = ~(skip | nonfinite | no_descent)

    beta = memory(group)

    def average(column: Column, value: Tensor | float, where: Tensor) -> None:
        old = table[:, column]
        new[:, column] = torch.where(where, beta * old + (1 - beta) * value, old)

    heard = usable & torch.isfinite(signal)
    average(Column.SIGNAL, signal, heard)
    average(Column.POWER, descent, heard)
    power = new[:, Column.POWER]
    share = torch.where(power > 0, (new[:, Column.SIGNAL] / power).clamp(LEAST_SIGNAL, 1.0), 1.0)
    rate = rate * share ** group["noise_exponent"]

    limit = group["max_growth"] * current(table, group["warmup_rate"])
    grown = usable & (table[:, Column.WEIGHT] > 0) & (rate > limit)
    rate = torch.where(grown, limit, rate)
    average(Column.AVERAGE, rate, usable)
    average(Column.WEIGHT, 1.0, usable)

    new[:, Column.DESCENT] = torch.where(usable, descent, table[:, Column.DESCENT])
    new[:, Column.CURVATURE] = torch.where(usable, sampled, table[:, Column.CURVATURE])
    for column, event in (
        (Column.REFRESHES, usable),
        (Column.NEGATIVE, negative),
        (Column.NONFINITE, nonfinite),
        (Column.NO_DESCENT, no_descent),
        (Column.GROWTH, grown),
    ):
        new[:, column] += event
    return new


class Control(NamedTuple):
    """What turns a layer's rate into its step: the same for all layers of a group.

    Attributes:
        warming: Whether this is a step of the warm-up.
        warmup_rate: The rate then, and of layers never refreshed.
        gain: What measured rates are multiplied by before the cap.
        ramp: Share of the measured rate that is applied.
        cap: Largest share of its norm by which a layer may move.
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


def control(group: dict[str, Any], decoupled: bool, beta: float) -> Control:
    """Read off a group, with ``steps`` done so far and ``beta`` its averages' decay, what its next step needs."""
    since_warmup = group["steps"] - group["warmup_steps"]
    warming = since_warmup < 0
    ramp = 1.0 if warming or not group["ramp_steps"] else min(1.0, (since_warmup + 1) / group["ramp_steps"])
    decays = decoupled and group["weight_decay"] > 0
    largest = group["cap"] / group["weight_decay"] if decays else math.inf
    longer = gain(beta, group["steps"]) if group["schedule_free"] else 1.0
    return Control(warming, group["warmup_rate"], longer, ramp, group["cap"], largest)


def apply(
    table: Tensor, sizes: Tensor, lengths: Tensor, moves: Tensor, skipped: Tensor, lr: float | Tensor, control: Control
) -> Tensor:
    """Work out what multiplies each layer's direction in this step.

    Args:
        table: (L, len(Column)) statistics.
        sizes: (L,) norm of the layer's weights, not below its floor.
        lengths: (L,) norm of the direction that is applied.
        moves: (L,) bool, whether anything of the layer moves.
        skipped: (L,) bool, whether elements of it are left alone.
        lr: The group's multiplier.
        control: The rest of what holds for all of them.

    Returns:
        The new table: `APPLIED` is the answer, `LENGTH` and `SIZE` are noted, `CAPPED` and `SKIPPED` count.
    """
    new = table.clone()
    rate = current(table, control.warmup_rate)
    rate = torch.where(table[:, Column.WEIGHT] > 0, rate * control.gain, rate)
    if control.warming:
        rate = torch.full_like(rate, control.warmup_rate)
    bound = torch.where(lengths > 0, control.cap * sizes / lengths, math.inf)
    bound = bound.nan_to_num(nan=0.0, posinf=math.inf).clamp(max=control.largest_rate)  # NaN: both norms overflowed
    new[:, Column.APPLIED] = torch.where(moves, torch.minimum(rate, bound) * lr * control.ramp, 0.0)
    new[:, Column.CAPPED] += moves & (rate > bound)
    new[:, Column.SKIPPED] += skipped
    new[:, Column.LENGTH] = torch.where(moves, lengths, table[:, Column.LENGTH])
    new[:, Column.SIZE] = torch.where(moves, sizes, table[:, Column.SIZE])
    return new
