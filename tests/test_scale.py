"""A constant factor of the loss changes no step, and a constant added to it next to nothing.

A factor that is a power of two rounds nothing, so where eps is small enough the weights are equal bit for bit. Catches:
any number of the method that has a unit and is a constant.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import ALL, batches, loss_of, small_net, take_step
from torch.nn import functional as F

ROUTES = ("backward", "closure", "accumulated", "scaler")
FACTORS = (2.0**-13, 2.0**27)


def trained(kind, route, options, change):
    """The weights after 40 steps on a changed loss, with an eps that no gradient comes near."""
    model = small_net(torch.float32)
    own = {"eps": 1e-30, "weight_decay": 0.1} if kind == "adamw" else {}
    opt = ALL[kind](model.named_parameters(), **own, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=15)
    for batch in batches(40, torch.float32):

        def loss(batch=batch):
            return change(loss_of(model, batch))

        if route in ("closure", "backward"):
            take_step(opt, loss, route)
            continue
        opt.zero_grad()
        if route == "accumulated":
            opt.backward(loss(), last=False)
        opt.backward(loss(), scaler=scaler if route == "scaler" else None)
        if route == "scaler":
            scaler.step(opt)
            scaler.update()
        else:
            opt.step()
    rows = opt.diagnostics().values()
    assert all(row["refreshes"] == 4 for row in rows)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("fused", [False, None], ids=["plain", "compiled where it can be"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ALL)
def test_a_factor_of_the_loss_changes_no_bit(kind, route, fused):
    plain = trained(kind, route, {"fused": fused}, lambda loss: loss)
    for factor in FACTORS:
        assert torch.equal(trained(kind, route, {"fused": fused}, lambda loss, s=factor: s * loss), plain)


@pytest.mark.parametrize("options", [{"curvature": "blocks"}, {"schedule_free": False}], ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_nor_does_it_in_other_modes(kind, options):
    plain = trained(kind, "backward", options, lambda loss: loss)
    for factor in FACTORS:
        assert torch.equal(trained(kind, "backward", options, lambda loss, s=factor: s * loss), plain)


@pytest.mark.parametrize("kind", ALL)
def test_a_loss_that_crosses_zero_trains_as_well(kind):
    """Its size is all that is taken of it, so steps differ, but only in how they are bounded."""
    found = {}
    for shift in (0.0, 5.0, -0.5, -5.0):
        torch.manual_seed(0)
        model = small_net(torch.float32)
        opt = ALL[kind](model.named_parameters())
        data = batches(150, torch.float32)
        for batch in data:
            opt.zero_grad()
            opt.backward(loss_of(model, batch) + shift)
            opt.step()
        opt.eval()
        found[shift] = sum(loss_of(model, batch).item() for batch in data) / len(data)
    assert max(found.values()) < 1.1 * found[0.0], found


def test_the_default_eps_can_hardly_tell():
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :4] + 0.5 * torch.randn(512, 4)).argmax(1)
    found = []
    for k in (-13, 0, 27):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
        opt = ALL["adamw"](model.named_parameters())
        for step in range(150):
            at = torch.randperm(512, generator=torch.Generator().manual_seed(step))[:64]
            opt.zero_grad()
            opt.backward(2.0**k * F.cross_entropy(model(x[at]), y[at]))
            opt.step()
        opt.eval()
        found.append(F.cross_entropy(model(x), y).item())
    assert all(math.isclose(loss, found[1], rel_tol=0.02) for loss in found), found
