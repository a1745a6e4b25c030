"""What only a GPU can show of the rates' single launch.

Catches: a second kernel or a copy back to the host in a refresh; a compilation for every learning rate or decay; sums
that lose digits or wrap around in very large tensors; results that depend on which program arrives last.
"""

from __future__ import annotations

import pytest
import torch
from test_rates import Case, Problem
from torch import nn
from torch.nn import functional as F

from lwas_fast import AdamWLW
from lwas_fast.measure import Measurement, Probe, Products, Vectors
from lwas_fast.rates import launch, refreshed

pytestmark = pytest.mark.gpu
VGG16 = tuple(((width, 3 * 8, 9), (width,)) for width in (64, 64, 128, 128, *[256] * 3, *[512] * 6)) + (((10, 512),),)


def rows_of(problem, probe, products, plans):
    """With the kernel's own chunks, as in training."""
    _, (rows,) = launch.launch([probe], [products], problem.opt.param_groups, plans)
    return rows


def kernels_of(profile):
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_triton_serves():
    assert launch.why_not(torch.device("cuda", 0)) is None


def test_one_launch_and_no_copy_to_the_host():
    problem, plans = Problem(Case(layers=VGG16)), {}
    groups = problem.opt.param_groups
    probe, products = problem.measure()
    refreshed(Measurement([0], [probe], [products]), groups, plans)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
        refreshed(Measurement([0], [probe], [products]), groups, plans)  # the first profile may miss kernels
        torch.cuda.synchronize()
    probe, products = problem.measure()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            refreshed(Measurement([0], [probe], [products]), groups, plans)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = kernels_of(profile)
    print(names)
    assert [n for n in names if "Memcpy" not in n and "Memset" not in n] == ["layer_rates"]
    assert not [n for n in names if "DtoH" in n]


def test_nothing_is_compiled_again():
    from lwas_fast.triton_kernels import layer_rates as kernels

    model = nn.Linear(33, 17).cuda()
    opt = AdamWLW(model.named_parameters(), update_every=1)

    def step():
        opt.zero_grad()
        opt.backward(F.mse_loss(model(torch.randn(8, 33, device="cuda")), torch.zeros(8, 17, device="cuda")))
        opt.step()

    step()
    compiled = [len(cache[0]) for cache in kernels.layer_rates.device_caches.values()]
    assert compiled
    for value in (0.0, 0.5, 1.0, 2.0, 16.0):
        opt.param_groups[0] |= {"lr": value, "weight_decay": value, "warmup_rate": 1 + value}
        step()
    assert [len(cache[0]) for cache in kernels.layer_rates.device_caches.values()] == compiled


def test_repeats_are_equal_bit_for_bit():
    problem, plans = Problem(Case(layers=VGG16)), {}
    probe, products = problem.measure()
    first = rows_of(problem, probe, products, plans)
    for _ in range(1000):
        assert torch.equal(rows_of(problem, probe, products, plans), first)


def test_a_number_next_to_fifty_million_and_124_million_in_all():
    """Sums against float64, where terms cancel too; relative to the sum of their sizes."""
    sizes = ((1,), (50_000_017,), (1,), (74_000_000,))
    problem = Problem(Case(layers=tuple((s,) for s in sizes)))
    probe, products = problem.measure()
    (sums,), _ = launch.launch([probe], [products], problem.opt.param_groups, {}, finish=False)
    for row, (g, d, u) in enumerate(zip(*probe.vectors, products.tensors, strict=True)):
        for column, (other, factor) in enumerate([(g, -problem.signs[row]), (u, 1.0), (d, 1.0)]):
            terms = d.double() * other.double() * factor
            assert abs(sums[row, column].item() - terms.sum().item()) <= 1e-6 * terms.abs().sum().item()


def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    count = 2**31 + 4099
    param = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    opt = AdamWLW([("layer.weight", param)])
    (bucket,) = opt._layout.buckets
    direction = torch.zeros(count, device="cuda")
    direction[-4099:] = 1.0
    product = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    loss = torch.tensor(0.7, device="cuda")
    probe = Probe(bucket, bucket.select([0]), Vectors([product], [direction]), [1.0], 1.0, loss, [0.0])
    (sums,), _ = launch.launch([probe], [Products([product], 0.5)], opt.param_groups, {}, finish=False)
    assert sums[0].tolist() == [-4099.0, 4099.0 / 2, 4099.0]
