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


def paired(
    benchmark: Any,
    ours: Step,
    theirs: Step,
    device: str,
    rounds: int,
    measure: str = "whole",
    between: Step = lambda: None,
) -> float:
    """Time `ours` with pytest-benchmark and `theirs` before each of its rounds; note both and their ratio.

    Args:
        benchmark: pytest-benchmark's fixture; its JSON gets ``seconds`` and ``theirs_median`` (medians) and ``ratio``.
        ours: One step of the side that is measured.
        theirs: One step of the side it is compared with.
        device: "cuda" waits for the device in both timings, "cpu" need not.
        rounds: How many steps of each.
        measure: "whole" takes the time until a step is done. On CUDA, "launch" stops the clock when it is enqueued: the
            CPU's time; "device" takes the GPU's alone, of a step that was enqueued in full before the GPU began.
        between: What is done before each pair, outside of the times.

    Returns:
        The ratio of the medians, ours over theirs.
    """
    seconds: list[float] = []
    on_device: list[float] = []

    def other() -> None:
        between()
        _wait(device)
        if measure == "device":
            seconds.append(_device_time(theirs))
            on_device.append(_device_time(ours))
            return
        start = time.perf_counter()
        theirs()
        if measure == "whole":
            _wait(device)
        seconds.append(time.perf_counter() - start)
        _wait(device)

    def mine() -> None:
        ours()
        if measure == "whole":
            _wait(device)

    for _ in range(3):  # state is made, memory is touched
        theirs()
        ours()
    benchmark.pedantic(mine, setup=other, rounds=rounds, iterations=1)
    median = statistics.median(seconds)
    own = statistics.median(on_device) if on_device else benchmark.stats.stats.median
    benchmark.extra_info.update(seconds=own, theirs_median=median, ratio=own / median)
    return float(own / median)


def _device_time(step: Step) -> float:
    """Seconds that the GPU works on a step; it is kept busy until all of the step is enqueued."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(20_000_000)  # clock cycles: 10 ms
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
