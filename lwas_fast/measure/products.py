"""Hessian-vector products by automatic differentiation: reverse over reverse, on the graph of the step's own loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lwas_fast.interrupts import open_to_interrupts
from lwas_fast.measure.probes import Probe, Products, passes, power_of_two, reach, shares


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


def leaves_of(*outputs: Tensor) -> list[Tensor]:
    """Every leaf that ``backward()`` of a loss, or of any of some tensors, would give a gradient, in a fixed order."""
    found = {output: None for output in outputs if output.grad_fn is None and output.requires_grad}
    found |= {node.variable: None for node in _nodes(outputs) if hasattr(node, "variable")}  # AccumulateGrad nodes
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
        RuntimeError: In autograd's own words, for `explain`.
    """
    for node in _nodes(outputs):
        if (message := _CUTS.get(node.name())) is not None:
            raise RuntimeError(message)


def _products(
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], vectors: Sequence[Tensor], keep: bool
) -> list[Tensor | None]:
    """The Hessian times `vectors`; None for a parameter that the gradient does not depend on.

    NaN for one that was frozen while a gradient of it stands: the step takes that along, without knowing its curvature.
    """
    # A gradient that is constant in the parameters (a loss linear in them) has no graph, and its product is zero.
    pairs = zip(gradients, vectors, strict=True)
    live = [(g, v.to(g.dtype)) for g, v in pairs if g is not None and g.requires_grad]
    if not live:
        return [None] * len(params)
    outputs, weights = zip(*live, strict=True)
    moving = [param for param in params if param.requires_grad]
    with open_to_interrupts():
        found = iter(torch.autograd.grad(outputs, moving, weights, retain_graph=keep, allow_unused=True))
    whole = zip(params, vectors, strict=True)
    return [next(found) if param.requires_grad else torch.full_like(vector, torch.nan) for param, vector in whole]


# Under a loss scale, directions are taken as long as this share of the weights. The products are then changes of the
# scaled gradient that are smaller than itself, which is as large as float16 allows. Less would lose their last digits.
_REACH = 2.0**-7


def _into_range(probes: Sequence[Probe], estimator: str) -> list[Tensor]:
    """For each probe (S,), what its layers' directions are multiplied by under a loss scale.

    A power of two, so that it rounds nothing where nothing leaves the range; the same for all that share a product.
    """
    lengths = [_REACH * reaches for reaches in reach(probes)]
    if estimator == "signs" and probes:
        least = torch.stack([length.amin().to(lengths[0].device) for length in lengths]).amin()
        lengths = [least.to(length.device).expand_as(length) for length in lengths]
    powers = [power_of_two(length) for length in lengths]
    return [torch.where(power.isfinite() & (power > 0), power, 1.0) for power in powers]


def by_autograd(
    probes: Sequence[Probe],
    gradients: Sequence[Sequence[Tensor | None]],
    estimator: str,
    scaled: bool,
    keep: bool = False,
) -> list[Products]:
    """Take the products of each probe by reverse over reverse.

    Args:
        probes: What to measure along.
        gradients: For each probe, the raw gradients of its tensors with their graph; None where this process's loss has
            none.
        estimator: See `probes`.
        scaled: Whether they are of a loss under a loss scale: see `_into_range`.
        keep: Whether their graph, and that of the loss, will be asked again; else this releases them.
    """
    factors = shares(probes, estimator)
    if scaled:
        factors = [share * more for share, more in zip(factors, _into_range(probes, estimator), strict=True)]
    of_tensors = [probe.selection.per_tensor(factor) for probe, factor in zip(probes, factors, strict=True)]
    for probe, numbers in zip(probes, of_tensors, strict=True):  # in place: powers of two can be taken out again
        torch._foreach_mul_(probe.vectors.directions, numbers)
    found: list[list[Tensor | None]] = [[None] * len(probe.selection.params) for probe in probes]
    rounds = passes(probes, estimator)
    for members in rounds:
        products = _products(
            [gradients[p][i] for p, i in members],
            [probes[p].selection.params[i] for p, i in members],
            [probes[p].vectors.directions[i] for p, i in members],
            keep=keep or members is not rounds[-1],
        )
        for (p, i), product in zip(members, products, strict=True):
            found[p][i] = product
    for probe, numbers in zip(probes, of_tensors, strict=True):
        torch._foreach_div_(probe.vectors.directions, numbers)
    scales = [probe.scale / factor for probe, factor in zip(probes, factors, strict=True)]
    return [Products(*pair) for pair in zip(found, scales, strict=True)]
