"""Measuring a loss whose model has no second derivative: the model is called once more, at displaced weights.

The loss itself is differentiated twice, from the model's outputs y on; the model is a black box. With y' the outputs at
displaced weights and J' their Jacobian, the gradient of the loss there is J'ᵀ(u + L''(y' - y)), u being the loss's
gradient by y and L'' its Hessian by y: to first order what an evaluation of the whole would give. So `differences` goes
on as with a closure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lwas_fast.errors import CurvatureError
from lwas_fast.interrupts import open_to_interrupts, whole
from lwas_fast.measure.differences import Replay
from lwas_fast.measure.probes import Subject
from lwas_fast.measure.routes import Passing, Seen, again, bare, reduced_together, scale_of, talking_to, unscaled
from lwas_fast.measure.watch import marked, unhooked, with_graph
from lwas_fast.parallel.ddp import agree, check


class Call:
    """A call of a model, which can be made again as it was."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], params: list[Tensor]):
        self.module = module
        # Containers of its own: the model may take something out of those that it was given.
        self.args, self.kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
        self.random = Replay(params)
        devices = {"cpu", *(param.device.type for param in params)}
        self._autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices)]
        self._versions = [(t, t._version) for t in self._inputs() if not t.is_inference()]
        self.outputs: list[Tensor] = []
        self.hooks: list[set[int]] = []  # of each output, those that the model itself put onto it

    def _inputs(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def computed_in(self) -> torch.dtype | None:
        """The dtype that an autocast around it casts weights to; None if there is none."""
        return next((dtype for _, enabled, dtype in self._autocast if enabled), None)

    def returned(self, outputs: list[Tensor]) -> None:
        """Note what it returned: the tensors that have a graph, in a fixed order."""
        self.outputs = outputs
        with torch._C.DisableTorchFunctionSubclass():
            self.hooks = [set(output._backward_hooks or {}) for output in outputs]
        self._versions += [(tensor, tensor._version) for tensor in outputs]

    def check(self) -> None:
        """Refuse what a second call would not repeat.

        Raises:
            CurvatureError: An input has a gradient, or somebody has written to an input or an output.
        """
        if any(tensor.requires_grad for tensor in self._inputs()):
            raise CurvatureError("the model has no second derivative, and an input that itself has a gradient")
        if any(tensor._version != version for tensor, version in self._versions):
            raise CurvatureError("the model has no second derivative, and its inputs or outputs were changed in place")

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """The autocast that it was made under."""
        with ExitStack() as contexts:
            for device, enabled, dtype in self._autocast:
                contexts.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            yield


def replayed(now: Callable[[], Subject], seen: Seen, call: Call) -> Passing:
    """Measure a loss by calling its model once more, after its ``backward()``, which is done here.

    Whatever fails before, that can go on. `now` gives what is measured, `call` is how the model came to its outputs.
    """
    loss, subject = seen.loss, now()
    processes = talking_to(subject, seen.ddp)
    try:
        call.check()
        if not processes:
            check(None)  # nothing averages this process's gradients
        places = _between(loss, call.outputs)
        outputs = [call.outputs[i] for i in places]
        with unhooked(outputs):  # their own backward is to come
            slopes = torch.autograd.grad(loss, outputs, create_graph=True)
        stood = [] if reduced_together(subject, seen.ddp) else subject.layout.params
        start = {p: p.grad.clone() for p in stood if p.grad is not None}
        scale = scale_of(loss, seen.scaler, subject.window)
        value = unscaled(loss, scale, subject.window)
    except Exception as error:
        agree(processes, works=False)
        return Passing(bare(error), False)
    if not agree(processes, works=True):
        return Passing(CurvatureError("another process could not measure, and says why"), False)
    # From the outputs on, for the graph before them is not needed again, and that of the loss is.
    with open_to_interrupts():
        torch.autograd.backward(outputs, [slope.detach() for slope in slopes])
    try:
        accumulates = bool(start) or subject.window.micro_batches > 0
        once_more, dtype = _second_call(call, places, slopes), call.computed_in
        found = again(subject, once_more, value, call.random, scale, start, accumulates, seen.ddp, dtype)
        return Passing(found, True)
    except Exception as error:
        if processes:  # which are in the middle of it, and would take later messages for those of now
            raise
        return Passing(bare(error), True)


def _between(loss: Tensor, outputs: Sequence[Tensor]) -> list[int]:
    """Which outputs the loss is made from: those on whose gradients its whole gradient depends.

    Raises:
        CurvatureError: Parameters come into the loss otherwise, or one of these outputs is made from another.
    """
    at = {(output.grad_fn, output.output_nr): i for i, output in enumerate(outputs)}
    met, leaves = _upstream([(loss.grad_fn, loss.output_nr)], at.keys())
    if leaves:
        raise CurvatureError(
            "the model has no second derivative, and its loss depends on leaves besides the model's output, such as a "
            f"tensor of shape {tuple(leaves[0].shape)}: add penalties on weights to what the model returns"
        )
    if not met.isdisjoint(_upstream([edge for fn, _ in met for edge in fn.next_functions], at.keys())[0]):
        raise CurvatureError("the model has no second derivative, and its loss uses an output made from another")
    return [i for edge, i in at.items() if edge in met]


def _upstream(edges: Iterable[tuple[Any, int]], stops: Collection[Any]) -> tuple[set[Any], list[Tensor]]:
    """Which of some places in a graph are met first on the way up from others, and the leaves met besides."""
    met, leaves, seen, stack = set(), [], set(), list(edges)
    while stack:
        edge = stack.pop()
        if edge in stops:
            met.add(edge)
        elif edge[0] is not None and edge[0] not in seen:
            seen.add(edge[0])
            if hasattr(edge[0], "variable"):
                leaves.append(edge[0].variable)
            stack.extend(edge[0].next_functions)
    return met, leaves


def _hooked(output: Tensor, of_forward: set[int], slope: Tensor) -> Tensor:
    """A gradient by an output as the hooks leave it that were put onto it after the call; the others come with it."""
    with torch._C.DisableTorchFunctionSubclass():
        hooks = [hook for key, hook in (output._backward_hooks or {}).items() if key not in of_forward]
    for hook in hooks:
        changed = hook(slope)
        slope = slope if changed is None else changed
    return slope


def _second_call(call: Call, places: Sequence[int], slopes: Sequence[Tensor]) -> Callable[[], None]:
    """What evaluates the loss at displaced weights, from its gradient by the outputs that it is made from."""
    outputs, hooks = [call.outputs[i] for i in places], [call.hooks[i] for i in places]

    def once_more() -> None:
        with whole(), call.as_it_was(), open_to_interrupts():
            found = with_graph(call.module(*call.args, **call.kwargs))
        new = [found[i] for i in places]
        live = [n for n, slope in enumerate(slopes) if slope.requires_grad]
        change: Sequence[Tensor | None] = [None] * len(slopes)
        if live:
            curved, moved = [slopes[n] for n in live], [(new[n] - outputs[n]).detach() for n in live]
            with whole(), unhooked([*outputs, *marked()]), open_to_interrupts():
                change = torch.autograd.grad(curved, outputs, moved, retain_graph=True, allow_unused=True)
        by_new = [s.detach() if more is None else s.detach() + more for s, more in zip(slopes, change, strict=True)]
        torch.autograd.backward(new, list(map(_hooked, outputs, hooks, by_new)))

    return once_more
