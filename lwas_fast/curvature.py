r"""The curvature of the loss along each layer's direction, from Hessian-vector products.

With d the probe direction, cut into layers, and H the Hessian:

* ``"signs"``: one product Hv with v = (z_1 d_1, ..., z_L d_L), z = ±1 drawn anew;
  :math:`z_i \langle d_i, (Hv)_i\rangle` is an unbiased estimate of the layer's own
  :math:`\langle d_i, H_{ii} d_i\rangle`, for the cross terms carry :math:`z_i z_j`.
* ``"joint"``: one product on d; :math:`\langle d_i, (Hd)_i\rangle` contains the cross terms.
* ``"blocks"``: one product a layer, exact.

Products come from autograd here (reverse over reverse, on the graph of the step's own loss) or from differences of
gradients (`finite_difference.py`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lwas_fast.layers import Bucket, Selection
from lwas_fast.rates import Sums


class ProbeVectors(NamedTuple):
    """Of one tensor: gradient (with L2), probe direction, momentum before this gradient (NaN when there is none)."""

    gradient: Tensor
    direction: Tensor
    momentum: Tensor


@dataclass
class Probe:
    """The vectors of one bucket's measurement.

    Attributes:
        bucket: Where the layers are.
        selection: The tensors that have a gradient.
        vectors: Theirs, in that order.
        scale: What the raw gradient and the raw product are to be multiplied by: micro-batches in the window, over the
            loss scale, negative for maximize. A float or a tensor without dimension.
    """

    bucket: Bucket
    selection: Selection
    vectors: list[ProbeVectors]
    scale: Tensor | float

    @property
    def directions(self) -> list[Tensor]:
        """The tensors' probe directions."""
        return [v.direction for v in self.vectors]


def draw_signs(seed: int, step: int, count: int) -> list[float]:
    """Draw ±1 for each layer, a function of seed and step alone.

    So replicas of a distributed run draw alike, a resumed run repeats the signs of the unbroken one, and nobody else's
    random numbers are touched.
    """
    bits = random.Random(f"{seed}:{step}").getrandbits(count) if count else 0
    return [1.0 if bits >> i & 1 else -1.0 for i in range(count)]


def tensor_signs(probes: Sequence[Probe], signs: Sequence[float]) -> list[list[float]]:
    """Hand each probe's tensors their layers' signs; `signs` runs over the layers of all probes in order."""
    found, start = [], 0
    for probe in probes:
        found.append([signs[start + s] for s in probe.selection.layer])
        start += len(probe.selection.floor)
    return found


def layer_sums(probe: Probe, products: Sequence[Tensor | None]) -> Tensor:
    """Reduce a measurement to what the rates need.

    Args:
        probe: The vectors.
        products: For each tensor its part of the Hessian-vector product, signs and scale taken out; None is zero.

    Returns:
        (S, len(Sums)), one row for each layer of the selection.
    """
    rows = []
    dtype = probe.bucket.table.dtype
    for (gradient, direction, momentum), product in zip(probe.vectors, products, strict=True):
        nothing = direction.new_zeros(())
        values = {
            Sums.DESCENT: -(gradient * direction).sum(),
            Sums.CURVATURE: nothing if product is None else (direction * product).sum(),
            Sums.SQUARE: direction.square().sum(),
            Sums.SIGNAL: -(direction * momentum).sum(),
        }
        rows.append(torch.stack([values[column].to(dtype) for column in Sums]))
    return probe.selection.per_layer(torch.stack(rows))


def _nodes(outputs: Iterable[Tensor]) -> Iterator[Node]:
    """Every node of the graph of some tensors, once, in a fixed order."""
    stack = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Every leaf that ``loss.backward()`` would give a gradient, in a fixed order."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    found = {node.variable: None for node in _nodes([loss]) if hasattr(node, "variable")}  # AccumulateGrad nodes
    return list(found)


# Nodes that stand for a backward pass without derivative, and what autograd says when it comes to one. It need not come
# to it: inputs saved without their graph, as these do, leave no path from the node to the parameters.
_CUTS = {
    "torch::autograd::Error": "trying to differentiate twice a function that was marked with @once_differentiable",
    # In the loss's own graph: torch 2.11 leaves no trace of it in that of the gradients, and takes the curvature as 0.
    "CompiledFunctionBackward": "torch.compile with aot_autograd does not currently support double backward",
}


def refuse_cut_graph(outputs: Iterable[Tensor]) -> None:
    """Refuse a loss, or gradients, behind a function differentiable once: autograd may take its part as 0, silently.

    Raises:
        RuntimeError: In autograd's own words, for `errors.explain`.
    """
    for node in _nodes(outputs):
        if (message := _CUTS.get(node.name())) is not None:
            raise RuntimeError(message)


def _products(
    gradients: Sequence[Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor], keep: bool
) -> list[Tensor | None]:
    """The Hessian times `vectors`; None for a parameter that the gradient does not depend on."""
    # A gradient that is constant in the parameters (a loss linear in them) has no graph, and its product is zero.
    live = [(g, v.to(g.dtype)) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not live:
        return [None] * len(params)
    outputs, weights = zip(*live, strict=True)
    return list(torch.autograd.grad(outputs, params, weights, retain_graph=keep, allow_unused=True))


def by_autograd(
    probes: Sequence[Probe], gradients: Sequence[Sequence[Tensor]], estimator: str, signs: Sequence[float]
) -> Iterator[Tensor]:
    """Measure by reverse over reverse.

    Args:
        probes: What to measure along.
        gradients: For each probe, the raw gradients of its tensors with their graph, which is released by this.
        estimator: "signs", "joint" or "blocks".
        signs: ±1 for each layer of all probes; used by "signs".

    Yields:
        For each probe, its (S, len(Sums)).
    """
    if estimator == "blocks":
        blocks = [(p, s) for p, probe in enumerate(probes) for s in range(len(probe.selection.floor))]
        parts: list[list[Tensor | None]] = [[None] * len(probe.vectors) for probe in probes]
        for p, s in blocks:
            members = [i for i, layer in enumerate(probes[p].selection.layer) if layer == s]
            found = _products(
                [gradients[p][i] for i in members],
                [probes[p].selection.params[i] for i in members],
                [probes[p].vectors[i].direction for i in members],
                keep=(p, s) != blocks[-1],
            )
            for i, product in zip(members, found, strict=True):
                parts[p][i] = product
        factors = [[1.0] * len(probe.vectors) for probe in probes]
    else:
        factors = tensor_signs(probes, signs)
        if estimator == "joint":
            factors = [[1.0] * len(f) for f in factors]
        vectors = [
            v * f for probe, fs in zip(probes, factors, strict=True) for v, f in zip(probe.directions, fs, strict=True)
        ]
        flat = _products(
            [g for gs in gradients for g in gs], [w for p in probes for w in p.selection.params], vectors, keep=False
        )
        rest = iter(flat)
        parts = [[next(rest) for _ in probe.vectors] for probe in probes]
    for probe, part, fs in zip(probes, parts, factors, strict=True):
        scaled = [
            None if h is None else h.to(d.dtype) * (f * probe.scale)
            for h, d, f in zip(part, probe.directions, fs, strict=True)
        ]
        yield layer_sums(probe, scaled)
