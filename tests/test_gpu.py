"""What only a GPU can show; the first test runs on the CPU too.

Catches: dropout masks that differ between the two evaluations of a finite difference; a host synchronisation in the
middle of training; cuDNN's recurrent layers, which have no second derivative, unexplained or without a way out.
"""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS, take_step
from torch import nn
from torch.nn import functional as F

from lwas_fast import AdamWLW, CurvatureError

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)
ROUTES = pytest.mark.parametrize("route", ["autograd", "closure"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.parametrize("draw", ["dropout", "rand"])
def test_random_numbers_are_replayed(device, draw):
    """With the same masks the difference is the curvature of this very function; with others, noise over epsilon."""
    torch.manual_seed(0)
    x = torch.randn(64, 6, dtype=torch.float64, device=device)
    y = torch.randint(0, 3, (64,), device=device)
    start = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(x)
    found = []
    for route in ("autograd", "closure"):
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(x)
        model.load_state_dict(start.state_dict())
        opt = AdamWLW(model.named_parameters(), curvature="blocks")

        def loss(model=model):
            hidden = model[1](model[0](x))
            keep = torch.rand_like(hidden) > 0.5 if draw == "rand" else F.dropout(torch.ones_like(hidden), 0.5)
            return F.cross_entropy(model[2](hidden * keep), y)

        torch.manual_seed(5)
        take_step(opt, loss, route)
        after = torch.rand(4, device=device)
        found.append(([row["curvature"] for row in opt.diagnostics().values()], after))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert torch.equal(found[0][1], found[1][1])  # and the stream goes on as if drawn from once


@pytest.mark.gpu
@EACH
@ROUTES
def test_no_host_synchronisation(kind, route):
    """Over 100 steps with their refreshes; the first steps, which lay out layers and state, may wait."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).cuda()
    x, y = torch.randn(64, 16, device="cuda"), torch.randint(0, 4, (64,), device="cuda")
    opt = OPTIMIZERS[kind](model.named_parameters(), update_every=10)

    def steps(count):
        for _ in range(count):
            take_step(opt, lambda: F.cross_entropy(model(x), y), route)

    steps(11)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(100)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(row["refreshes"] == 12 for row in opt.diagnostics().values())


@pytest.mark.gpu
@EACH
def test_cudnn_lstm(kind):
    model, x = nn.LSTM(8, 16, batch_first=True).cuda(), torch.randn(4, 7, 8, device="cuda")
    opt = OPTIMIZERS[kind](model.named_parameters(), update_every=1)

    def loss():
        return (model(x)[0] - 0.3).square().mean()

    with pytest.raises(CurvatureError, match=r"cuDNN.*cudnn.flags\(enabled=False\).*finite_difference"):
        opt.backward(loss())
    assert all(p.grad is None for p in model.parameters())
    first = loss().item()
    for route in ("autograd", "closure"):  # the two ways out that it names
        for _ in range(10):
            with torch.backends.cudnn.flags(enabled=route == "closure"):
                take_step(opt, loss, route)
    assert all(row["refreshes"] == 20 for row in opt.diagnostics().values())
    assert loss().item() < 0.9 * first
