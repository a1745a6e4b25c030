"""What torch wraps around a model, and how compiled code is had run as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

_IN_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """A module, what it is wrapped around, and so on, down to the user's own."""
    found = [model]
    while True:
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif is_compiled(model):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return found
        found.append(model)


def is_compiled(model: nn.Module) -> bool:
    """Whether it is what ``torch.compile`` returned, whose class takes long to import."""
    return "_orig_mod" in model._modules


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, inside what torch wraps around it."""
    return layers_of(model)[-1]


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A model's parameters under the names that they have without wrappers."""
    found = []
    for name, param in unwrapped(model).named_parameters():
        if not param.is_floating_point() and not param.requires_grad:  # quantised, and frozen
            continue
        for part in _IN_NAMES:
            name = name.replace(part, "")
        found.append((name, param))
    return found


class Shared:
    """A context of torch's for the whole process, which several may be in and leave in any order.

    The first enters it, and the last leaves it: each by itself would put back what another had set.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]):
        self._make, self._context = make, ExitStack()
        self._inside: set[int] = set()

    def __contains__(self, who: int) -> bool:
        return who in self._inside

    def enter(self, who: int) -> None:
        """Be in it; nothing if that is so."""
        if not self._inside:
            self._context.enter_context(self._make())
        self._inside.add(who)

    def leave(self, who: int) -> None:
        """Be in it no more; nothing if that is so."""
        if who in self._inside:
            self._inside.remove(who)
            if not self._inside:
                self._context.close()


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=False), ExitStack() as after:
        # As torch.backends.mkldnn.flags does, but that warns of TF32 on some processors.
        after.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)
        yield


def _eager() -> AbstractContextManager[Any]:
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


# What has a second derivative: attention and recurrent layers by other kernels, compiled code as it is.
PLAIN_ATTENTION = Shared(lambda: sdpa_kernel(SDPBackend.MATH))
PLAIN_RECURRENCE = Shared(_plain_recurrence)
EAGER = Shared(_eager)


def run_eagerly(who: int, on: bool) -> None:
    """Have compiled code run as it is while anybody wants that; nothing where nothing is compiled."""
    if not on:
        EAGER.leave(who)
    elif "torch._dynamo" in sys.modules:
        EAGER.enter(who)
