"""Running statistics, counters and every other buffer of the modules that a closure calls, kept over an evaluation.

An optimizer that follows no model knows parameters, not modules. In a program without `torch.compile` a hook on all
modules sees what is called. A compiled function calls no module's hooks, a compiled module warns of them and compiles
them, so in a program with one the buffers of all modules that are alive are kept instead: more copies, but nothing that
the user can notice.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

# The modules that were alive when so many frames had been compiled and an evaluation reached these leaves. Looking for
# them takes some 70 ns for each object of the process, too long to do at every refresh.
_alive: tuple[int, list[weakref.ref[Tensor]], list[weakref.ref[nn.Module]]] = (0, [], [])


def _compilations() -> int:
    """How many frames `torch.compile` has compiled in this process; where torch does not tell, -1."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    return 0 if dynamo is None else getattr(dynamo, "FRAME_COUNTER", -1)


def _live_modules(compilations: int, leaves: Sequence[Tensor]) -> list[nn.Module]:
    """All modules, looked for anew when something was compiled or other leaves were reached since the last time.

    So it misses a module that is made between two refreshes, has no leaf of its own and is called without compiling
    anything.
    """
    global _alive
    count, known, modules = _alive
    # By identity, and weakly: an id may be given again, and == compares values.
    same = len(known) == len(leaves) and all(ref() is leaf for ref, leaf in zip(known, leaves, strict=True))
    if not same or count != compilations:
        # By type(): the __class__ of a proxy or a mock may run anything.
        modules = [weakref.ref(o) for o in gc.get_objects() if issubclass(type(o), nn.Module)]
        _alive = (compilations, [weakref.ref(leaf) for leaf in leaves], modules)
    return [module for ref in modules if (module := ref()) is not None]


class _Kept:
    """Buffers as they were: which tensor stood under which name, and its values, copied once."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._modules: dict[int, nn.Module] = {}  # by id: a module may compare or hash as it likes
        self._names: list[tuple[nn.Module, str, Tensor]] = []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, module: nn.Module) -> None:
        """Keep a module's own buffers, unless it is known."""
        if id(module) in self._modules:
            return
        self._modules[id(module)] = module
        for name, buffer in (getattr(module, "_buffers", None) or {}).items():
            if isinstance(buffer, Tensor) and not nn.parameter.is_lazy(buffer):
                self._names.append((module, name, buffer))
                if id(buffer) not in self._values:
                    self._values[id(buffer)] = (buffer, buffer.detach().clone())

    def add_called(self, module: nn.Module, _: object) -> None:
        """Keep what a module and its descendants have; as a hook, which other threads' modules call too."""
        if id(module) not in self._modules and threading.get_ident() == self._thread:
            for part in module.modules():
                self.add(part)

    def restore(self) -> None:
        """Put all back."""
        for buffer, value in self._values.values():
            if 0 in buffer.stride():  # expanded: nobody can have written to it
                continue
            # Nor to read-only memory, which a CPU's may be; on a GPU to compare would wait for it.
            if not (buffer.is_cpu and torch.equal(buffer, value)):
                buffer.data.copy_(value)  # .data: a graph elsewhere that saved it is as valid as before
        for module, name, buffer in self._names:
            if dict(module._buffers.items()).get(name) is not buffer:  # a scripted module's is no dictionary
                module._buffers[name] = buffer


@contextmanager
def buffers_kept(leaves: Sequence[Tensor], model: nn.Module | None = None) -> Iterator[None]:
    """Put back, at the end, every buffer that an evaluation inside may have written to or replaced.

    Args:
        leaves: What gets a gradient in that evaluation.
        model: What is evaluated, if that is known, so that nobody has to look for it.
    """
    kept = _Kept()
    compilations = _compilations()
    if model is not None:
        kept.add_called(model, None)
    elif compilations:
        for module in _live_modules(compilations, leaves):
            kept.add(module)
    try:
        with nullcontext() if compilations else register_module_forward_pre_hook(kept.add_called):
            yield
    finally:
        with torch.no_grad():
            kept.restore()
