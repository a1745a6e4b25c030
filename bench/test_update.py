"""The fused update against torch's own: `opt.step()` of AdamWLW and AdamW, of SGDLW and SGD, between refreshes.

Both sides share parameters and gradients, take turns, and keep their own state; ours is float32 whatever the parameters
are, torch's of the parameters' dtype. "near its cap" is the dearest step ours has: every layer needs the second pass.

    pytest bench/test_update.py --benchmark-json=out.json && python bench/report.py out.json
"""

from __future__ import annotations

import pytest
import torch
from paired import paired
from workloads import UPDATE_WORKLOADS, parameters

from lwas_fast import SGDLW, AdamWLW

OURS = {"AdamW": AdamWLW, "SGD-m": SGDLW}
THEIRS = {
    "AdamW": lambda params, **kind: torch.optim.AdamW(params, lr=1e-6, **kind),
    "SGD-m": lambda params, **kind: torch.optim.SGD(params, lr=1e-6, momentum=0.9, **kind),
}
# Bytes a parameter: read parameter, gradient, state; write parameter, state. State in float32.
BYTES = {"AdamW": {4: 28, 2: 22}, "SGD-m": {4: 20, 2: 14}}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
THREADS = [0] if torch.cuda.is_available() else [1, 2]
MEASURES = ["whole", "launch"] if torch.cuda.is_available() else ["whole"]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("case", ["fused", "foreach", "near its cap"])
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize("workload", UPDATE_WORKLOADS)
def test_update(benchmark, device, workload, rule, dtype, threads, case, measure):
    if (case == "foreach" or measure == "launch") and dtype == "bf16":
        pytest.skip("float32 tells")
    torch.manual_seed(0)
    before = torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        shapes = UPDATE_WORKLOADS[workload]()
        params = parameters(shapes, DTYPES[dtype], device)
        theirs = THEIRS[rule](params, **{"foreach" if case == "foreach" else "fused": True})
        # Never refreshed, so that the update alone is timed; rates so small that the weights stay what they are.
        cap = 1e-9 if case == "near its cap" else 0.1
        ours = OURS[rule](params, warmup_rate=1e-6, warmup_steps=10**9, cap=cap)
        count = sum(p.numel() for p in params)
        rounds = (50 if device == "cuda" else 9) if count > 100e6 else 100 if device == "cuda" else 25
        paired(benchmark, ours.step, theirs.step, device, rounds, launch_only=measure == "launch")
    finally:
        torch.set_num_threads(before)
    benchmark.group = f"update of {rule}"
    moved = count * BYTES[rule][params[0].element_size()]
    benchmark.extra_info.update(
        workload=workload,
        case=f"{rule}, {dtype}, against {'foreach' if case == 'foreach' else 'fused'}"
        + (", near its cap" if case == "near its cap" else ""),
        threads=threads or None,
        measure=measure,
        parameters=count,
        tensors=len(params),
        gigabytes_per_second=moved / benchmark.stats.stats.median / 1e9,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the yardstick of the GPU's numbers")
def test_copy_bandwidth(benchmark):
    """What a copy of 1 GiB reaches: the most that any update can."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    benchmark.pedantic(copy, rounds=50, warmup_rounds=5)
    moved = 2 * source.numel() * 4
    benchmark.extra_info.update(case="copy", gigabytes_per_second=moved / benchmark.stats.stats.median / 1e9)
