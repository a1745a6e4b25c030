"""A followed model's outputs on their way to a loss: how a plain ``loss.backward()`` comes to measure.

In a step that measures, the outputs of the model become `Watched`, and so does whatever is computed from them and has a
graph. That changes their class and nothing else, no global state of torch among it; it ends with the step. So
``backward`` of a loss made from them is ours, whoever calls it, and an optimizer can measure on the loss's graph first.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lwas_fast.interrupts import open_to_interrupts, whole
from lwas_fast.measure.products import leaves_of


class Watcher(Protocol):
    """What waits for a loss: see `watch`."""

    def wants(self, leaves: set[Tensor]) -> bool:
        """Whether it is to see the ``backward()`` of a loss with these leaves."""

    def see(self, loss: Tensor, scaler: Any, keep: bool) -> bool:
        """Measure; return whether gradients have been accumulated, which `keep` forbids."""

    def differentiable(self) -> AbstractContextManager[object]:
        """What the model was called in, and is to be again if checkpoints call it; its calls inside are no new ones."""


_waiting: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()  # in order, the same on all processes
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
        if func in _OF_PLAIN:  # what shows, copies or stores a tensor also tells its class
            args[0].__class__ = Tensor
            try:
                return func(*args, **(kwargs or {}))
            finally:
                args[0].__class__ = cls
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            scaler = _scaler_of(sys._getframe(1))
            if scaler is None:
                tensors = pytree.tree_leaves((args, kwargs))
                scaler = next((t.scaler for t in tensors if type(t) is Watched and t.scaler is not None), None)
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                _mark(tensor, scaler)
        return result


_OF_PLAIN = {Tensor.__format__, Tensor.__repr__, Tensor.__reduce_ex__, Tensor.__deepcopy__}


def _scaler_of(caller: FrameType | None) -> Any:
    """The GradScaler whose ``scale`` is at work; nothing about the tensor that it returns would tell."""
    for _ in range(6):  # a function of its own, and other modes of torch, may lie between
        if caller is None:
            return None
        if caller.f_code is torch.amp.GradScaler.scale.__code__:
            return caller.f_locals["self"]
        caller = caller.f_back
    return None


def _mark(tensor: object, scaler: Any = None) -> None:
    if type(tensor) is Tensor and tensor.grad_fn is not None and _waiting:
        tensor.__class__ = Watched
        _marked.append(weakref.ref(tensor))
    if scaler is not None and type(tensor) is Watched:
        tensor.scaler = scaler


def released(value: Any) -> Any:
    """The same value; if it is a watched tensor, it is so no more."""
    if type(value) is Watched:
        value.__dict__.pop("scaler", None)
        value.__class__ = Tensor  # type: ignore[assignment]
    return value


def _tensors(output: object, levels: int = 3) -> Iterator[object]:
    """What a model returned, taken apart; of objects that torch does not know, what their attributes hold."""
    for leaf in pytree.tree_leaves(output):
        yield leaf
        if levels > 0 and not isinstance(leaf, (Tensor, nn.Module, type)):
            slots = [getattr(leaf, name, None) for name in getattr(type(leaf), "__slots__", ())]
            if held := [*getattr(leaf, "__dict__", {}).values(), *slots]:
                yield from _tensors(held, levels - 1)


def with_graph(output: object) -> list[Tensor]:
    """The tensors of a model's output that have a graph."""
    return [leaf for leaf in _tensors(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def watch(watcher: Watcher, output: object) -> None:
    """Have a watcher see the ``backward()`` of any loss that is made from a model's output."""
    _waiting[watcher] = None
    _marked[:] = [ref for ref in _marked if ref() is not None]
    for tensor in _tensors(output):
        _mark(tensor)


@contextmanager
def unhooked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Take gradients inside without the hooks on those of some tensors.

    After it, ``.grad`` of one that retains it is as before.
    """
    with torch._C.DisableTorchFunctionSubclass():
        # Autograd holds these dictionaries, and calls what is in them.
        hooked = [(hooks, dict(hooks)) for tensor in tensors if (hooks := tensor._backward_hooks)]
        retained = [(tensor, tensor.grad) for tensor in tensors if not tensor.is_leaf and tensor.retains_grad]
        for hooks, _ in hooked:
            hooks.clear()
    try:
        yield
    finally:
        with torch._C.DisableTorchFunctionSubclass():
            for hooks, kept in hooked:
                hooks.update(kept)
            for tensor, gradient in retained:
                tensor.grad = None if gradient is None else gradient.detach()


def marked() -> list[Tensor]:
    """All watched tensors that are alive."""
    return [tensor for ref in _marked if (tensor := ref()) is not None]


def unwatch(watcher: Watcher | None) -> None:
    """Let a watcher go, and with the last one every mark."""
    if watcher is not None:
        _waiting.pop(watcher, None)
    if not _waiting:
        for ref in _marked:
            released(ref())
        _marked.clear()


def _backward(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    with whole():
        _see(loss, gradient, retain_graph, create_graph, inputs)


def _see(loss: Tensor, gradient: Tensor | None, retain_graph: bool | None, create_graph: bool, inputs: Any) -> None:
    scaler, wanting = getattr(loss, "scaler", None), []
    released(loss)
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
        with open_to_interrupts():
            loss.backward(gradient, retain_graph, create_graph, inputs)  # type: ignore[no-untyped-call]
