"""A refresh's reduction, from vectors to rates of all layers, against the code that one would write first.

Ours is one Triton launch on a GPU, the package's torch code on a CPU. Theirs takes `_foreach_mul`, sums,
`_foreach_norm` and `stack`, and finishes with the same torch code; on a GPU also our own kernel, launched once for each
layer. The launch's own CPU time is measured too: it lays out addresses.

    pytest bench/test_rates.py --benchmark-json=out.json && python bench/report.py out.json
"""

from __future__ import annotations

import pytest
import torch
from paired import paired
from workloads import UPDATE_WORKLOADS, parameters

from lwas_fast import AdamWLW
from lwas_fast.measure import Measurement, Probe, Products, Vectors
from lwas_fast.rates import launch, refreshed
from lwas_fast.rates.closed_form import refresh

CUDA = torch.cuda.is_available()
MEASURES = ["whole", "launch"] if CUDA else ["whole"]


def probe_of(opt: AdamWLW, indices: list[int] | None) -> tuple[Probe, Products]:
    """Vectors for some or all of an optimizer's tensors; direction and product are the gradients' values."""
    (bucket,) = opt._layout.buckets
    selection = bucket.select(range(len(bucket.params)) if indices is None else indices)
    copies = [[p.grad.float() for p in selection.params] for _ in range(2)]
    vectors = Vectors([p.grad for p in selection.params], copies[0])
    products = Products([c.to(p.dtype) for c, p in zip(copies[1], selection.params, strict=True)], 1.0)
    loss = torch.ones((), device=bucket.table.device)
    return Probe(
        bucket, selection, vectors, [1.0] * len(selection.elements), 1.0, loss, [0.0] * len(selection.elements)
    ), products


def by_foreach(probe: Probe, products: Products, group: dict) -> list[torch.Tensor]:
    """What one would write first."""
    gradients, directions = probe.vectors
    columns = [
        torch.stack([t.sum() for t in torch._foreach_mul(gradients, directions)]),
        torch.stack([t.sum() for t in torch._foreach_mul(products.tensors, directions)]),
        torch.stack(torch._foreach_norm(directions)).square(),
    ]
    return refresh([probe], [torch.stack(columns, 1)], [group])


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("against", ["foreach", "a launch a layer"] if CUDA else ["foreach"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("workload", UPDATE_WORKLOADS)
def test_rates(benchmark, device, workload, dtype, against, measure):
    if dtype == "bf16" and (measure == "launch" or not CUDA):
        pytest.skip("float32 tells")
    torch.manual_seed(0)
    params = parameters(UPDATE_WORKLOADS[workload](), {"float32": torch.float32, "bf16": torch.bfloat16}[dtype], device)
    opt = AdamWLW(params)
    group, plans = opt.param_groups[0], {}
    probe, products = probe_of(opt, None)

    def ours() -> None:
        refreshed(Measurement([0], [probe], [products]), [group], plans)

    apart = [probe_of(opt, [i]) for i in range(len(params))] if against != "foreach" else []

    def theirs() -> None:
        if not apart:
            by_foreach(probe, products, group)
        for one, product in apart:
            launch.launch([one], [product], [group], apart_plans[one.selection])

    apart_plans: dict = {one.selection: {} for one, _ in apart}
    count = sum(p.numel() for p in params)
    with torch.no_grad():
        paired(benchmark, ours, theirs, device, (50 if CUDA else 9) if count > 100e6 else 50, measure)
    moved = count * (4 + 2 * params[0].element_size())
    benchmark.extra_info.update(
        workload=workload,
        case=f"rates, {dtype}, against {against}",
        measure=measure,
        parameters=count,
        tensors=len(params),
        bytes=moved,
        gigabytes_per_second=moved / benchmark.extra_info["seconds"] / 1e9,
    )
