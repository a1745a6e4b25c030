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

from lwas_fast import AdamWLW, backends, fused_rates, refresh
from lwas_fast.curvature import Probe, Products, Vectors

pytestmark = pytest.mark.gpu
VGG16 = tuple(((width, 3 * 8, 9), (width,)) for width in (64, 64, 128, 128, *[256] * 3, *[512] * 6)) + (((10, 512),),)


def launch(problem, probe, products, plans):
    """With the kernel's own chunks, as in training."""
    (rows,) = fused_rates.Launch([probe], [products], [problem.opt.param_groups[0]], plans).rows()
    return rows


def kernels_of(profile):
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_triton_serves():
    assert backends._why_not_triton(torch.device("cuda", 0)) is None


def test_one_launch_and_no_copy_to_the_host():
    problem, plans = Problem(Case(layers=VGG16)), {}
    group = problem.opt.param_groups[0]
    probe, products = problem.measure()
    refresh.refreshed([probe], [products], [group], plans)
    torch.cuda.synchronize()
    probe, products = problem.measure()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            refresh.refreshed([probe], [products], [group], plans)
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
        opt.param_groups[0] |= {"lr": value, "weight_decay": value, "damping": value, "max_growth": 1 + value}
        step()
    assert [len(cache[0]) for cache in kernels.layer_rates.device_caches.values()] == compiled


def test_repeats_are_equal_bit_for_bit():
    problem, plans = Problem(Case(layers=VGG16, options={"noise_exponent": 0.5})), {}
    probe, products = problem.measure()
    first = launch(problem, probe, products, plans)
    for _ in range(1000):
        assert torch.equal(launch(problem, probe, products, plans), first)


def test_a_number_next_to_fifty_million_and_124_million_in_all():
    """Sums against float64, where terms cancel too; relative to the sum of their sizes."""
    sizes = ((1,), (50_000_017,), (1,), (74_000_000,))
    problem = Problem(Case(layers=tuple((s,) for s in sizes), options={"noise_exponent": 0.5}))
    probe, products = problem.measure()
    probe.vectors.momenta[1].normal_(mean=0.01)
    (sums,) = fused_rates.Launch([probe], [products], [problem.opt.param_groups[0]], {}).sums()
    for row, (g, d, u, m) in enumerate(zip(*probe.vectors[:2], products.tensors, probe.vectors.momenta, strict=True)):
        correction = 1 - 0.9**problem.case.steps
        sign = problem.signs[row]
        for column, (other, factor) in enumerate([(g, -sign), (u, 1.0), (d, 1.0), (m, -sign / correction)]):
            terms = d.double() * other.double() * factor
            assert abs(sums[row, column].item() - terms.sum().item()) <= 1e-6 * terms.abs().sum().item()


def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB")
    count = 2**31 + 4099
    param = torch.empty(count, dtype=torch.bfloat16, device="cuda")
    opt = AdamWLW([("layer.weight", param)])
    (bucket,) = opt._buckets
    direction = torch.zeros(count, device="cuda")
    direction[-4099:] = 1.0
    product = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    probe = Probe(bucket, bucket.select([0]), Vectors([product], [direction], None), [1.0], 1.0, 0.9)
    (sums,) = fused_rates.Launch([probe], [Products([product], 0.5)], opt.param_groups, {}).sums()
    assert sums[0, :3].tolist() == [-4099.0, 4099.0 / 2, 4099.0]
