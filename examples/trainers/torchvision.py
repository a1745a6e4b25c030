"""Beside a torch for the CPU, package registries have a torchvision for CUDA, which does not load there."""

from __future__ import annotations

import contextlib
import re
from importlib.util import find_spec
from pathlib import Path

import torch

_LIBRARIES: list[torch.library.Library] = []  # with it torch forgets what was declared


def declare_torchvision() -> None:
    """Let torchvision be imported where its operators, of which none is used here, do not load.

    Package registries have it built for CUDA, which does not fit a torch built for the CPU.
    """
    found = find_spec("torchvision")
    if found is None or found.submodule_search_locations is None or torch.cuda.is_available():
        return
    text = (Path(found.submodule_search_locations[0]) / "_meta_registrations.py").read_text()
    for operator in set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', text)):
        with contextlib.suppress(RuntimeError):  # it is there
            _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            _LIBRARIES[-1].define(f"{operator}(Tensor x) -> Tensor")
