r"""What a measurement goes along, and what it finds: each layer's direction, and the Hessian times it.

With d the direction that the optimizer's step takes from the gradient alone, cut into layers, and H the Hessian:

* ``"signs"``: one product Hv with v = (z_1 d_1, ..., z_L d_L), z = ±1 drawn anew;
  :math:`z_i \langle d_i, (Hv)_i\rangle` is an unbiased estimate of the layer's own
  :math:`\langle d_i, H_{ii} d_i\rangle`, for the cross terms carry :math:`z_i z_j`. A layer that is far sharper than
  the others takes part with a share of its direction only: see `shares`.
* ``"blocks"``: one product a layer, exact.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lwas_fast import shards
from lwas_fast.layers import Bucket, Layout
from lwas_fast.rule import Here, Rule, Scaling, with_decay
from lwas_fast.selection import Selection, squared_norms, state_dtype
from lwas_fast.table import Column

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Window:
    """The micro-batches since the last step."""

    micro_batches: int = 0  # how many went through `backward`
    complete: bool = False  # whether the last one did: `step` comes next
    held_back: bool = False  # whether gradients of some are where nobody sees them yet


class Subject(NamedTuple):
    """What is measured, and how.

    Attributes:
        layout: The layers.
        rule: Of the optimizer.
        how: The options that hold for all groups: ``curvature``, ``hvp`` and ``seed``.
        due: Numbers of the groups that are to be measured.
        window: The micro-batches before this one.
        model: What is followed, if anything is.
        repeats: Whether a loss is known to have the same gradients when it is evaluated again.
    """

    layout: Layout
    rule: Rule
    how: dict[str, Any]
    due: list[int]
    window: Window
    model: nn.Module | None = None
    repeats: bool = False


class Vectors(NamedTuple):
    """What is measured along: a list each, of one tensor for each parameter, in the dtype of its state.

    Attributes:
        gradients: Gradients (with L2); where None, a gradient is minus its direction. May be of the parameter's dtype.
        directions: Directions times their layers' signs: what Hessian-vector products are taken with.
    """

    gradients: list[Tensor] | None
    directions: list[Tensor]


@dataclass
class Probe:
    """One bucket's measurement.

    Attributes:
        bucket: Where the layers are.
        selection: The tensors that have a gradient.
        vectors: Theirs, in that order.
        signs: ±1 for each layer of the selection.
        scale: What raw products are to be multiplied by: micro-batches in the window, over the loss scale, negative for
            maximize. A float or a tensor without dimension.
        loss: Size of the window's loss: a tensor without dimension, on the table's device and of its dtype.
        l2: What L2 adds to each layer's curvature, times the squared length: it is part of the loss, decoupled decay is
            not. Where it acts on a layer's matrix alone, its bias counts too, which is next to nothing.
        max_fall: See `Rule`.
    """

    bucket: Bucket
    selection: Selection
    vectors: Vectors
    signs: list[float]
    scale: Tensor | float
    loss: Tensor
    l2: Sequence[float]
    max_fall: float = math.inf

    @property
    def rows(self) -> Tensor:
        """The layers' statistics: (S, len(table.Column))."""
        return self.bucket.table[self.selection.rows]


class Products(NamedTuple):
    """Hessian times the directions of a probe.

    Attributes:
        tensors: For each parameter its part; None is zero.
        factor: What they are to be multiplied by: a float, or a tensor without dimension, or (S,), by layer.
    """

    tensors: list[Tensor | None]
    factor: Tensor | float


class Measurement(NamedTuple):
    """What a curvature pass hands on to the rates.

    Attributes:
        due: Numbers of the parameter groups that were to be measured.
        probes: What was measured along, of those that had a gradient.
        products: For each probe, the Hessian times its directions.
        replicas: The processes whose products, each of its share of the batch, are to be averaged.
        failure: Why this process could not measure, while its replicas may have; then there are no products.
        repeats: See `Subject`.
    """

    due: list[int]
    probes: list[Probe]
    products: list[Products]
    replicas: ProcessGroup | None = None
    failure: Exception | None = None
    repeats: bool = False

    @property
    def alone(self) -> bool:
        """Whether no other process has a part in it."""
        return self.replicas is None and all(probe.bucket.mesh is None for probe in self.probes)


def draw_signs(seed: int, step: int, count: int) -> list[float]:
    """Draw ±1 for each layer, a function of seed and step alone.

    So replicas of a distributed run draw alike, a resumed run repeats the signs of the unbroken one, and nobody else's
    random numbers are touched.
    """
    bits = random.Random(f"{seed}:{step}").getrandbits(count) if count else 0
    return [1.0 if bits >> i & 1 else -1.0 for i in range(count)]


@torch.no_grad()
def make_probes(
    subject: Subject,
    gradients: dict[Tensor, Tensor],
    scale: Tensor | float,
    of_products: Tensor | float,
    loss: Tensor,
    last: dict[Tensor, Tensor] | None = None,
) -> list[Probe]:
    """Make a probe for each bucket of the groups due of which anything has a gradient.

    Args:
        subject: What is measured.
        gradients: Raw ones, of the parameters that have one: directions are of these.
        scale: Turns them into estimates of the window's: see `Probe.scale`.
        of_products: Likewise the products, and gradients of this micro-batch alone.
        loss: Of this micro-batch, without a loss scale.
        last: Raw gradients of this micro-batch alone, where others are accumulated in `gradients`. Descent is then
            taken from these, as curvature and loss are: of a part of the window's loss all three are the same part of
            the whole, however large, and it cancels.
    """
    size = loss.detach().reshape(()).abs() * (subject.window.micro_batches + 1)
    layout = subject.layout
    there = []
    for bucket in layout.buckets:
        present = [i for i, p in enumerate(bucket.params) if p in gradients]
        if present and bucket.group in subject.due:
            there.append((bucket, bucket.select(present)))
    steps = max((layout.group_of(bucket)["steps"] for bucket, _ in there), default=0)
    signs = draw_signs(subject.how["seed"], steps, sum(len(selection.elements) for _, selection in there))
    if subject.how["curvature"] == "blocks":  # whose products have no terms between layers
        signs = [1.0] * len(signs)
    probes = []
    for bucket, selection in there:
        group = layout.group_of(bucket)
        own, signs = signs[: len(selection.elements)], signs[len(selection.elements) :]
        factor, of_product = (-scale, -of_products) if group["maximize"] else (scale, of_products)
        as_is = isinstance(factor, float) and factor == 1.0
        dtypes = [state_dtype(p) for p in selection.params]
        raw = [shards.local_like(p, gradients[p].detach()) for p in selection.params]
        scaled = [g.to(dtype) if as_is else g.to(dtype) * factor for g, dtype in zip(raw, dtypes, strict=True)]
        here = _here(layout, bucket, selection, scaled, [-own[layer] for layer in selection.layer])
        used, directions = subject.rule.directions(group, here)
        if used is scaled and as_is:
            used = raw  # half the memory, where it is of half precision
        l2 = 0.0 if subject.rule.decoupled else group["weight_decay"]
        if last is not None:
            parts = [last[p].detach() if p in last else torch.zeros_like(p) for p in selection.params]
            parts = list(map(shards.local_like, selection.params, parts))
            used = [g.to(dtype) * of_product for g, dtype in zip(parts, dtypes, strict=True)]
            used = with_decay(used, here.weights, here.decays, l2)
        acting = {selection.layer[i] for i in selection.decays}
        of_layers = [l2 if layer in acting else 0.0 for layer in range(len(own))]
        max_fall = subject.rule.max_fall
        here_size = size.to(bucket.table)
        probes.append(
            Probe(bucket, selection, Vectors(used, directions), own, of_product, here_size, of_layers, max_fall)
        )
    return probes


def blank_probes(subject: Subject, loss: Tensor) -> list[Probe]:
    """The probes that `make_probes` gives for the gradients in ``.grad``, without directions."""
    found = []
    for bucket in subject.layout.buckets:
        present = [i for i, p in enumerate(bucket.params) if p.grad is not None]
        if present and bucket.group in subject.due:
            selection, size = bucket.select(present), loss.detach().reshape(()).abs().to(bucket.table)
            none = [0.0] * len(selection.elements)
            found.append(Probe(bucket, selection, Vectors(None, []), none, 1.0, size, none, subject.rule.max_fall))
    return found


def _here(layout: Layout, bucket: Bucket, selection: Selection, gradients: list[Tensor], factors: list[float]) -> Here:
    return Here(
        [shards.local_state(state, state.keys()) for state in map(partial(layout.state_of, bucket), selection.indices)],
        [p.detach().to(state_dtype(p)) for p in selection.here],
        gradients,
        selection.decays,
        torch.stack([bucket.counts[i] for i in selection.indices]).to(selection.dtype) + 1,
        factors,
    )


@torch.no_grad()
def squared_lengths(layout: Layout, rule: Rule, probes: Sequence[Probe], scaling: Scaling) -> list[Tensor]:
    """For each probe (S,), the squared norms of its directions as the gradients in ``.grad`` now have them."""
    found = []
    for probe in probes:
        selection = probe.selection
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in selection.params]
        gradients = [
            shards.local_like(p, g).to(state_dtype(p)) for g, p in zip(gradients, selection.params, strict=True)
        ]
        if scaling.grad_scale is not None:
            scale = scaling.grad_scale.to(selection.elements.device).reshape(())
            gradients = list(torch._foreach_div(gradients, scale))
        here = _here(layout, probe.bucket, selection, gradients, [1.0] * len(gradients))
        directions = rule.directions(layout.group_of(probe.bucket), here)[1]
        found.append(selection.share(squared_norms(directions, probe.bucket.table.dtype)))
    return shards.add_up(found, [probe.selection.shards for probe in probes], average=True)


@torch.no_grad()
def reach(probes: Sequence[Probe]) -> list[Tensor]:
    """For each probe (S,), what makes a layer's direction as long as its weights; infinite where there is none."""
    squares = []
    for probe in probes:
        directions, dtype = probe.vectors.directions, probe.bucket.table.dtype
        weights = [w.detach().to(d.dtype) for w, d in zip(probe.selection.here, directions, strict=True)]
        both = torch.stack([squared_norms(tensors, dtype) for tensors in (weights, directions)], 1)
        squares.append(probe.selection.share(both))
    found = []
    of_all = shards.add_up(squares, [probe.selection.shards for probe in probes], average=True)
    for probe, both in zip(probes, of_all, strict=True):
        size, along = both.unbind(1)
        found.append(torch.where(along > 0, (size.maximum(probe.selection.floor.square()) / along).sqrt(), torch.inf))
    return found


# Of a layer dominated by another's terms only the root of the true ratio shows, so this should be small. But ordinary
# layers reach 25 (the hidden layer of the demo's CNN) and 70 (SGDLW's embeddings). See docs/method.md.
_LONE = 100.0


@torch.no_grad()
def shares(probes: Sequence[Probe], estimator: str, lengths: Sequence[Tensor] | None = None) -> list[Tensor]:
    """For each probe (S,), how much of each layer's direction takes part in a product with others: mostly 1.

    With "signs" the terms between two layers, about the product of their deltas, cancel on average only. Where one
    layer's curvature is absurd (1e15: LayerNorm over pixels that are all 0), they drown what is to be measured of the
    others. Such a layer's direction is shortened to what makes its delta that of all ordinary layers together: then it
    about doubles the noise of theirs, and what they leave in its own estimate is about as much as that is. Shares are
    powers of two, which round nothing. Deltas are those of the last measurement, times `lengths` (for each probe (S,))
    where directions are multiplied by such.
    """
    if estimator != "signs" or not probes:
        return [torch.ones_like(probe.rows[:, Column.WEIGHT]) for probe in probes]
    deltas = []
    for p, probe in enumerate(probes):
        delta = probe.rows[:, Column.CURVATURE].abs().sqrt() * (1.0 if lengths is None else lengths[p])
        deltas.append(torch.where(delta > 0, delta, torch.nan))  # not measured yet, or not along now: no part of it
    ordered, median = ordered_with_median(deltas)
    most = _LONE * median
    ordinary = (ordered / median).where(ordered <= most, 0.0).norm() * median  # squares stay in range
    found = []
    for delta in deltas:
        share = power_of_two(ordinary.to(delta) / delta).clamp(max=1.0)
        found.append(torch.where(delta > most.to(delta), share, 1.0))
    return found


def ordered_with_median(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The numbers of all these tensors in order, NaN last, on the first one's device; and the median but for NaN."""
    ordered = torch.cat([value.to(values[0].device) for value in values]).sort().values
    half = (ordered.isfinite().sum() - 1).clamp(min=0) // 2
    return ordered, ordered.gather(0, half.view(1))[0]  # not nanmedian, which may wait for the device to know an index


def power_of_two(values: Tensor) -> Tensor:
    """The greatest powers of two not above some numbers greater than 0."""
    return values / (2 * torch.frexp(values).mantissa)


def passes(probes: Sequence[Probe], estimator: str) -> list[list[tuple[int, int]]]:
    """Which tensors, as (probe, position), take part in which product: all in one, or a layer in each."""
    everything = [(p, i) for p, probe in enumerate(probes) for i in range(len(probe.selection.params))]
    if estimator == "signs":
        return [everything]
    if estimator != "blocks":
        raise NotImplementedError(estimator)
    layers: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for p, i in everything:
        layers.setdefault((p, probes[p].selection.layer[i]), []).append((p, i))
    return list(layers.values())
