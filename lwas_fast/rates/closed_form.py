r"""Curvature to step sizes in plain torch: sums, closed form, averages, guards, for all layers at once.

Along a direction d with descent \(\rho = -\langle g, d\rangle\) and curvature
\(\delta^2 = \langle d, H d\rangle\) the step is \(t = \rho / (\delta^2 + \rho^2 / 2F)\), F being the mean size of
the loss at measurements: 1/t is that of Newton's step \(\rho / \delta^2\) plus that of \(2 F / \rho\), the least
point of a parabola with this slope that falls to 0. To first order a step promises \(t \rho\). Where the layers
measured together promise more than F, all their steps are divided by the excess, as in Polyak's step. A multiple of
the loss has the same steps. But for the excess it is the step of Bahamou & Goldfarb, arXiv 2305.13664,
\(\rho / (\delta (\delta + \tfrac{M}{2}\rho))\), with \(M = \rho / (\delta F)\). That, averages and guards are ours;
`tests/reference.py` defines them.

Nothing here reads a number back from the device, unless layers are on several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lwas_fast.layers import upload
from lwas_fast.measure import Probe, Products
from lwas_fast.options import MAX_GROWTH, MOST_PROMISED
from lwas_fast.rates.when import memory
from lwas_fast.table import Column, Sums

# On a CPU, products of so many elements stay in the cache, and one thread sums them up: so the result is the same for
# any number of threads. (That of BLAS's dot product is not, and depends on where in memory its arguments lie.)
_PIECE = 2**15


def _dot(direction: Tensor, other: Tensor | None) -> Tensor:
    if other is None:
        return direction.new_zeros(())
    if direction.device.type != "cpu" or direction.numel() <= _PIECE:
        return (direction * other).sum()
    pieces = zip(*(torch.split(t.flatten(), _PIECE) for t in (direction, other)), strict=True)
    return torch.stack([(d * o).sum() for d, o in pieces]).sum()


def layer_sums(probe: Probe, products: Products) -> Tensor:
    """Reduce vectors and their products with the Hessian to (S, len(Sums)), a row for each layer of the selection.

    Of sharded tensors to this process's share of these sums.
    """
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
    sums = probe.selection.share(torch.stack([of_tensors[column] for column in Sums], 1))
    if gradients is not None:
        sums[:, Sums.DESCENT] *= -upload(probe.signs, dtype, sums.device)
    sums[:, Sums.CURVATURE] *= products.factor
    return sums


class Steps(NamedTuple):
    """What the closed form says of each layer of a bucket, all (S,) where not said otherwise.

    Attributes:
        table: The statistics so far, (S, len(Column)).
        descent: rho.
        sampled: The curvature, as measured.
        weight: Of all measurements in the averages, this one too.
        loss: Likewise the loss's size, times the weight.
        rate: t, before the promises of all layers are added up.
        promised: What that promises, t rho / F; 0 where the measurement is unusable.
        usable: Whether it is not.
        no_descent: Whether it is not because d is no direction of descent.
    """

    table: Tensor
    descent: Tensor
    sampled: Tensor
    weight: Tensor
    loss: Tensor
    rate: Tensor
    promised: Tensor
    usable: Tensor
    no_descent: Tensor


def closed_form(probe: Probe, sums: Tensor, group: dict[str, Any]) -> Steps:
    """Work out what the sums (S, len(Sums)) of one measurement say of its layers."""
    table = probe.rows
    descent, sampled, square = sums.to(table.dtype).unbind(1)
    beta = memory(group)
    weight = beta * table[:, Column.WEIGHT] + (1 - beta)
    loss = beta * table[:, Column.LOSS] + (1 - beta) * probe.loss
    curvature = sampled.abs() + upload(probe.l2, table.dtype, table.device) * square
    newton = descent / curvature
    promise = (descent * newton / (loss / weight)).clamp(max=MOST_PROMISED)  # of Newton's step
    rate = newton / (1 + 0.5 * promise)
    finite = torch.isfinite(descent) & torch.isfinite(curvature) & torch.isfinite(loss)
    # Without curvature the closed form has no answer; without descent it has a meaningless one.
    usable = finite & (descent > 0) & torch.isfinite(rate)
    promised = torch.where(usable, promise / (1 + 0.5 * promise), 0.0)
    return Steps(table, descent, sampled, weight, loss, rate, promised, usable, finite & (descent <= 0))


def current(table: Tensor, warmup_rate: float) -> Tensor:
    """The rates (L,) that a table stands for: averages, or `warmup_rate` for layers never refreshed."""
    weight = table[:, Column.WEIGHT]
    return torch.where(weight > 0, table[:, Column.AVERAGE] / weight, warmup_rate)


def refresh(probes: Sequence[Probe], sums: Sequence[Tensor], groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Take the sums of one measurement of all layers into their statistics.

    Where the measurement is unusable only `NEGATIVE`, `NONFINITE` or `NO_DESCENT` differs.

    Args:
        probes: What was measured along.
        sums: For each (S, len(Sums)), of its layers.
        groups: For each the hyperparameters.

    Returns:
        For each (S, len(Column)), the new statistics.
    """
    found = [closed_form(*measured) for measured in zip(probes, sums, groups, strict=True)]
    if not found:
        return []
    promised = torch.stack([steps.promised.sum().to(found[0].table) for steps in found]).sum()
    excess = promised.clamp(min=1.0)
    measured = zip(probes, found, groups, strict=True)
    return [_enter(probe, steps, excess.to(steps.rate), group) for probe, steps, group in measured]


def _enter(probe: Probe, steps: Steps, excess: Tensor, group: dict[str, Any]) -> Tensor:
    """The new statistics of a probe's layers; `excess` is what all steps are divided by."""
    table, usable = steps.table, steps.usable
    new = table.clone()
    beta = memory(group)
    rate = steps.rate / excess
    limit = MAX_GROWTH * current(table, group["warmup_rate"])
    known = table[:, Column.WEIGHT] > 0
    grown = usable & known & (rate > limit)
    rate = torch.where(grown, limit, rate)
    most = probe.max_fall * rate * table[:, Column.WEIGHT]
    kept = torch.where(known, torch.fmin(table[:, Column.AVERAGE], most), 0.0)  # without a limit `most` may be inf * 0
    for column, value in (
        (Column.AVERAGE, beta * kept + (1 - beta) * rate),
        (Column.WEIGHT, steps.weight),
        (Column.LOSS, steps.loss),
        (Column.DESCENT, steps.descent),
        (Column.CURVATURE, steps.sampled),
    ):
        new[:, column] = torch.where(usable, value, table[:, column])
    for column, event in (
        (Column.REFRESHES, usable),
        (Column.NEGATIVE, steps.sampled < 0),
        (Column.NONFINITE, ~(usable | steps.no_descent)),
        (Column.NO_DESCENT, steps.no_descent),
        (Column.GROWTH, grown),
    ):
        new[:, column] += event
    return new
