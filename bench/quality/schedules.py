"""The schedules by name: what a rate is multiplied with over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("constant", "cosine", "warmup", "warmup_cosine")  # what is swept
RECIPES = ("nanogpt", "two_drops")  # of published workloads
WARMUP = 0.1  # of the run, in both swept schedules that have one


def swept(name: str, step: int, steps: int) -> float:
    """`warmup` rises to all of the rate, `cosine` falls to 0 at the end."""
    warmup = max(1, round(WARMUP * steps)) if "warmup" in name else 0
    if step < warmup:
        return (step + 1) / warmup
    gone = (step - warmup) / max(1, steps - warmup)
    return (1 + math.cos(math.pi * gone)) / 2 if name.endswith("cosine") else 1.0


def nanogpt(step: int, steps: int) -> float:
    """Up linearly for 100 steps, then half a cosine down to a tenth."""
    if step < 100:
        return (step + 1) / 101
    done = min(1.0, (step - 100) / max(1, steps - 100))
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


def two_drops(step: int, steps: int) -> float:
    """A tenth from half of the run on, a hundredth from three quarters on."""
    return 1.0 if step < steps // 2 else 0.1 if step < steps * 3 // 4 else 0.01


def share_of_rate(name: str, steps: int) -> Callable[[int], float]:
    """What a schedule leaves of the rate at each step."""
    recipe = {"nanogpt": nanogpt, "two_drops": two_drops}.get(name)
    return lambda step: swept(name, step, steps) if recipe is None else recipe(step, steps)


def scheduler(name: str, optimizer: Optimizer, steps: int) -> LambdaLR | None:
    """What moves an optimizer's rate after every step; nothing for a constant rate."""
    return None if name == "constant" else LambdaLR(optimizer, share_of_rate(name, steps))
