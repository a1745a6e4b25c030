"""The schedules by name: what a rate is multiplied with over a run."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

SCHEDULES = ("constant", "cosine", "warmup_cosine", "two_drops")
WARM_UP, LEAST = 100, 0.1  # of warmup_cosine: its first steps, and the share of the rate that it ends at


def warmup_cosine(step: int, steps: int) -> float:
    """Up linearly for 100 steps, then half a cosine down to a tenth."""
    if step < WARM_UP:
        return (step + 1) / (WARM_UP + 1)
    done = min(1.0, (step - WARM_UP) / max(1, steps - WARM_UP))
    return LEAST + (1 - LEAST) * (1 + math.cos(math.pi * done)) / 2


def two_drops(step: int, steps: int) -> float:
    """A tenth from half of the run on, a hundredth from three quarters on."""
    return 1.0 if step < steps // 2 else 0.1 if step < steps * 3 // 4 else 0.01


def scheduler(name: str, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """What moves an optimizer's rate after every step; nothing for a constant rate."""
    if name == "constant":
        return None
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    factor = {"warmup_cosine": warmup_cosine, "two_drops": two_drops}[name]
    return LambdaLR(optimizer, lambda step: factor(step, steps))
