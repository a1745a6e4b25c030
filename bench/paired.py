"""Two sides timed in turns, so that whatever else the machine does hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], object]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def paired(benchmark: Any, ours: Step, theirs: Step, device: str, rounds: int, launch_only: bool = False) -> float:
    """Time `ours` with pytest-benchmark and `theirs` before each of its rounds; note both and their ratio.

    Args:
        benchmark: pytest-benchmark's fixture; its JSON gets ``theirs_median``, ``theirs_min`` and ``ratio`` (medians).
        ours: One step of the side that is measured.
        theirs: One step of the side it is compared with.
        device: "cuda" waits for the device in both timings, "cpu" need not.
        rounds: How many steps of each.
        launch_only: On CUDA, stop the clock when the step is enqueued: the CPU's time.

    Returns:
        The ratio of the medians, ours over theirs.
    """
    seconds: list[float] = []

    def other() -> None:
        _wait(device)
        start = time.perf_counter()
        theirs()
        if not launch_only:
            _wait(device)
        seconds.append(time.perf_counter() - start)
        _wait(device)

    def mine() -> None:
        ours()
        if not launch_only:
            _wait(device)

    for _ in range(3):  # state is made, memory is touched
        theirs()
        ours()
    benchmark.pedantic(mine, setup=other, rounds=rounds, iterations=1)
    median = statistics.median(seconds)
    ratio: float = benchmark.stats.stats.median / median
    benchmark.extra_info.update(theirs_median=median, theirs_min=min(seconds), ratio=ratio)
    return ratio
