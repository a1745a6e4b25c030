"""Taking a measurement into the statistics of its layers, by the implementation that serves.

In a distributed run the layers' sums are averaged over the replicas before they are taken in: three numbers a layer
travel, not the Hessian-vector products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lwas_fast.layers import Bucket, Groups
from lwas_fast.measure import Measurement
from lwas_fast.parallel import ddp
from lwas_fast.profiling import span
from lwas_fast.rates import launch
from lwas_fast.rates.closed_form import layer_sums, refresh
from lwas_fast.rates.when import schedule
from lwas_fast.selection import Selection


class Measured(NamedTuple):
    """What a measurement leaves for the next step.

    Attributes:
        due: Numbers of the parameter groups that were to be measured.
        rows: Of each selection that was measured (S, len(Column)), what its rows of statistics are to become.
    """

    due: list[int]
    rows: list[tuple[Bucket, Selection, Tensor]]


@torch.no_grad()
def refreshed(measurement: Measurement, groups: Groups, plans: launch.Plans) -> Measured:
    """Work out what the statistics of the layers are to become; nothing is changed but `plans`."""
    with span("rates"):
        rows = _rows(measurement, [groups[probe.bucket.group] for probe in measurement.probes], plans)
    pairs = zip(measurement.probes, rows, strict=True)  # their vectors need not wait for the step
    return Measured(measurement.due, [(probe.bucket, probe.selection, new) for probe, new in pairs])


def take_in(measured: Measured, groups: Groups) -> None:
    """Enter new rows into the statistics, and set when each group is measured next."""
    for bucket, selection, rows in measured.rows:
        bucket.table[selection.rows] = rows
    with_gradient = {bucket.group for bucket, *_ in measured.rows}
    for number in measured.due:
        schedule(groups[number], number in with_gradient)


def _rows(measurement: Measurement, groups: Groups, plans: launch.Plans) -> list[Tensor]:
    """For each probe its new rows; `groups` has its hyperparameters."""
    probes, products = measurement.probes, measurement.products
    together: dict[Any, list[int]] = {}
    apart: list[int] = []
    for p, (probe, group) in enumerate(zip(probes, groups, strict=True)):
        if launch.serves(group, probe.bucket):
            together.setdefault(launch.launch_key(probe), []).append(p)
        else:
            apart.append(p)
    # On one process rows; on several, sums that are to be averaged first.
    alone, found = measurement.replicas is None, {}
    for p in apart:
        sums = layer_sums(probes[p], products[p])
        found[p] = refresh(probes[p].rows, sums, groups[p]) if alone else sums
    for members in together.values():
        mine, theirs, options = ([x[p] for p in members] for x in (probes, products, groups))
        new = launch.launch(mine, theirs, options, plans, finish=alone)  # type: ignore[arg-type]
        found.update(zip(members, new, strict=True))
    ordered = [found[p] for p in range(len(probes))]  # the same order on all replicas, whatever serves them
    if measurement.replicas is None or not ordered:
        return ordered
    averaged = ddp.average(ordered, measurement.replicas)
    return [refresh(probe.rows, sums, group) for probe, sums, group in zip(probes, averaged, groups, strict=True)]
