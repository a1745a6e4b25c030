"""From rates to weights: one step of all layers, and the average that is evaluated.

`control.py` turns a rate into what multiplies a direction; `plain.py` (torch) and `compiled.py` (C++ and CUDA, found by
`extension.py`) take the step; `average.py` keeps the schedule-free average.
"""

from lwas_fast.update.average import (
    ROUNDED,
    TRAINED,
    as_saved,
    average_of,
    averaged,
    check_training,
    forget_rounding,
    holds,
    samples,
    swap,
)
from lwas_fast.update.extension import check_fused
from lwas_fast.update.step import prepare, run

__all__ = [
    "ROUNDED",
    "TRAINED",
    "as_saved",
    "average_of",
    "averaged",
    "check_fused",
    "check_training",
    "forget_rounding",
    "holds",
    "prepare",
    "run",
    "samples",
    "swap",
]
