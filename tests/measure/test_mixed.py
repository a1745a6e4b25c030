"""Measurements under autocast, with and without a loss scale.

Catches: products that leave float16's range and are dropped; a factor against that which rounds; a skipped step that
moves rates; casted weights that autocast keeps over a displacement, so that the second gradient equals the first.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from cases import OPTIMIZERS, batches, small_net
from torch import Tensor, nn
from torch.nn import functional as F

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)
ESTIMATOR = pytest.mark.parametrize("curvature", ["signs", "blocks"])
MEASUREMENTS = 3


class Attention(nn.Module):
    """One block of a transformer."""

    def __init__(self, dim: int = 32):
        super().__init__()
        self.before, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.body = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v)
        return x + self.body(x)


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mlp":
        body = [nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    elif name == "cnn":
        body = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AvgPool2d(4), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 10)]
    else:
        body = [nn.Flatten(1, 2), nn.Linear(16, 32), Attention(), nn.LayerNorm(32), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*body)


def measured(kind: str, name: str, half: torch.dtype | None, scale: float | None, times: float = 1.0, **options):
    """Measure over some batches at the same weights; the loss is taken `times` itself."""
    model, made = net(name), torch.Generator().manual_seed(1)
    classes = torch.randn(10, 1, 16, 16, generator=made)
    opt = OPTIMIZERS[kind](model.named_parameters(), lr=0.0, update_every=1, **options)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    for _ in range(MEASUREMENTS):
        opt.zero_grad()
        y = torch.randint(10, (32,), generator=made)
        x = classes[y] + 2 * torch.randn(32, 1, 16, 16, generator=made)
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            loss = times * F.cross_entropy(model(x).float(), y)
        opt.backward(loss, scaler=scaler)
        opt.step() if scaler is None else (scaler.step(opt), scaler.update())
    assert scaler is None or scaler.get_scale() == scale  # no gradient overflowed
    return opt


# SGD's directions are gradients: long ones where the loss is a large number, as a sum over a batch is.
@pytest.mark.parametrize(("kind", "times"), [("adamw", 1.0), ("sgd", 1024.0), ("sgd", 2.0**-10)])
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
@ESTIMATOR
def test_no_measurement_leaves_the_range_of_float16(kind, times, name, curvature):
    found = measured(kind, name, torch.float16, 65536 / times, times, curvature=curvature)
    assert {row["refreshes"] for row in found.diagnostics().values()} == {MEASUREMENTS}
    wanted = measured(kind, name, None, None, times, curvature=curvature)
    # Where a gradient is next to 0, float16 may turn the sign of Adam's direction.
    torch.testing.assert_close(found.rates(), wanted.rates(), rtol=0.15, atol=0)


@EACH
@ESTIMATOR
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_loss_scale_changes_no_bit_where_nothing_leaves_the_range(kind, curvature, half):
    found = [measured(kind, "mlp", half, scale, curvature=curvature).diagnostics() for scale in (None, 1024.0)]
    assert found[0] == found[1]


@EACH
@ESTIMATOR
def test_layers_without_a_gradient_do_not_count(kind, curvature):
    """Their directions are zeros, which no factor makes long."""
    weights = [torch.full((3,), 0.5, requires_grad=True) for _ in range(2)]
    opt = OPTIMIZERS[kind](weights, update_every=1, curvature=curvature)
    for both in (0.0, 1.0):  # nothing has a gradient, one layer has
        opt.zero_grad()
        loss = (both * weights[0].square() + 0.0 * weights[1].square()).sum()
        opt.backward(loss, scaler=torch.amp.GradScaler("cpu"))
        opt.step()
    assert [row["refreshes"] for row in opt.diagnostics().values()] == [1, 0]


@EACH
@ESTIMATOR
@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_a_step_that_the_scaler_skips_leaves_rates_and_weights(kind, curvature, hvp):
    model, (x, y) = small_net(torch.float32), batches(1, torch.float32)[0]
    opt = OPTIMIZERS[kind](model.named_parameters(), update_every=1, curvature=curvature, hvp=hvp)
    for scale in (1024.0, 2.0**40):
        before, rates = [p.detach().clone() for p in model.parameters()], opt.rates()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)

        def loss():
            with torch.autocast("cpu", torch.float16):
                return F.cross_entropy(model(x).float(), y)

        opt.zero_grad()
        opt.backward(loss, scaler=scaler)
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() < scale  # the gradient overflowed
    assert opt.rates() == rates
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@EACH
@ESTIMATOR
@pytest.mark.parametrize("way", ["step", "backward"])
def test_autocast_around_a_second_evaluation(kind, curvature, way):
    """It gives what autocast within the closure does, and its kept weights are the right ones afterwards."""
    found = []
    for around in (False, True):
        model, (x, y) = small_net(torch.float32), batches(1, torch.float32)[0]
        opt = OPTIMIZERS[kind](model.named_parameters(), lr=0.0, curvature=curvature, hvp="finite_difference")
        half = torch.autocast("cpu", torch.bfloat16)
        outside, inside = (half, nullcontext()) if around else (nullcontext(), half)

        def closure(model=model, opt=opt, inside=inside, x=x, y=y):
            opt.zero_grad()
            with inside:
                loss = F.cross_entropy(model(x), y)
            if way == "step":
                loss.backward()
            return loss

        with outside:
            opt.step(closure) if way == "step" else (opt.backward(closure), opt.step())
            with inside:
                after = model(x)
        found.append((opt.diagnostics(), after.tolist()))
    assert found[0] == found[1]
    assert any(row["curvature"] != 0 for row in found[0][0].values())
