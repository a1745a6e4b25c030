r"""Curvature to step sizes in plain torch: sums, closed form, averages, guards, for all layers of a bucket at once.

The step size along a direction d with descent \(\rho = -\langle g, d\rangle\) and curvature
\(\delta^2 = \langle d, H d\rangle\) is \(t = \rho / (\delta (\delta + \tfrac{M}{2}\rho))\), the minimiser of the
upper bound that self-concordance with constant M gives (Bahamou & Goldfarb, arXiv 2305.13664). M is 2 over the root
of the mean size of the loss at measurements, so a multiple of the loss has the same steps. That, averages and guards
are ours; `tests/reference.py` defines them in the paper's notation.

Nothing here reads a number back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwas_fast.layers import upload
from lwas_fast.measure import Probe, Products
from lwas_fast.options import MOST_DAMPING, SELF_CONCORDANCE
from lwas_fast.rates.when import memory
from lwas_fast.table import Column, Sums

# On a CPU, products of so many elements stay in the cache. (BLAS's dot product would not need them, but its result
# depends on where in memory its arguments lie.)
_PIECE = 2**16


def _dot(direction: Tensor, other: Tensor | None) -> Tensor:
    if other is None:
        return direction.new_zeros(())
    if direction.device.type != "cpu" or direction.numel() <= _PIECE:
        return (direction * other).sum()
    pieces = zip(*(torch.split(t.flatten(), _PIECE) for t in (direction, other)), strict=True)
    return torch.stack([(d * o).sum() for d, o in pieces]).sum()


def layer_sums(probe: Probe, products: Products) -> Tensor:
    """Reduce vectors and their products with the Hessian to (S, len(Sums)), a row for each layer of the selection."""
    gradients, directions = probe.vectors
    dtype = probe.bucket.table.dtype

    def dot(others: Sequence[Tensor | None]) -> Tensor:
        return torch.stack([_dot(d, other).to(dtype) for d, other in zip(directions, others, strict=True)])

    square = dot(directions)
    of_tensors = {
        Sums.DESCENT: square if gradients is None else dot(gradients),
        Sums.CURVATURE: dot(products.tensors),
        Sums.SQUARE: square,
    }
    sums = probe.selection.per_layer(torch.stack([of_tensors[column] for column in Sums], 1))
    if gradients is not None:
        sums[:, Sums.DESCENT] *= -upload(probe.signs, dtype, sums.device)
    sums[:, Sums.CURVATURE] *= products.factor
    return sums


def closed_form(descent: Tensor, curvature: Tensor, loss: Tensor) -> Tensor:
    """The step size t = rho / (delta (delta + M/2 rho)).

    Args:
        descent: rho, of any shape.
        curvature: delta**2 >= 0, of the same.
        loss: The mean size of the loss, which M = 2 / root is taken from; likewise.

    Returns:
        t; infinite or NaN where delta is 0.
    """
    newton = descent / curvature
    damping = 0.5 * SELF_CONCORDANCE * (descent * newton / loss).sqrt()
    return newton / (1 + damping.clamp(max=MOST_DAMPING))


def current(table: Tensor, warmup_rate: float) -> Tensor:
    """The rates (L,) that a table stands for: averages, or `warmup_rate` for layers never refreshed."""
    weight = table[:, Column.WEIGHT]
    return torch.where(weight > 0, table[:, Column.AVERAGE] / weight, warmup_rate)


def refresh(probe: Probe, sums: Tensor, group: dict[str, Any]) -> Tensor:
    """Take the sums of one measurement into the layers' statistics.

    Where the measurement is unusable only `NEGATIVE`, `NONFINITE` or `NO_DESCENT` differs.

    Args:
        probe: What was measured along.
        sums: (S, len(Sums)), of its layers.
        group: Hyperparameters.

    Returns:
        (S, len(Column)), the new statistics.
    """
    table = probe.rows
    new = table.clone()
    descent, sampled, square = sums.to(table.dtype).unbind(1)
    beta = memory(group)

    def average(column: Column, value: Tensor) -> Tensor:
        return beta * table[:, column] + (1 - beta) * value

    curvature = sampled.abs() + probe.l2 * square
    weight = average(Column.WEIGHT, torch.ones_like(descent))
    loss = average(Column.LOSS, probe.loss.expand_as(descent))
    rate = closed_form(descent, curvature, loss / weight)
    finite = torch.isfinite(descent) & torch.isfinite(curvature) & torch.isfinite(loss)
    # Without curvature the closed form has no answer; without descent it has a meaningless one.
    nonfinite = ~finite | ((descent > 0) & ~torch.isfinite(rate))
    no_descent = ~nonfinite & (descent <= 0)
    usable = ~(nonfinite | no_descent)

    limit = probe.max_growth * current(table, group["warmup_rate"])
    known = table[:, Column.WEIGHT] > 0
    grown = usable & known & (rate > limit)
    rate = torch.where(grown, limit, rate)
    most = probe.max_fall * rate * table[:, Column.WEIGHT]
    kept = torch.where(known, torch.fmin(table[:, Column.AVERAGE], most), 0.0)  # without a limit `most` may be inf * 0
    for column, value in (
        (Column.AVERAGE, beta * kept + (1 - beta) * rate),
        (Column.WEIGHT, weight),
        (Column.LOSS, loss),
        (Column.DESCENT, descent),
        (Column.CURVATURE, sampled),
    ):
        new[:, column] = torch.where(usable, value, table[:, column])
    for column, event in (
        (Column.REFRESHES, usable),
        (Column.NEGATIVE, sampled < 0),
        (Column.NONFINITE, nonfinite),
        (Column.NO_DESCENT, no_descent),
        (Column.GROWTH, grown),
    ):
        new[:, column] += event
    return new
