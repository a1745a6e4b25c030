"""Warnings that point at the user's line, however many frames of torch and of ours lie between."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(str(Path(file).parent) for file in (__file__, torch.__file__) if file)


def warn(message: str) -> None:
    """Warn of the first line up the stack that is neither ours nor torch's."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, stacklevel=level)
