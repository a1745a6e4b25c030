"""What a step of the optimizer does, recorded from the package itself: its messages, and the memory it takes and moves.

On tensors of the meta device, so that a step of a model of any size takes seconds and no memory. There torch takes
the ways that it takes on a GPU: nothing reads a number back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lwas_fast import shards
from lwas_fast.measure.differences import Replay
from lwas_fast.measure.routes import again
from lwas_fast.optimizer import LayerwiseOptimizer
from lwas_fast.rule import Part, Rule, Scaling
from lwas_fast.update import compiled as compiled_code
from lwas_fast.update import extension


class Message(NamedTuple):
    """An all-reduce.

    Attributes:
        numbers: How many.
        size: Bytes that it has.
    """

    numbers: int
    size: int


@contextmanager
def messages() -> Iterator[list[Message]]:
    """The all-reduces that the package asks for inside; none is sent, for a tensor without data cannot be."""
    found: list[Message] = []

    def summed(values: Sequence[Tensor], groups: Sequence[Any], _device: str | None = None) -> list[Tensor]:
        found.extend(Message(sum(v.numel() for v in values), nbytes(values)) for _ in groups)
        return [value.clone() for value in values]

    with mock.patch.object(shards, "summed", summed):
        yield found


def here(tree: Any) -> list[Tensor]:
    """The tensors in something, of sharded ones this rank's part."""
    return [shards.local(leaf) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes(tree: Any) -> int:
    """Bytes of the tensors in something, of sharded ones of this rank's part."""
    return sum(tensor.numel() * tensor.element_size() for tensor in here(tree))


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors that live, and those that operators read and write.

    Args:
        known: Holds the tensors that live before.
        emptied: Whether storages are emptied that live on, as FSDP2 does: to look for these takes long.

    Attributes:
        peak: Most bytes alive at once, of those `known` and made inside.
        moved: Bytes that operators read and wrote, a `torch._foreach_` counted as one pass over each of its tensors.
    """

    def __init__(self, known: Any = (), emptied: bool = False):
        super().__init__()
        self._storages = WeakIdKeyDictionary()
        self._emptied, self._most = emptied, 0  # bytes alive, had none been emptied
        self.moved = self.peak = 0
        self._meet(known)

    def _meet(self, tree: Any) -> None:
        for tensor in here(tree):
            if (storage := tensor.untyped_storage()) not in self._storages:
                self._storages[storage] = size = storage.nbytes()
                self._most += size
                weakref.finalize(storage, self._gone, size)
        if self._most > self.peak:
            now = sum(storage.nbytes() for storage in self._storages) if self._emptied else self._most
            self.peak = max(self.peak, now)

    def _gone(self, size: int) -> None:
        self._most -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self._meet(found)
        if not func.is_view and "empty" not in func.__name__:
            written = [a for info, a in zip(func._schema.arguments, args, strict=False) if info.is_write]
            self.moved += nbytes((args, kwargs)) + (nbytes(written) if written else nbytes(found))
        return found


class Step(NamedTuple):
    """What one `opt.step()` took on one rank.

    Attributes:
        messages: Those that the package asked for.
        held: Bytes of weights, gradients and state when it was over.
        peak: Most bytes alive in it, with weights, gradients and state.
        moved: Bytes read and written.
    """

    messages: list[Message]
    held: int
    peak: int
    moved: int


def _measure(opt: LayerwiseOptimizer, params: list[Tensor], accumulated: bool) -> None:
    """Measure as `lwas_fast.measure.replay` does, with passes of a model that leave gradients and take nothing."""

    def evaluate() -> Tensor:
        for param in params:
            if param.grad is None:
                param.grad = torch.empty_like(param)
        return torch.zeros((), device=params[0].device, requires_grad=True)

    window = opt._now.window
    if accumulated:
        evaluate()
        window.micro_batches = 1
    loss, replay = evaluate(), Replay(params)
    found = again(opt._subject(), evaluate, loss, replay, window.micro_batches + 1.0, {}, accumulated)
    opt._take(found, "replay")


@contextmanager
def compiled(memory: Memory) -> Iterator[None]:
    """Have the compiled update take steps inside, but for its kernels, which need memory: what they move is counted."""

    def call(rule: Rule, part: Part, _: Scaling) -> tuple[Any, tuple[Any, ...]]:
        weights = part.selection.here
        state = [of_param[name] for of_param in part.states for name in rule.buffers(part.group)]

        def operator(_totals: Tensor, _scratch: Any, settles: bool = False) -> None:
            if not settles:  # that reads and writes again only what was longer than its bound
                memory.moved += 2 * nbytes((weights, state)) + nbytes(part.gradients)

        return operator, ()

    with mock.patch.object(compiled_code, "_call", call), mock.patch.object(extension, "serves", lambda *_: True):
        yield


def record(opt: LayerwiseOptimizer, measures: bool, accumulated: bool = False, plain: bool = False) -> Step:
    """A step of an optimizer of a sharded model on the meta device, without what the model's passes take.

    Args:
        opt: The optimizer.
        measures: Whether the step is to measure.
        accumulated: Whether its gradients are of several micro-batches.
        plain: Whether plain torch is to take it, not the compiled update.
    """
    params = [param for group in opt.param_groups for param in group["params"]]
    opt._now.outcome = None  # reads numbers, of which there are none
    for group in opt.param_groups:
        group["next_refresh"] = group["steps"]
    opt.zero_grad()
    for param in params if not measures else ():
        param.grad = torch.empty_like(param)
    known = params, [p.grad for p in params], [opt.state[p] for p in params]
    with messages() as sent, Memory(known) as memory, nullcontext() if plain else compiled(memory):
        if measures:
            _measure(opt, params, accumulated)
            sent.insert(0, Message(1, 4))  # whether all processes can: `lwas_fast.parallel.ddp.agree`
        opt.step()
    held = nbytes((params, [p.grad for p in params])) + state_bytes(opt)
    return Step(sent, held, memory.peak, memory.moved)


def state_bytes(opt: LayerwiseOptimizer) -> int:
    """Bytes of the state on this rank: the tensors of each parameter, and its layer's numbers."""
    of_params = [
        value
        for bucket in opt._layout.buckets
        for i in range(len(bucket.params))
        for name, value in opt._layout.state_of(bucket, i).items()
        if name not in ("step", "layer")  # views of the tables
    ]
    return nbytes((of_params, [(bucket.table, bucket.steps) for bucket in opt._layout.buckets]))


def layers_of(opt: LayerwiseOptimizer) -> int:
    """How many layers there are."""
    return sum(len(bucket.names) for bucket in opt._layout.buckets)


def parameters_of(model: nn.Module) -> int:
    """How many parameters a model has, over all ranks."""
    return sum(param.numel() for param in model.parameters())
