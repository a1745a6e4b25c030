"""What torch wraps around a model, and how compiled code is had run as it is."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch
from torch import nn
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


# Those who want compiled models to run as they are: torch has one stance for all, to be put back by the last.
_eager: set[int] = set()
_stance = ExitStack()


def runs_eagerly(who: int) -> bool:
    """Whether this one wants that."""
    return who in _eager


def run_eagerly(who: int, on: bool) -> None:
    """Have compiled code run as it is, hooks and second derivatives included, while anybody wants that."""
    if on and not _eager and "torch._dynamo" in sys.modules:
        _stance.push(torch.compiler.set_stance("force_eager"))
    if on and (_eager or "torch._dynamo" in sys.modules):
        _eager.add(who)
    elif not on and who in _eager:
        _eager.remove(who)
        if not _eager:
            _stance.close()
