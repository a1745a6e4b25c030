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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lwas_fast.layers import Bucket, Selection


class Here(NamedTuple):
    """Where a measurement is to be made: a list each, of one entry for each parameter.

    Attributes:
        states: The optimizer's.
        weights: The parameters, in the dtype of their state.
        gradients: Theirs, of the loss to be minimised, likewise.
        steps: The number (N,) of their next update, in the dtype of the statistics.
        factors: What the ascent direction is to be multiplied by: minus the sign of the parameter's layer.
    """

    states: list[dict[str, Any]]
    weights: list[Tensor]
    gradients: list[Tensor]
    steps: Tensor
    factors: list[float]


class Vectors(NamedTuple):
    """What is measured along: a list each, of one tensor for each parameter, in the dtype of its state.

    Attributes:
        gradients: Gradients (with L2); where None, a gradient is minus its direction. May be of the parameter's dtype.
        directions: Probe directions times their layers' signs: what Hessian-vector products are taken with.
        momenta: Averages of the gradient before this one, not corrected for bias; None where nobody asks for the
            share of signal.
    """

    gradients: list[Tensor] | None
    directions: list[Tensor]
    momenta: list[Tensor] | None


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
        decay: Of the momenta.
    """

    bucket: Bucket
    selection: Selection
    vectors: Vectors
    signs: list[float]
    scale: Tensor | float
    decay: float

    @property
    def rows(self) -> Tensor:
        """The layers' statistics: (S, len(rates.Column))."""
        return self.bucket.table[self.selection.rows]


class Products(NamedTuple):
    """Hessian times the directions of a probe.

    Attributes:
        tensors: For each parameter its part; None is zero.
        factor: What they are to be multiplied by: a float, or a tensor without dimension, or (S,), by layer.
    """

    tensors: list[Tensor | None]
    factor: Tensor | float


def draw_signs(seed: int, step: int, count: int) -> list[float]:
    """Draw ±1 for each layer, a function of seed and step alone.

    So replicas of a distributed run draw alike, a resumed run repeats the signs of the unbroken one, and nobody else's
    random numbers are touched.
    """
    bits = random.Random(f"{seed}:{step}").getrandbits(count) if count else 0
    return [1.0 if bits >> i & 1 else -1.0 for i in range(count)]


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
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], vectors: Sequence[Tensor], keep: bool
) -> list[Tensor | None]:
    """The Hessian times `vectors`; None for a parameter that the gradient does not depend on."""
    # A gradient that is constant in the parameters (a loss linear in them) has no graph, and its product is zero.
    pairs = zip(gradients, vectors, strict=True)
    live = [(g, v.to(g.dtype)) for g, v in pairs if g is not None and g.requires_grad]
    if not live:
        return [None] * len(params)
    outputs, weights = zip(*live, strict=True)
    return list(torch.autograd.grad(outputs, params, weights, retain_graph=keep, allow_unused=True))


def by_autograd(
    probes: Sequence[Probe], gradients: Sequence[Sequence[Tensor | None]], estimator: str
) -> list[Products]:
    """Take Hessian-vector products by reverse over reverse.

    Args:
        probes: What to measure along.
        gradients: For each probe, the raw gradients of its tensors with their graph, which is released by this; None
            where this process's loss has none.
        estimator: "signs" or "joint" (one product on all directions), or "blocks" (one a layer).

    Returns:
        The products, one for each probe.
    """
    found: list[list[Tensor | None]] = [[None] * len(probe.selection.params) for probe in probes]
    passes = product_passes(probes, estimator)
    for members in passes:
        products = _products(
            [gradients[p][i] for p, i in members],
            [probes[p].selection.params[i] for p, i in members],
            [probes[p].vectors.directions[i] for p, i in members],
            keep=members is not passes[-1],
        )
        for (p, i), product in zip(members, products, strict=True):
            found[p][i] = product
    return [Products(tensors, probe.scale) for probe, tensors in zip(probes, found, strict=True)]


def product_passes(probes: Sequence[Probe], estimator: str) -> list[list[tuple[int, int]]]:
    """Which tensors, as (probe, position), take part in which product: all in one, or a layer in each."""
    everything = [(p, i) for p, probe in enumerate(probes) for i in range(len(probe.selection.params))]
    if estimator != "blocks":
        return [everything]
    layers: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for p, i in everything:
        layers.setdefault((p, probes[p].selection.layer[i]), []).append((p, i))
    return list(layers.values())
