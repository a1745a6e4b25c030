"""A followed model's outputs on their way to a loss: how a plain ``loss.backward()`` comes to measure.

In a step that measures, the outputs of the model become `Watched`, and so does whatever is computed from them and has a
graph. That changes their class and nothing else, no global state of torch among it; it ends with the step. So
``backward`` of a loss made from them is ours, whoever calls it, and an optimizer can measure on the loss's graph first.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lwas_fast.measure.products import leaves_of


class Watcher(Protocol):
    """What waits for a loss: see `watch`."""

    def wants(self, leaves: set[Tensor]) -> bool:
        """Whether it is to see the ``backward()`` of a loss with these leaves."""

    def see(self, loss: Tensor, scaler: Any, keep: bool) -> bool:
        """Measure; return whether gradients have been accumulated, which `keep` forbids."""

    def differentiable(self) -> AbstractContextManager[object]:
        """What the model was called in, and is to be again if checkpoints call it."""


_waiting: weakref.WeakSet[Any] = weakref.WeakSet()
_marked: list[weakref.ref[Tensor]] = []


class Watched(Tensor):
    """A tensor with a graph that comes from a followed model."""

    scaler: Any = None  # the GradScaler that multiplied it

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call torch on plain tensors; what it returns is watched too."""
        if func is Tensor.backward:
            return _backward(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            scaler = _scaler_of(sys._getframe(1)) or next((a.scaler for a in args if type(a) is Watched), None)
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                _mark(tensor, scaler)
        return result


def _scaler_of(caller: FrameType) -> Any:
    """The GradScaler whose ``scale`` is at work; nothing about the tensor that it returns would tell."""
    return caller.f_locals["self"] if caller.f_code is torch.amp.GradScaler.scale.__code__ else None


def _mark(tensor: object, scaler: Any = None) -> None:
    if type(tensor) is Tensor and tensor.grad_fn is not None and _waiting:
        tensor.__class__ = Watched
        _marked.append(weakref.ref(tensor))
    if scaler is not None and type(tensor) is Watched:
        tensor.scaler = scaler


def _release(tensor: Tensor) -> Tensor:
    if type(tensor) is Watched:
        tensor.__dict__.pop("scaler", None)
        tensor.__class__ = Tensor  # type: ignore[assignment]
    return tensor


def _tensors(output: object) -> Iterator[object]:
    """What a model returned, taken apart; of classes that torch does not know, their attributes."""
    for leaf in pytree.tree_leaves(output):
        yield leaf
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from pytree.tree_leaves([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        elif not isinstance(leaf, (Tensor, type)) and hasattr(leaf, "__dict__"):
            yield from pytree.tree_leaves(list(vars(leaf).values()))


def watch(watcher: Watcher, output: object) -> None:
    """Have a watcher see the ``backward()`` of any loss that is made from a model's output."""
    _waiting.add(watcher)
    _marked[:] = [ref for ref in _marked if ref() is not None]
    for tensor in _tensors(output):
        _mark(tensor)


def unwatch(watcher: Watcher) -> None:
    """Let a watcher go, and with the last one every mark."""
    _waiting.discard(watcher)
    if not _waiting:
        for ref in _marked:
            if (tensor := ref()) is not None:
                _release(tensor)
        _marked.clear()


def released(value: Any) -> Any:
    """The same value; a tensor among such is watched no more."""
    return _release(value) if isinstance(value, Tensor) else value


def _backward(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    scaler, wanting = getattr(loss, "scaler", None), []
    _release(loss)
    if gradient is None and inputs is None and not create_graph and loss.numel() == 1:
        leaves = set(leaves_of(loss))
        wanting = [watcher for watcher in list(_waiting) if watcher.wants(leaves)]
    with ExitStack() as contexts:
        for watcher in list(_waiting):
            contexts.enter_context(watcher.differentiable())
        for position, watcher in enumerate(wanting):
            keep = bool(retain_graph) or position < len(wanting) - 1
            if watcher.see(loss, scaler, keep):
                return
        loss.backward(gradient, retain_graph, create_graph, inputs)  # type: ignore[no-untyped-call]
