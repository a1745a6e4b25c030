"""From the vectors of a measurement to refreshed statistics of all layers, by the implementation that serves.

Plain torch here; one launch on a GPU in `fused_rates.py`. In a distributed run the layers' sums are averaged over the
replicas before they are taken into the statistics: four numbers a layer travel, not the Hessian-vector products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lwas_fast import backends, distributed, fused_rates, rates
from lwas_fast.curvature import Probe, Products
from lwas_fast.layers import upload
from lwas_fast.rates import Sums
from lwas_fast.update import bias_correction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = Sequence[dict[str, Any]]


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
    """Reduce a measurement to what the rates need.

    Args:
        probe: The vectors.
        products: Their products with the Hessian.

    Returns:
        (S, len(Sums)), one row for each layer of the selection.
    """
    gradients, directions, momenta = probe.vectors
    dtype = probe.bucket.table.dtype

    def dot(others: Sequence[Tensor | None]) -> Tensor:
        return torch.stack([_dot(d, other).to(dtype) for d, other in zip(directions, others, strict=True)])

    square = dot(directions)
    signal = torch.full_like(square, torch.nan)
    if momenta is not None:
        steps = torch.stack([probe.bucket.counts[i] for i in probe.selection.indices]).to(dtype)
        signal = dot(momenta) / bias_correction(steps, probe.decay, empty=torch.nan)
    of_tensors = {
        Sums.DESCENT: square if gradients is None else dot(gradients),
        Sums.CURVATURE: dot(products.tensors),
        Sums.SQUARE: square,
        Sums.SIGNAL: signal,
    }
    sums = probe.selection.per_layer(torch.stack([of_tensors[column] for column in Sums], 1))
    against = -upload(probe.signs, dtype, sums.device)
    if gradients is not None:
        sums[:, Sums.DESCENT] *= against
    sums[:, Sums.CURVATURE] *= products.factor
    sums[:, Sums.SIGNAL] *= against
    return sums


def refreshed(
    probes: Sequence[Probe],
    products: Sequence[Products],
    groups: Groups,
    plans: fused_rates.Plans,
    replicas: ProcessGroup | None = None,
) -> list[Tensor]:
    """Take a measurement into the statistics of its layers.

    Args:
        probes: What was measured along.
        products: For each probe, the Hessian times its directions.
        groups: For each probe, the hyperparameters.
        plans: Where the single launch keeps what it has laid out once.
        replicas: The processes whose products, each of its share of the batch, are to be averaged.

    Returns:
        For each probe (S, len(Column)), what its selection's rows of statistics are to become.
    """
    together: dict[Any, list[int]] = {}
    apart: list[int] = []
    for p, (probe, group) in enumerate(zip(probes, groups, strict=True)):
        if backends.rates_implementation(group, probe.bucket) == "triton":
            together.setdefault(fused_rates.launch_key(probe), []).append(p)
        else:
            apart.append(p)
    launches = []
    for members in together.values():
        mine, theirs, options = ([x[p] for p in members] for x in (probes, products, groups))
        launches.append((members, fused_rates.Launch(mine, theirs, options, plans)))  # type: ignore[arg-type]
    if replicas is None:
        found = {p: rates.refresh(probes[p].rows, layer_sums(probes[p], products[p]), groups[p]) for p in apart}
        for members, launch in launches:
            found.update(zip(members, launch.rows(), strict=True))
        return [found[p] for p in range(len(probes))]

    sums = {p: layer_sums(probes[p], products[p]) for p in apart}
    for members, launch in launches:
        sums.update(zip(members, launch.sums(), strict=True))
    # In the order of probes, which is the same on all replicas, whatever serves them.
    averaged = distributed.average([sums[p] for p in range(len(probes))], replicas) if probes else []
    found = {p: rates.refresh(probes[p].rows, averaged[p], groups[p]) for p in apart}
    for members, launch in launches:
        found.update(zip(members, launch.finish([averaged[p] for p in members]), strict=True))
    return [found[p] for p in range(len(probes))]
