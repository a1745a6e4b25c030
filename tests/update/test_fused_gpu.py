"""What only a GPU can show of the fused update; `test_fused.py` runs its comparisons there too.

Catches: a host synchronisation, a launch more than two, results that differ from run to run, addresses that a CUDA
graph does not capture, the wrong stream, more tensors than a launch's table holds, offsets cut to 32 bits.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_fused import EACH, KINDS, both, compare, step_alike

from lwas_fast import AdamWLW
from lwas_fast.update import extension

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        extension.EXTENSION is None or not extension.EXTENSION.build_info()["cuda"], reason="built without CUDA"
    ),
]


def many(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    sizes = torch.randint(0, 90_000, (count,)).tolist()
    return [torch.randn(n, device="cuda").to(dtype).requires_grad_() for n in sizes]


def never_refreshed(kind: str, params: list[torch.Tensor], **options: object) -> torch.optim.Optimizer:
    opt = KINDS[kind](params, update_every=10**9, warmup_steps=10**9, fused=True, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    return opt


def kernels_of(step) -> list[str]:
    """Names of our kernels that a step launches; the first profile of a process may miss some, so it is thrown away."""
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    print(on_device)
    return [name for name in on_device if "lwas" in name]


@EACH
@pytest.mark.parametrize("count", [57, 58, 59, 481, 1000])
def test_more_tensors_than_a_launch_holds(kind, count):
    params = many(count)
    pairs = both(kind, params)
    for _ in range(2):
        step_alike(pairs, [torch.randn_like(p) for p in params])
    compare(pairs, factor=2)


@EACH
def test_mixed_dtypes_in_one_layer(kind):
    params = [p for dtype in (torch.float32, torch.bfloat16, torch.float16) for p in many(3, dtype)]
    pairs = both(kind, params)
    step_alike(pairs, [torch.randn_like(p) for p in params])
    compare(pairs, factor=2)


@EACH
@pytest.mark.parametrize("cap", [0.1, 1e-3])
def test_bit_equal_from_run_to_run(kind, cap):
    params = many(40)
    gradients = [torch.randn_like(p) for p in params]
    found = []
    for _ in range(5):
        own = copy.deepcopy(params)
        opt = never_refreshed(kind, own, cap=cap)
        for p, g in zip(own, gradients, strict=True):
            p.grad = g
        for _ in range(3):
            opt.step()
        found.append(own)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@EACH
def test_an_ordinary_step_never_waits_and_launches_twice(kind):
    params = many(100)
    opt = never_refreshed(kind, params)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(kernels_of(opt.step)) == 2


@EACH
def test_graph_replay_equals_eager(kind):
    params = many(70)
    eager, graphed = copy.deepcopy(params), params
    gradients = [torch.randn_like(p) for p in params]
    lr = torch.ones((), device="cuda")
    one, two = never_refreshed(kind, eager, lr=lr.clone()), never_refreshed(kind, graphed, lr=lr)
    for p, q, g in zip(eager, graphed, gradients, strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        two.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two.step()
    for factor in (1.0, 0.5, 0.25):  # a schedule, and gradients that change in place
        lr.fill_(factor)
        for q, g in zip(graphed, gradients, strict=True):
            q.grad.copy_(g * factor)
        graph.replay()
    one.step()
    for factor in (1.0, 0.5, 0.25):
        one.param_groups[0]["lr"].fill_(factor)
        for p, g in zip(eager, gradients, strict=True):
            p.grad.copy_(g * factor)
        one.step()
    for p, q in zip(eager, graphed, strict=True):
        assert torch.equal(p, q)


def test_offsets_beyond_32_bits():
    count = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB")
    p = torch.zeros(count, dtype=torch.bfloat16, device="cuda").requires_grad_()
    p.grad = torch.ones_like(p)
    opt = AdamWLW([p], warmup_rate=0.5, warmup_steps=9, weight_decay=0.0, cap=1e9, fused=True)
    opt.step()
    for part in (p[:10], p[2**31 - 5 : 2**31 + 5], p[-10:]):
        assert (part == -0.5).all()
    assert (p == -0.5).all()
