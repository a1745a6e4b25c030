"""A measurement: from the loss of this step to each layer's sums, by autograd or by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lwas_fast import distributed, groups
from lwas_fast.curvature import Here, Probe, Products, Vectors, by_autograd, draw_signs, leaves_of, refuse_cut_graph
from lwas_fast.errors import explain
from lwas_fast.finite_difference import Replay, by_differences
from lwas_fast.layers import Bucket, Selection, state_dtype
from lwas_fast.profiling import span
from lwas_fast.refresh import refreshed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lwas_fast.optimizer import LayerwiseOptimizer


@dataclass
class Measured:
    """What `backward` leaves for `step`: groups that were due, and the statistics that rows are to become."""

    groups: list[int]
    rows: list[tuple[Probe, Tensor]]


def _scalar(loss: object, what: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{what} must be the loss as a tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{what} must be a scalar, not of shape {tuple(loss.shape)}: reduce it (mean or sum) first")
    if not loss.requires_grad:
        raise ValueError(f"{what} has no graph: compute it from the parameters, with gradients enabled")
    return loss


def backward(
    opt: LayerwiseOptimizer,
    loss: Tensor | Callable[[], Tensor],
    due: bool,
    scaler: Any,
    ddp: DistributedDataParallel | None,
) -> Tensor:
    """Do what `LayerwiseOptimizer.backward` says; `due` says whether to measure.

    Returns:
        The loss, detached.
    """
    evaluates = callable(loss) and not isinstance(loss, Tensor)
    differences = opt._whole["hvp"] == "finite_difference"
    if differences and not evaluates:
        raise TypeError(
            'hvp="finite_difference" evaluates the loss twice: call opt.backward(closure) with a callable that returns '
            "the loss, or opt.step(closure) with PyTorch's usual closure"
        )

    def forward() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            value = loss() if evaluates else loss  # type: ignore[operator]
            value = _scalar(value, "what the closure returns" if evaluates else "the argument of opt.backward()")
            return value, value if scaler is None else scaler.scale(value)

    if not due:
        value, scaled = forward()
        scaled.backward()  # type: ignore[no-untyped-call]
    elif differences:
        value = _differences_of(opt, forward, scaler)
    else:
        value, scaled = forward()
        distributed.check(ddp)
        opt._measured = _autograd(opt, scaled, _scale(value, scaler, opt._micro_batches), ddp)
    return value.detach()


def _scale(loss: Tensor, scaler: Any, earlier: int) -> Tensor | float:
    """What turns this micro-batch's raw gradient into an estimate of the window's."""
    window = earlier + 1
    return float(window) if scaler is None else window / scaler.scale(torch.ones((), device=loss.device))


@torch.no_grad()
def _probes(
    opt: LayerwiseOptimizer, gradients: dict[Tensor, Tensor], scale: Tensor | float, of_products: Tensor | float
) -> list[Probe]:
    """Probe every group that is due; the scales turn gradients and products into estimates of the window's."""
    due = []
    for bucket in opt._buckets:
        present = [i for i, p in enumerate(bucket.params) if p in gradients]
        if present and opt._due(opt.param_groups[bucket.group]):
            due.append((bucket, bucket.select(present)))
    steps = max((opt.param_groups[bucket.group]["steps"] for bucket, _ in due), default=0)
    signs = draw_signs(opt._whole["seed"], steps, sum(len(selection.elements) for _, selection in due))
    if opt._whole["curvature"] != "signs":
        signs = [1.0] * len(signs)
    probes = []
    for bucket, selection in due:
        own, signs = signs[: len(selection.elements)], signs[len(selection.elements) :]
        probes.append(_probe(opt, bucket, selection, own, gradients, scale, of_products))
    return probes


def _probe(
    opt: LayerwiseOptimizer,
    bucket: Bucket,
    selection: Selection,
    signs: list[float],
    gradients: dict[Tensor, Tensor],
    scale: Tensor | float,
    of_products: Tensor | float,
) -> Probe:
    group = opt.param_groups[bucket.group]
    if group["maximize"]:
        scale, of_products = -scale, -of_products
    as_is = isinstance(scale, float) and scale == 1.0
    states = [opt._state_of(bucket, i) for i in selection.indices]
    dtypes = [state_dtype(p) for p in selection.params]
    raw = [gradients[p].detach() for p in selection.params]
    scaled = [g.to(dtype) if as_is else g.to(dtype) * scale for g, dtype in zip(raw, dtypes, strict=True)]
    weights = [p.detach().to(dtype) for p, dtype in zip(selection.params, dtypes, strict=True)]
    steps = torch.stack([bucket.counts[i] for i in selection.indices]).to(selection.dtype) + 1
    factors = [-signs[layer] for layer in selection.layer]
    used, directions = opt._directions(group, Here(states, weights, scaled, steps, factors))
    if used is scaled and as_is:
        used = raw  # half the memory, where it is of half precision
    heard = group["noise_exponent"] > 0
    momenta = [state[opt._average] for state in states] if heard else None
    return Probe(bucket, selection, Vectors(used, directions, momenta), signs, of_products, opt._decay(group))


def _result(
    opt: LayerwiseOptimizer, probes: list[Probe], products: list[Products], replicas: ProcessGroup | None = None
) -> Measured:
    groups = [opt.param_groups[probe.bucket.group] for probe in probes]
    with torch.no_grad(), span("rates"):
        rows = refreshed(probes, products, groups, opt._plans, replicas)
    return Measured(
        [n for n, group in enumerate(opt.param_groups) if opt._due(group)], list(zip(probes, rows, strict=True))
    )


def _accumulate(graph: dict[Tensor, Tensor]) -> None:
    """Give each leaf its gradient as ``loss.backward()`` would, hooks included, without a second pass."""
    with torch.no_grad():
        for leaf, gradient in graph.items():
            # Its own memory, as backward() gives: two leaves may have been handed one tensor.
            own = gradient.detach().clone()
            leaf.grad = own if leaf.grad is None else leaf.grad + own
    for leaf in graph:
        for hook in (leaf._post_accumulate_grad_hooks or {}).values():
            hook(leaf)


def _autograd(
    opt: LayerwiseOptimizer, loss: Tensor, scale: Tensor | float, ddp: DistributedDataParallel | None
) -> Measured:
    """Gradient and curvature from one graph; gradients are accumulated as ``loss.backward()`` would."""
    leaves = leaves_of(loss)
    try:
        refuse_cut_graph([loss])
        found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        graph = {leaf: g for leaf, g in zip(leaves, found, strict=True) if g is not None}
        del found
        refuse_cut_graph(graph.values())
        groups.check_dense(opt.param_groups, graph.get)
        gradients, of_gradients = graph, scale
        if ddp is not None:
            # Directions must be equal on all replicas: they are those of the averaged gradient, of the whole window.
            distributed.accumulate(graph)
            params = [p for group in opt.param_groups for p in group["params"]]
            gradients = {p: p.grad for p in params if p.grad is not None}  # perhaps from other replicas alone
            of_gradients = scale / (opt._micro_batches + 1)
        with span("curvature"):
            probes = _probes(opt, gradients, of_gradients, scale)
            ours = [[graph.get(p) for p in probe.selection.params] for probe in probes]
            products = by_autograd(probes, ours, opt._whole["curvature"])
    except RuntimeError as error:
        if (explained := explain(error)) is not None:
            raise explained from error
        raise
    if ddp is None:
        _accumulate(graph)
    return _result(opt, probes, products, None if ddp is None else ddp.process_group)


def _by_differences(
    opt: LayerwiseOptimizer, evaluate: Callable[[], Tensor], loss: Tensor, replay: Replay, scale: Tensor | float
) -> Measured:
    """Measure at the gradients that a first evaluation has left; `evaluate` does it once more."""
    params = [p for group in opt.param_groups for p in group["params"]]
    gradients = {p: p.grad for p in params if p.grad is not None}
    groups.check_dense(opt.param_groups, gradients.get)
    # The loss's graph is used up but still tells which other leaves the evaluation gives gradients to.
    leaves = list(dict.fromkeys(params + leaves_of(loss)))
    with span("curvature"):
        probes = _probes(opt, gradients, scale, scale)
        products = by_differences(probes, evaluate, replay, leaves, opt._whole["curvature"])
    return _result(opt, probes, products)


def _differences_of(opt: LayerwiseOptimizer, forward: Callable[[], tuple[Tensor, Tensor]], scaler: Any) -> Tensor:
    if opt._micro_batches > 0:
        distributed.refuse_accumulation()
    params = [p for group in opt.param_groups for p in group["params"]]
    replay = Replay(params)

    def evaluate() -> Tensor:
        value, scaled = forward()
        scaled.backward()  # type: ignore[no-untyped-call]
        return value

    earlier = [p.grad for p in params]
    for p in params:
        p.grad = None  # the measurement wants this micro-batch's own gradient
    try:
        value = evaluate()
        opt._measured = _by_differences(opt, evaluate, value, replay, _scale(value, scaler, opt._micro_batches))
    finally:
        with torch.no_grad():
            for p, grad in zip(params, earlier, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else grad + p.grad
    return value


def run_closure(opt: LayerwiseOptimizer, closure: Callable[[], Tensor]) -> Tensor:
    """Evaluate a `step` closure, and measure by finite differences if a refresh is due.

    Returns:
        What the closure returned.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    due = opt.curvature_due
    replay = Replay(params) if due else None

    def evaluate() -> Tensor:
        with torch.enable_grad():
            value = closure()
        if not isinstance(value, Tensor):
            raise TypeError(f"the closure of opt.step() must return the loss as a tensor, not {type(value).__name__}")
        return value

    value = evaluate()
    if replay is not None and opt._measured is None:  # the closure may have called opt.backward, which measures
        opt._measured = _by_differences(opt, evaluate, value, replay, 1.0)
    return value
