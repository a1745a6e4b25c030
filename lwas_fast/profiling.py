"""Named ranges for profilers: ``lwas::curvature``, ``lwas::rates`` and ``lwas::update``.

Off by default, and then as good as free. On, they show in torch's profiler and, on CUDA, in nsys (NVTX):

    LWAS_FAST_RANGES=1 nsys profile python train.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NOTHING: AbstractContextManager[None] = nullcontext()
_on = os.environ.get("LWAS_FAST_RANGES", "0") not in ("", "0")


def annotate(on: bool = True) -> None:
    """Switch the ranges on or off, for all optimizers; ``LWAS_FAST_RANGES=1`` does so from outside."""
    global _on
    _on = on


@contextmanager
def _range(name: str) -> Iterator[None]:
    with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if torch.cuda.is_available() else _NOTHING:
        yield


def span(name: str) -> AbstractContextManager[None]:
    """The range ``lwas::name``, or nothing when ranges are off."""
    return _range(f"lwas::{name}") if _on else _NOTHING
