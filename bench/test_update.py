"""The fused update against torch's own: `opt.step()` of AdamWLW and AdamW, of SGDLW and SGD, between measurements.

Both sides share parameters and gradients, take turns, and keep their own state; ours is float32 whatever the parameters
are, torch's of the parameters' dtype. Ours is the default mode, and every layer is at its cap, as most are in training:
real runs of an MLP, a CNN, an LSTM and a transformer have 65 to 99 % of their weights there. The gradients' size varies
by a fifth from step to step. Beside it: momentum mode, and "corrected", the dearest step there is: each layer turns out
to have moved much too far, and is corrected (in those runs .5 % of steps and less).

    pytest bench/test_update.py --benchmark-json=out.json && python bench/report.py out.json
"""

from __future__ import annotations

import math

import pytest
import torch
from paired import paired
from workloads import UPDATE_WORKLOADS, parameters

from lwas_fast import SGDLW, AdamWLW
from lwas_fast.table import Column

OURS = {"AdamW": AdamWLW, "SGD-m": SGDLW}
THEIRS = {
    "AdamW": lambda params, **kind: torch.optim.AdamW(params, lr=1e-6, **kind),
    "SGD-m": lambda params, **kind: torch.optim.SGD(params, lr=1e-6, momentum=0.9, **kind),
}
# Bytes a parameter: read parameter, gradient, state; write parameter, state. State in float32.
BYTES = {"AdamW": {4: 28, 2: 22}, "SGD-m": {4: 20, 2: 14}}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
THREADS = [0] if torch.cuda.is_available() else [1, 2]
MEASURES = ["whole", "launch", "device"] if torch.cuda.is_available() else ["whole"]
CASES = {"default": "", "momentum": ", momentum", "foreach": ", against foreach", "corrected": ", corrected"}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", OURS)
@pytest.mark.parametrize("workload", UPDATE_WORKLOADS)
def test_update(benchmark, device, workload, rule, dtype, threads, case, measure):
    if dtype == "bf16" and (case == "foreach" or measure == "launch"):
        pytest.skip("float32 tells")
    torch.manual_seed(0)
    before = torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        shapes = UPDATE_WORKLOADS[workload]()
        params = parameters(shapes, DTYPES[dtype], device)
        gradients = [p.grad for p in params]
        theirs = THEIRS[rule](params, **{"foreach" if case == "foreach" else "fused": True})
        # Never measured, so that the update alone is timed. The rate is beyond any cap, and lr so small that the
        # weights stay what they are.
        ours = OURS[rule](params, warmup_rate=10.0, warmup_steps=10**9, lr=1e-7, schedule_free=case != "momentum")
        factors = [1.0]

        def between() -> None:
            factors.append(math.exp(0.2 * torch.randn(()).item()))
            torch._foreach_mul_(gradients, factors[-1] / factors[-2])
            if case == "corrected":  # what is expected is far too short
                for bucket in ours._layout.buckets:
                    bucket.table[:, Column.LENGTH] *= 0.1

        count = sum(p.numel() for p in params)
        rounds = 20 if measure == "device" else 50 if device == "cuda" else 9 if count > 100e6 else 25
        paired(benchmark, ours.step, theirs.step, device, rounds, measure, between)
        capped = {row["capped"] for row in ours.diagnostics().values()}
        assert min(capped) >= rounds, "not every layer was at its cap"
    finally:
        torch.set_num_threads(before)
    benchmark.group = f"update of {rule}"
    moved = count * BYTES[rule][params[0].element_size()]
    benchmark.extra_info.update(
        workload=workload,
        case=f"{rule}, {dtype}{CASES[case]}",
        threads=threads or None,
        measure=measure,
        parameters=count,
        tensors=len(params),
        gigabytes_per_second=moved / benchmark.extra_info["seconds"] / 1e9,
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
