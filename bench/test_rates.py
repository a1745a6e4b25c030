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

from lwas_fast import AdamWLW, fused_rates, rates, refresh
from lwas_fast.curvature import Probe, Products, Vectors

CUDA = torch.cuda.is_available()
MEASURES = ["whole", "launch"] if CUDA else ["whole"]


def probe_of(opt: AdamWLW, indices: list[int] | None, momenta: bool) -> tuple[Probe, Products]:
    """Vectors for some or all of an optimizer's tensors; direction, product and momentum are the gradients' values."""
    (bucket,) = opt._buckets
    selection = bucket.select(range(len(bucket.params)) if indices is None else indices)
    copies = [[p.grad.float() for p in selection.params] for _ in range(3 if momenta else 2)]
    vectors = Vectors([p.grad for p in selection.params], copies[0], copies[2] if momenta else None)
    products = Products([c.to(p.dtype) for c, p in zip(copies[1], selection.params, strict=True)], 1.0)
    return Probe(bucket, selection, vectors, [1.0] * len(selection.elements), 1.0, 0.9), products


def by_foreach(probe: Probe, products: Products, group: dict) -> torch.Tensor:
    """What one would write first."""
    gradients, directions, momenta = probe.vectors
    columns = [
        torch.stack([t.sum() for t in torch._foreach_mul(gradients, directions)]),
        torch.stack([t.sum() for t in torch._foreach_mul(products.tensors, directions)]),
        torch.stack(torch._foreach_norm(directions)).square(),
    ]
    nothing = columns[0] * torch.nan
    columns += [torch.stack([t.sum() for t in torch._foreach_mul(momenta, directions)]) if momenta else nothing]
    return rates.refresh(probe.rows, torch.stack(columns, 1), group)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("against", ["foreach", "a launch a layer"] if CUDA else ["foreach"])
@pytest.mark.parametrize("momenta", [False, True], ids=["", "with momentum"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("workload", UPDATE_WORKLOADS)
def test_rates(benchmark, device, workload, dtype, momenta, against, measure):
    if dtype == "bf16" and (momenta or measure == "launch" or not CUDA):
        pytest.skip("float32 tells")
    torch.manual_seed(0)
    params = parameters(UPDATE_WORKLOADS[workload](), {"float32": torch.float32, "bf16": torch.bfloat16}[dtype], device)
    opt = AdamWLW(params)
    opt._buckets[0].steps.fill_(1)
    group, plans = opt.param_groups[0], {}
    probe, products = probe_of(opt, None, momenta)

    def ours() -> None:
        refresh.refreshed([probe], [products], [group], plans)

    apart = [probe_of(opt, [i], momenta) for i in range(len(params))] if against != "foreach" else []

    def theirs() -> None:
        if not apart:
            by_foreach(probe, products, group)
        for one, product in apart:
            fused_rates.Launch([one], [product], [group], apart_plans[one.selection]).rows()

    apart_plans: dict = {one.selection: {} for one, _ in apart}
    count = sum(p.numel() for p in params)
    with torch.no_grad():
        paired(benchmark, ours, theirs, device, (50 if CUDA else 9) if count > 100e6 else 50, measure == "launch")
    moved = count * (4 + 4 * momenta + 2 * params[0].element_size())
    benchmark.extra_info.update(
        workload=workload,
        case=f"rates, {dtype}{', with momentum' * momenta}, against {against}",
        measure=measure,
        parameters=count,
        tensors=len(params),
        bytes=moved,
        gigabytes_per_second=moved / benchmark.stats.stats.median / 1e9,
    )
