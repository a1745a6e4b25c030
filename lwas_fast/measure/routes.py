"""The ways from a loss to a measurement: its own graph, or a second evaluation at displaced parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lwas_fast import shards
from lwas_fast.errors import CurvatureError, FailsAgainError
from lwas_fast.interrupts import open_to_interrupts
from lwas_fast.layers import check_dense
from lwas_fast.measure.differences import Replay, by_differences, check_repeats, gradients_alone
from lwas_fast.measure.explain import explain, out_of_memory
from lwas_fast.measure.probes import Measurement, Subject, Window, blank_probes, make_probes
from lwas_fast.measure.products import by_autograd, leaves_of, refuse_cut_graph
from lwas_fast.measure.watch import marked, unhooked
from lwas_fast.parallel import ddp as parallel
from lwas_fast.profiling import span

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _scalar(loss: object, what: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{what} must be the loss as a tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{what} must be a scalar, not of shape {tuple(loss.shape)}: reduce it (mean or sum) first")
    if not loss.requires_grad:
        raise ValueError(f"{what} has no graph: compute it from the parameters, with gradients enabled")
    return loss


def backward(
    now: Callable[[], Subject],
    loss: Tensor | Callable[[], Tensor],
    hvp: str,
    measures: bool,
    scaler: Any,
    ddp: DistributedDataParallel | None,
) -> tuple[Tensor, Measurement | Exception | None]:
    """Do what `LayerwiseOptimizer.backward` says; return the loss, detached, and what was found.

    That is an exception where memory was all that it lacked: gradients are there, as ever.

    `now` gives what is measured. It is asked once the loss is there, for a callable may clear gradients, add groups or
    load a state.
    """
    evaluates = callable(loss) and not isinstance(loss, Tensor)
    differences = hvp == "finite_difference"
    if differences and not evaluates:
        raise TypeError(
            'hvp="finite_difference" evaluates the loss twice: call opt.backward(closure) with a callable that returns '
            "the loss, or opt.step(closure) with PyTorch's usual closure"
        )

    def forward() -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), open_to_interrupts():
            value = loss() if evaluates else loss  # type: ignore[operator]
            value = _scalar(value, "what the closure returns" if evaluates else "the argument of opt.backward()")
            return value, value if scaler is None else scaler.scale(value)

    found: Measurement | Exception | None = None
    if not measures:
        value, scaled = forward()
        _backward(scaled)
    elif differences:
        value, found = _differences_of(now, forward, scaler)
    else:
        value, scaled = forward()
        found, accumulated = in_passing(now, Seen(scaled, scaler, ddp, keep=False), value, forgives=out_of_memory)
        if not accumulated:
            _backward(scaled)
    return value.detach(), found


def scale_of(loss: Tensor, scaler: Any, window: Window) -> Tensor | float:
    """What turns this micro-batch's raw gradient into an estimate of the window's."""
    count = window.micro_batches + 1
    return float(count) if scaler is None else count / scaler.scale(torch.ones((), device=loss.device))


def unscaled(loss: Tensor, scale: Tensor | float, window: Window) -> Tensor:
    """A loss without its loss scale, by what `scale_of` gave for it."""
    return loss * (scale / (window.micro_batches + 1)) if isinstance(scale, Tensor) else loss


def _backward(loss: Tensor) -> None:
    with open_to_interrupts():
        loss.backward()  # type: ignore[no-untyped-call]


def _accumulate(graph: dict[Tensor, Tensor]) -> None:
    """Give each leaf its gradient as ``loss.backward()`` would, hooks included, without a second pass."""
    with torch.no_grad():
        for leaf, gradient in graph.items():
            if leaf.grad is None:
                leaf.grad = gradient.detach().clone()  # its own memory: two leaves may have been handed one tensor
            elif 0 in leaf.grad.stride():  # expanded: one number for many elements
                leaf.grad = leaf.grad + gradient
            else:  # in place: it may be a view of somebody's buffer
                leaf.grad += gradient
    for leaf in graph:
        for hook in (leaf._post_accumulate_grad_hooks or {}).values():
            hook(leaf)


def _differentiate(loss: Tensor) -> dict[Tensor, Tensor]:
    """The gradients of a loss by its leaves, with their graph; the loss's own is kept."""
    leaves = leaves_of(loss)
    refuse_cut_graph([loss])
    with open_to_interrupts():
        found = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    return {leaf: g for leaf, g in zip(leaves, found, strict=True) if g is not None}


def _measure(
    subject: Subject,
    graph: dict[Tensor, Tensor],
    value: Tensor,
    scale: Tensor | float,
    ddp: DistributedDataParallel | None,
    keep: bool = False,
    handed_over: list[bool] | None = None,
) -> Measurement:
    """Measure on gradients with their graph, which this releases unless told to `keep` it.

    To `handed_over` something is added when DDP has taken the gradients, for what comes after may fail.
    """
    layout, count = subject.layout, subject.window.micro_batches + 1
    refuse_cut_graph(graph.values())
    check_dense(layout.groups, graph.get)
    gradients, own, of_gradients = graph, None, scale
    if ddp is not None:
        # Directions must be equal on all replicas: they are those of the averaged gradient, of the whole window.
        parallel.accumulate(graph)
        if handed_over is not None:
            handed_over.append(True)
        gradients = {p: p.grad for p in layout.params if p.grad is not None}  # perhaps from other replicas alone
    elif any(p.grad is not None for p in layout.params):  # the step will take them along
        gradients = {p: _sum(p.grad, graph.get(p)) for p in layout.params if p.grad is not None or p in graph}
    if gradients is not graph:
        of_gradients = scale / count
        # Gradients that nobody counted: of the window, nothing is known but that this loss is a part of it.
        own = graph if subject.window.micro_batches == 0 else None
    with span("curvature"):
        probes = make_probes(subject, gradients, of_gradients, scale, value, own)
        ours = [[graph.get(p) for p in probe.selection.params] for probe in probes]
        with unhooked([*layout.params, *marked()]):  # the second pass brings other gradients
            products = by_autograd(probes, ours, subject.how["curvature"], isinstance(scale, Tensor), keep)
    return Measurement(subject.due, probes, products, None if ddp is None else ddp.process_group)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor:
    if one is None or other is None:
        return (one if other is None else other).detach()  # type: ignore[union-attr]
    return one + other.detach()


def _check_autograd(subject: Subject, ddp: DistributedDataParallel | None) -> None:
    """Refuse what has no gradient with a graph; CurvatureError. Nothing has been changed by then."""
    if _meshes(subject):
        raise CurvatureError(
            "the parameters are sharded (DTensor), and what gathers them has no second derivative: make the optimizer "
            "with the model, so that loss.backward() measures by calling it once more, or use opt.step(closure)"
        )
    parallel.check(ddp)


class Seen(NamedTuple):
    """A loss that somebody is about to call ``backward()`` on.

    Attributes:
        loss: As `scaler` scaled it, if there is one.
        scaler: See `LayerwiseOptimizer.backward`.
        ddp: Likewise.
        keep: Whether its graph is to be left alone, and the gradients with it.
    """

    loss: Tensor
    scaler: Any
    ddp: DistributedDataParallel | None
    keep: bool


class Passing(NamedTuple):
    """What came of measuring a loss on its way back.

    Attributes:
        found: The measurement, or why there is none.
        accumulated: Whether the gradients are in ``.grad`` already; else that backward is still to be done.
    """

    found: Measurement | Exception
    accumulated: bool


def in_passing(
    now: Callable[[], Subject],
    seen: Seen,
    value: Tensor | None = None,
    forgives: Callable[[Exception], bool] = lambda _: True,
) -> Passing:
    """Measure a loss on its own graph; whatever fails and is forgiven, its ``backward()`` can go on.

    Unless the graph is kept, gradients are accumulated here, which spares another pass. `now` gives what is measured,
    `value` the loss without its loss scale, if that is known. What is not forgiven is raised, with nothing changed.
    """
    loss, scaler, ddp, keep = seen
    graph: dict[Tensor, Tensor] = {}
    handed_over: list[bool] = []
    try:
        subject = now()
        _check_autograd(subject, ddp)
        if ddp is not None and keep:
            raise CurvatureError(
                "under DistributedDataParallel a loss whose graph is kept (retain_graph=True, or a second optimizer on "
                "it) cannot be measured: keep it not, or use one optimizer with two groups"
            )
        graph = _differentiate(loss)
        scale = scale_of(loss, scaler, subject.window)
        value = unscaled(loss.detach(), scale, subject.window) if value is None else value
        found: Measurement | Exception = _measure(subject, graph, value, scale, ddp, keep, handed_over)
    except Exception as error:  # a backward that is not ours is not to fail for our sake
        explained = explain(error)
        if not forgives(error):
            if explained is None:
                raise
            raise explained from error
        found = explained or error
        bare(error)
    accumulated = bool(graph if ddp is None else handed_over) and not keep
    if accumulated and ddp is None:
        _accumulate(graph)
    if ddp is not None and not keep and isinstance(found, Exception):  # with `keep`, on all replicas alike
        if not accumulated:
            _backward(loss)
        return Passing(failed_measurement(now(), loss, ddp.process_group, found), True)
    return Passing(found, accumulated)


def bare(error: Exception) -> Exception:
    """An error without what holds the graph."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def failed_measurement(subject: Subject, loss: Tensor, replicas: ProcessGroup, failure: Exception) -> Measurement:
    """What a process that could not measure, and has its gradients, hands on: its replicas wait for its numbers."""
    return Measurement(subject.due, blank_probes(subject, loss), [], replicas, failure)


def _differences_of(
    now: Callable[[], Subject], forward: Callable[[], tuple[Tensor, Tensor]], scaler: Any
) -> tuple[Tensor, Measurement | Exception]:
    subject = now()
    if subject.window.micro_batches > 0:
        parallel.refuse_accumulation()
    params = subject.layout.params
    replay = Replay(params)

    def evaluate_once() -> Tensor:
        value, scaled = forward()
        _backward(scaled)
        return value

    earlier = [p.grad for p in params]
    for p in params:
        p.grad = None  # the measurement wants this micro-batch's own gradient
    try:
        value = evaluate_once()
        subject = now()
        found = again(subject, evaluate_once, value, replay, scale_of(value, scaler, subject.window))
    finally:
        with torch.no_grad():
            for p, grad in zip(params, earlier, strict=True):
                if grad is not None:
                    p.grad = grad if p.grad is None else grad + p.grad
    return value, found


def reduced_together(subject: Subject, ddp: DistributedDataParallel | None) -> bool:
    """Whether several micro-batches' gradients may be averaged over processes at once, so that none is known alone."""
    return subject.window.micro_batches > 0 and (ddp is not None or bool(_meshes(subject)))


def talking_to(subject: Subject, ddp: DistributedDataParallel | None) -> list[tuple[ProcessGroup, Any]]:
    """The process groups that a measurement talks to, in this order, and the device on which each does.

    None where a process measures by itself.
    """
    if ddp is not None:
        return [(ddp.process_group, subject.layout.params[0].device)]
    meshes = dict.fromkeys(_meshes(subject))
    return [(group, mesh.device_type) for mesh in meshes for group in shards.groups_of(mesh)]


def _meshes(subject: Subject) -> list[Any]:
    return [bucket.mesh for bucket in subject.layout.buckets if bucket.mesh is not None]


def _joint(subject: Subject, loss: Tensor, ddp: DistributedDataParallel | None) -> Tensor:
    """A loss, in a distributed run averaged over the processes whose gradients are."""
    if meshes := _meshes(subject):
        return shards.mean(loss, max(meshes, key=lambda mesh: mesh.size())) * shards.loss_factor(subject.model)
    return parallel.average_loss(loss, None if ddp is None else ddp.process_group)


def evaluate(closure: Callable[[], Tensor | None]) -> Tensor | None:
    """Call a `step` closure and return the loss that it returns, or None; TypeError if that is something else."""
    with torch.enable_grad(), open_to_interrupts():
        value = closure()
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"the closure of opt.step() must return the loss as a tensor, not {type(value).__name__}")
    return value


def again(
    subject: Subject,
    closure: Callable[[], Tensor | None],
    loss: Tensor,
    replay: Replay,
    scale: Tensor | float = 1.0,
    start: dict[Tensor, Tensor] | None = None,
    accumulated: bool = False,
    ddp: DistributedDataParallel | None = None,
    computed_in: torch.dtype | None = None,
) -> Measurement | Exception:
    """Measure by differences of gradients, where a first evaluation of a closure has left its own.

    If all it lacks is memory, or the evaluations are not alike, it gives an exception that says so, and everything is
    as the first evaluation left it. Not in a distributed run, whose other processes wait for this one's numbers: there
    it raises what memory lacks, and does not find out the other.

    Args:
        subject: What is measured, and how.
        closure: Evaluates the same loss once more, gradients included.
        loss: What it returned first.
        replay: The random state it started from then.
        scale: What turns raw gradients and products into estimates of the window's.
        start: Gradients that it found in ``.grad`` when it started.
        accumulated: Whether it left them there, and added its own.
        ddp: What averages the gradients, if that is known.
        computed_in: The dtype that an autocast around the model casts weights to, if that is known.
    """
    try:
        return _again(subject, closure, loss, replay, scale, start or {}, accumulated, ddp, computed_in)
    except FailsAgainError as error:
        return error
    except Exception as error:
        if not out_of_memory(error) or talking_to(subject, ddp) or parallel.replicas() > 1:
            raise
        bare(error)
        return explain(error) or error


def _again(
    subject: Subject,
    closure: Callable[[], Tensor | None],
    loss: Tensor,
    replay: Replay,
    scale: Tensor | float,
    start: dict[Tensor, Tensor],
    accumulated: bool,
    ddp: DistributedDataParallel | None,
    computed_in: torch.dtype | None,
) -> Measurement:
    """See `again`."""
    params = subject.layout.params
    gradients = {p: p.grad for p in params if p.grad is not None}
    check_dense(subject.layout.groups, gradients.get)
    # The loss's graph is used up but still tells which other leaves the evaluation gives gradients to.
    leaves = list(dict.fromkeys(params + leaves_of(loss)))
    with span("curvature"):
        estimator, model = subject.how["curvature"], subject.model
        own, same = None, subject.repeats
        if not (same or accumulated or _meshes(subject)) and parallel.replicas() == 1:
            same = check_repeats(gradients, lambda: evaluate(closure), replay, leaves, model)
        # A closure may have cleared shards' gradients in place, which leaves no trace on them.
        apart = accumulated and (reduced_together(subject, ddp) or bool(start and _meshes(subject)))
        if apart:
            start, own = {}, gradients_alone(lambda: evaluate(closure), replay, leaves, model)
        elif accumulated:
            own = {p: g - start[p] if p in start else g for p, g in gradients.items()}
        of_gradients = scale / (subject.window.micro_batches + 1) if accumulated else scale
        # As in `_measure`: of a window that was counted the descent is that of all its gradients.
        part = own if subject.window.micro_batches == 0 else None
        probes = make_probes(subject, gradients, of_gradients, scale, _joint(subject, loss, ddp), part)
        base, computed_in = own if apart else None, computed_in or shards.computed_in(model)
        products = by_differences(
            probes, lambda: evaluate(closure), replay, leaves, estimator, start, model, base, computed_in
        )
    return Measurement(subject.due, probes, products, repeats=same)
