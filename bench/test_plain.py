"""The update in plain torch, which takes the step where nothing was compiled, against torch's own with `foreach=True`.

As in test_update.py: both sides share parameters and gradients, take turns, and nothing is measured between.

    pytest bench/test_plain.py --benchmark-json=out.json && python bench/report.py out.json
"""

from __future__ import annotations

import pytest
import torch
from paired import paired
from test_update import OURS, THEIRS, THREADS
from workloads import many_small, parameters, small_cnn

WORKLOADS = {"small CNN": small_cnn, "1000 x 1k": many_small}


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("mode", ["schedule-free", "momentum"])
@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_plain(benchmark, device, workload, rule, mode, threads):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        params = parameters(WORKLOADS[workload](), torch.float32, device)
        options = {"warmup_rate": 1e-6, "warmup_steps": 10**9, "schedule_free": mode == "schedule-free"}
        ours = OURS[rule](params, foreach=True, **options)
        paired(benchmark, ours.step, THEIRS[rule](params, foreach=True).step, device, rounds=60)
    finally:
        torch.set_num_threads(before)
    benchmark.group = f"plain update of {rule}"
    benchmark.extra_info.update(
        workload=workload,
        case=f"{rule}, {mode}",
        threads=threads or None,
        parameters=sum(p.numel() for p in params),
        tensors=len(params),
    )
