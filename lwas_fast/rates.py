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
from typing import Any

import torch
from torch import Tensor

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
    SKIPPED = 13  # steps left out because the layer's gradient was not finite


class Sums(IntEnum):
    """What is summed up of each tensor, and so of each layer, in a measurement."""

    DESCENT = 0  # -<g, d>
    CURVATURE = 1  # <d, H d> as the estimator gives it
    SQUARE = 2  # ||d||^2
    SIGNAL = 3  # -<d, momentum before this gradient>; NaN when there is none yet


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

    horizon = group["rate_horizon"]
    beta = math.exp(-group["update_every"] / horizon) if horizon > 0 else 0.0

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


def apply(
    table: Tensor, weights: Tensor, direction: Tensor, finite: Tensor, group: dict[str, Any], decoupled: bool
) -> Tensor:
    """Work out what multiplies each layer's direction in this step.

    Args:
        table: (L, len(Column)) statistics.
        weights: (L,) norm of the layer's weights, not below its floor.
        direction: (L,) norm of the direction that is applied.
        finite: (L,) bool, whether the layer's gradient is finite.
        group: The hyperparameters, with ``steps`` done so far.
        decoupled: Whether the weights also decay by rate * weight_decay.

    Returns:
        The new table: `APPLIED` is the answer, `CAPPED` and `SKIPPED` count.
    """
    new = table.clone()
    since_warmup = group["steps"] - group["warmup_steps"]
    rate = current(table, group["warmup_rate"])
    ramp = 1.0
    if since_warmup < 0:
        rate = torch.full_like(rate, group["warmup_rate"])
    elif group["ramp_steps"]:
        ramp = min(1.0, (since_warmup + 1) / group["ramp_steps"])
    cap = torch.where(direction > 0, group["cap"] * weights / direction, math.inf)
    if decoupled and group["weight_decay"] > 0:
        cap = cap.clamp(max=group["cap"] / group["weight_decay"])
    new[:, Column.APPLIED] = torch.where(finite, torch.minimum(rate, cap) * group["lr"] * ramp, 0.0)
    new[:, Column.CAPPED] += finite & (rate > cap)
    new[:, Column.SKIPPED] += ~finite
    return new
