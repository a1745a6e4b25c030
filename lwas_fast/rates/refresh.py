"""Taking a measurement into the statistics of its layers, by the implementation that serves.

In a distributed run the layers' sums are averaged over the replicas before they are taken in: three numbers a layer
travel, not the Hessian-vector products.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lwas_fast.layers import Bucket, Groups, Layout
from lwas_fast.measure import Measurement, Probe, Vectors, explain, out_of_memory, squared_lengths
from lwas_fast.options import RANGES
from lwas_fast.parallel import ddp
from lwas_fast.profiling import span
from lwas_fast.rates import launch, when
from lwas_fast.rates.closed_form import current, layer_sums, refresh
from lwas_fast.rule import Rule, Scaling
from lwas_fast.selection import Selection
from lwas_fast.shards import add_up, mesh_of, version
from lwas_fast.table import Column, Sums


class Part(NamedTuple):
    """What a measurement found of one selection of layers.

    Attributes:
        probe: What was measured along, without its vectors.
        sums: (S, len(Sums)).
        rows: What the statistics are to become, (S, len(Column)).
    """

    probe: Probe
    sums: Tensor
    rows: Tensor


class Measured(NamedTuple):
    """What a measurement leaves for the next step.

    Attributes:
        due: Numbers of the parameter groups that were to be measured.
        parts: What it found.
        gradients: Those it left in ``.grad``, each with its version: a step may find them changed.
    """

    due: list[int]
    parts: list[Part]
    gradients: list[tuple[Tensor, Tensor | None, int]]


@torch.no_grad()
def refreshed(measurement: Measurement, groups: Groups, plans: launch.Plans) -> Measured | Exception | None:
    """Work out what the statistics of the layers are to become; nothing is changed but `plans`.

    An exception if that takes more memory than there is, and no other process waits for this one's numbers.
    None if this process could not measure, nor could any of its replicas. If some could, no layer has a number.
    """
    probes = measurement.probes
    try:
        with span("rates"):
            found = _found(measurement, [groups[probe.bucket.group] for probe in probes], plans)
    except Exception as error:
        if not out_of_memory(error) or not measurement.alone:
            raise
        return explain(error) or error
    if found is None:
        return None
    sums, rows = found
    params = [param for probe in probes for param in probe.selection.params]
    gradients = [(p, p.grad, 0 if p.grad is None else version(p.grad)) for p in params]
    bare = [replace(probe, vectors=Vectors(None, [])) for probe in probes]  # those need not wait for the step
    return Measured(measurement.due, [Part(*part) for part in zip(bare, sums, rows, strict=True)], gradients)


@torch.no_grad()
def of_this_step(measured: Measured, layout: Layout, rule: Rule, scaling: Scaling) -> Measured:
    """The measurement as rates of the directions that the step is about to take.

    A gradient that is clipped after it was measured gives another direction: of Adam's, for clipped gradients are what
    its second moments know. Shorter by a factor in one layer, it asks for a rate that is longer by that factor.
    """
    untouched = all(
        grad is not None and param.grad is grad and version(grad) == seen and mesh_of(grad) is None
        for param, grad, seen in measured.gradients
    )
    if not rule.normalizes or untouched:
        return measured
    changed = []
    lengths = squared_lengths(layout, rule, [part.probe for part in measured.parts], scaling)
    for part, now in zip(measured.parts, lengths, strict=True):
        square = (now / part.sums[:, Sums.SQUARE]).to(part.sums)
        square = torch.where((square > 0) & square.isfinite(), square, 1.0)
        sums = part.sums.clone()
        sums[:, Sums.DESCENT] *= square.sqrt()
        sums[:, Sums.CURVATURE] *= square
        changed.append(sums)
    probes = [part.probe for part in measured.parts]
    rows = refresh(probes, changed, [layout.group_of(probe.bucket) for probe in probes])
    return measured._replace(parts=[Part(*part) for part in zip(probes, changed, rows, strict=True)])


class Outcome:
    """Which layers a measurement found no number for, on its way from the device."""

    def __init__(self, measured: Measured, groups: Groups, found_inf: Tensor | None):
        self._due = [(number, groups[number], groups[number]["last_refresh"]) for number in measured.due]
        self._events: list[Any] = []
        self._skipped = None if found_inf is None else self._sent(found_inf.reshape(1) != 0)
        self._parts: list[tuple[Bucket, Selection, Tensor]] = []
        self._medians: list[tuple[int, Tensor]] = []
        for probe, _, rows in measured.parts:
            bucket, selection = probe.bucket, probe.selection
            lost = rows[:, Column.REFRESHES] == bucket.table[selection.rows][:, Column.REFRESHES]
            self._parts.append((bucket, selection, self._sent(lost & (selection.elements > 0))))
            rate = current(rows, groups[bucket.group]["warmup_rate"]).median()
            self._medians.append((bucket.group, self._sent(rate)))

    def _sent(self, values: Tensor) -> Tensor:
        if not values.is_cuda:
            return values
        # To wait for it here would hold the host up at every measurement.
        there = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        there.copy_(values, non_blocking=True)
        self._events.append(torch.cuda.current_stream(values.device).record_event())
        return there

    def tell(self) -> list[str]:
        """Have groups that lack a number measured at once; give the layers that were tried often enough."""
        for event in self._events:
            event.synchronize()
        if self._skipped is not None and self._skipped.any():  # GradScaler skips this step: that is no try
            for _, group, last_refresh in self._due:
                group["last_refresh"], group["next_refresh"] = last_refresh, group["steps"]
            return []
        medians: dict[int, list[float]] = {}
        for number, median in self._medians:
            medians.setdefault(number, []).append(median.item())
        for number, group, _ in self._due:
            if number in medians and RANGES["lr"][0](group["lr"]):  # of those on each device; `step` refuses another lr
                group["effective_lr"] = float(group["lr"]) * statistics.median(medians[number])
        given_up = []
        for number, group, _ in self._due:
            lost = []
            for bucket, selection, flags in self._parts:
                if bucket.group == number:
                    rows = dict.fromkeys(bucket.row[i] for i in selection.indices)
                    lost += [bucket.names[row] for row, flag in zip(rows, flags.tolist(), strict=True) if flag]
            given_up += when.retry(group, lost)
        if any(when.tries_again(group) for _, group, _ in self._due):  # steps depend on each other: measured together
            for _, group, _ in self._due:
                group["next_refresh"] = group["steps"]
        return given_up


def take_in(measured: Measured, groups: Groups, found_inf: Tensor | None) -> Outcome:
    """Enter new rows into the statistics, and set when each group is measured next.

    `found_inf`, where there is one, is not 0 if GradScaler skips this step.
    """
    outcome = Outcome(measured, groups, found_inf)
    for probe, _, rows in measured.parts:
        bucket, selection = probe.bucket, probe.selection
        if found_inf is not None:  # what did not overflow was measured without the rest
            rows = torch.where(found_inf.to(rows.device) == 0, rows, bucket.table[selection.rows])
        bucket.table[selection.rows] = rows
    with_gradient = {part.probe.bucket.group for part in measured.parts}
    for number in measured.due:
        when.schedule(groups[number], number in with_gradient)
    return outcome


def _found(
    measurement: Measurement, groups: Groups, plans: launch.Plans
) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
    """For each probe its sums and new rows; `groups` has its hyperparameters. None: see `refreshed`."""
    probes, replicas = measurement.probes, measurement.replicas
    served = [launch.serves(group, probe) for probe, group in zip(probes, groups, strict=True)]
    # Promises of all layers are added up: one launch does so itself, of several and of several processes come sums.
    if measurement.alone and all(served) and len(set(map(launch.launch_key, probes))) == 1:
        return launch.launch(probes, measurement.products, groups, plans)
    if measurement.failure is None:
        sums = _sums(measurement, groups, plans, served)
    else:
        sums = [torch.full((len(probe.signs), len(Sums)), torch.nan).to(probe.bucket.table) for probe in probes]
    sums = add_up(sums, [probe.selection.shards for probe in probes], average=True)
    if replicas is not None and probes:
        failed = torch.full_like(probes[0].loss, measurement.failure is not None)
        *sums, loss, failed = ddp.average([*sums, probes[0].loss, failed], replicas)
        if measurement.failure is not None and failed == 1:
            return None
        for probe in probes:
            probe.loss = loss.to(probe.loss)
    return sums, refresh(probes, sums, groups)


def _sums(measurement: Measurement, groups: Groups, plans: launch.Plans, served: Sequence[bool]) -> list[Tensor]:
    """For each probe this process's sums, by the launch where it serves; `groups` has its hyperparameters."""
    probes, products = measurement.probes, measurement.products
    found = {p: layer_sums(probes[p], products[p]) for p, by_launch in enumerate(served) if not by_launch}
    together: dict[Any, list[int]] = {}
    for p in (p for p, by_launch in enumerate(served) if by_launch):
        together.setdefault(launch.launch_key(probes[p]), []).append(p)
    for members in together.values():
        mine, theirs, options = ([x[p] for p in members] for x in (probes, products, groups))
        sums, _ = launch.launch(mine, theirs, options, plans, finish=False)  # type: ignore[arg-type]
        for p, of_probe in zip(members, sums, strict=True):
            spread = probes[p].selection.shards
            found[p] = of_probe if spread is None else spread.share_of_layers(of_probe)
    return [found[p] for p in range(len(probes))]  # the same order on all replicas, whatever serves them
