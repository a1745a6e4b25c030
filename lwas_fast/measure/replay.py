"""Measuring a loss whose model has no second derivative: the model is called once more, at displaced weights.

The loss itself is differentiated twice, from the model's outputs y on; the model is a black box. With y' the outputs at
displaced weights and J' their Jacobian, the gradient of the loss there is J'ᵀ(u + L''(y' - y)), u being the loss's
gradient by y and L'' its Hessian by y: to first order what an evaluation of the whole would give. So `differences` goes
on as with a closure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lwas_fast.errors import CurvatureError
from lwas_fast.measure.differences import Replay
from lwas_fast.measure.probes import Subject
from lwas_fast.measure.routes import Passing, Seen, again, scale_of, unscaled
from lwas_fast.measure.watch import with_graph


class Call:
    """A call of a model, which can be made again as it was."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], params: list[Tensor]):
        self.module, self.args, self.kwargs = module, args, kwargs
        self.random = Replay(params)
        devices = {"cpu", *(param.device.type for param in params)}
        self._autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices)]
        self._versions = [(t, t._version) for t in self._inputs() if not t.is_inference()]
        self.outputs: list[Tensor] = []

    def _inputs(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def computed_in(self) -> torch.dtype | None:
        """The dtype that an autocast around it casts weights to; None if there is none."""
        return next((dtype for _, enabled, dtype in self._autocast if enabled), None)

    def returned(self, outputs: list[Tensor]) -> None:
        """Note what it returned: the tensors that have a graph, in a fixed order."""
        self.outputs = outputs
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
    loss = seen.loss
    start: dict[Tensor, Tensor] = {}
    accumulated = False
    try:
        call.check()
        subject = now()
        with _not_gathering(call.outputs):
            slopes = torch.autograd.grad(loss, call.outputs, create_graph=True, allow_unused=True)
        start = {p: p.grad.clone() for p in subject.layout.params if p.grad is not None}
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        accumulated = True
        scale = scale_of(loss, seen.scaler, subject.window)
        value = unscaled(loss, scale, subject.window)
        once_more = _second_call(call, slopes)
        accumulates = bool(start) or subject.window.micro_batches > 0
        dtype = call.computed_in
        found = again(subject, once_more, value, call.random, scale, start, accumulates, seen.ddp, dtype)
        return Passing(found, accumulated)
    except Exception as error:
        error.__traceback__ = error.__context__ = error.__cause__ = None  # which hold the graph
        return Passing(error, accumulated)


@contextmanager
def _not_gathering(outputs: Sequence[Tensor]) -> Iterator[None]:
    """Differentiate a loss by a model's outputs inside without FSDP2's hooks on them, which prepare its backward."""
    taken = []
    with torch._C.DisableTorchFunctionSubclass():
        for hooks in filter(None, (output._backward_hooks for output in outputs)):
            for key, hook in list(hooks.items()):
                if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed"):
                    taken.append((hooks, key, hooks.pop(key)))
    try:
        yield
    finally:
        for hooks, key, hook in taken:
            hooks[key] = hook


def _second_call(call: Call, slopes: Sequence[Tensor | None]) -> Callable[[], None]:
    """What evaluates the loss at displaced weights, from its gradient by the outputs."""
    used = [(i, slope) for i, slope in enumerate(slopes) if slope is not None]
    at = [call.outputs[i] for i, _ in used]

    def once_more() -> None:
        with call.as_it_was():
            outputs = with_graph(call.module(*call.args, **call.kwargs))
        live = [(slope, (outputs[i] - call.outputs[i]).detach()) for i, slope in used if slope.requires_grad]
        change: Sequence[Tensor | None] = [None] * len(used)
        if live:
            curved, moved = zip(*live, strict=True)
            with _not_gathering(at):
                change = torch.autograd.grad(curved, at, moved, retain_graph=True, allow_unused=True)
        new = [s.detach() if more is None else s.detach() + more for (_, s), more in zip(used, change, strict=True)]
        torch.autograd.backward([outputs[i] for i, _ in used], new)

    return once_more
