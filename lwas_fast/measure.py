"""A measurement: from the loss of this step to each layer's sums, by autograd or by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lwas_fast import groups
from lwas_fast.curvature import Probe, by_autograd, draw_signs, leaves_of, refuse_cut_graph
from lwas_fast.errors import CurvatureError, explain
from lwas_fast.finite_difference import Replay, by_differences
from lwas_fast.layers import Bucket, Selection, state_dtype

if TYPE_CHECKING:
    from lwas_fast.optimizer import LayerwiseOptimizer


@dataclass
class Measured:
    """What `backward` leaves for `step`: groups that were due, and (S, len(Sums)) for each selection."""

    groups: list[int]
    sums: list[tuple[Bucket, Selection, Tensor]]


def _scalar(loss: object, what: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{what} must be the loss as a tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{what} must be a scalar, not of shape {tuple(loss.shape)}: reduce it (mean or sum) first")
    if not loss.requires_grad:
        raise ValueError(f"{what} has no graph: compute it from the parameters, with gradients enabled")
    return loss


def backward(opt: LayerwiseOptimizer, loss: Tensor | Callable[[], Tensor], due: bool, scaler: Any) -> Tensor:
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
        opt._measured = _autograd(opt, scaled, _scale(value, scaler, opt._micro_batches))
    return value.detach()


def _scale(loss: Tensor, scaler: Any, earlier: int) -> Tensor | float:
    """What turns this micro-batch's raw gradient into an estimate of the window's."""
    window = earlier + 1
    return float(window) if scaler is None else window / scaler.scale(torch.ones((), device=loss.device))


def _probes(opt: LayerwiseOptimizer, gradients: dict[Tensor, Tensor], scale: Tensor | float) -> list[Probe]:
    probes = []
    for bucket in opt._buckets:
        group = opt.param_groups[bucket.group]
        present = [i for i, p in enumerate(bucket.params) if p in gradients]
        if not present or not opt._due(group):
            continue
        selection = bucket.select(present)
        signed = -scale if group["maximize"] else scale
        vectors = []
        for i, p in zip(present, selection.params, strict=True):
            dtype = state_dtype(p)
            gradient = gradients[p].detach().to(dtype) * signed
            vectors.append(opt._probe(group, opt._state_of(bucket, i), p.detach().to(dtype), gradient))
        probes.append(Probe(bucket, selection, vectors, signed))
    return probes


def _signs(opt: LayerwiseOptimizer, probes: list[Probe]) -> list[float]:
    steps = max((opt.param_groups[probe.bucket.group]["steps"] for probe in probes), default=0)
    return draw_signs(opt._whole["seed"], steps, sum(len(probe.selection.floor) for probe in probes))


def _result(opt: LayerwiseOptimizer, probes: list[Probe], sums: list[Tensor]) -> Measured:
    found = [(probe.bucket, probe.selection, s) for probe, s in zip(probes, sums, strict=True)]
    return Measured([n for n, group in enumerate(opt.param_groups) if opt._due(group)], found)


def _autograd(opt: LayerwiseOptimizer, loss: Tensor, scale: Tensor | float) -> Measured:
    """Gradient and curvature from one graph; gradients are accumulated as ``loss.backward()`` would."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise CurvatureError(
                "opt.backward(loss) takes the gradient apart from DistributedDataParallel's, so the replicas would "
                "drift apart. In a distributed run use opt.step(closure) with PyTorch's usual closure: its two "
                "backward passes are averaged over the replicas, and so are the rates."
            )
    leaves = leaves_of(loss)
    try:
        refuse_cut_graph([loss])
        found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        graph = {leaf: g for leaf, g in zip(leaves, found, strict=True) if g is not None}
        del found
        refuse_cut_graph(graph.values())
        groups.check_dense(opt.param_groups, graph.get)
        with torch.no_grad():
            probes = _probes(opt, graph, scale)
        ours = [[graph[p] for p in probe.selection.params] for probe in probes]
        sums = list(by_autograd(probes, ours, opt._whole["curvature"], _signs(opt, probes)))
    except RuntimeError as error:
        if (explained := explain(error)) is not None:
            raise explained from error
        raise
    with torch.no_grad():
        for leaf, gradient in graph.items():
            # Its own memory, as backward() gives: two leaves may have been handed one tensor.
            own = gradient.detach().clone()
            leaf.grad = own if leaf.grad is None else leaf.grad + own
    for leaf in graph:
        for hook in (leaf._post_accumulate_grad_hooks or {}).values():
            hook(leaf)
    return _result(opt, probes, sums)


def _by_differences(
    opt: LayerwiseOptimizer, evaluate: Callable[[], Tensor], loss: Tensor, replay: Replay, scale: Tensor | float
) -> Measured:
    """Measure at the gradients that a first evaluation has left; `evaluate` does it once more."""
    params = [p for group in opt.param_groups for p in group["params"]]
    gradients = {p: p.grad for p in params if p.grad is not None}
    groups.check_dense(opt.param_groups, gradients.get)
    # The loss's graph is used up but still tells which other leaves the evaluation gives gradients to.
    leaves = list(dict.fromkeys(params + leaves_of(loss)))
    with torch.no_grad():
        probes = _probes(opt, gradients, scale)
    sums = by_differences(probes, evaluate, replay, leaves, opt._whole["curvature"], _signs(opt, probes))
    return _result(opt, probes, [s.detach() for s in sums])


def _differences_of(opt: LayerwiseOptimizer, forward: Callable[[], tuple[Tensor, Tensor]], scaler: Any) -> Tensor:
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
