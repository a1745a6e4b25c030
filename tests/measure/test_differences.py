"""Differences of gradients against automatic differentiation: how far off they may be, and when they are no number.

Catches: a second evaluation with other random numbers; displacements that are too long, too short or one for layers of
all sizes, which only show as noise in the rates; a gradient that is missing in the second evaluation and counts as 0.
"""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS, closing, take_step
from torch import nn

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)


def curvatures(opt: torch.optim.Optimizer) -> torch.Tensor:
    return torch.tensor([row["curvature"] for row in opt.diagnostics().values()], dtype=torch.float64)


@EACH
@pytest.mark.parametrize("way", ["step", "backward"])
def test_dropout_has_the_same_masks_in_both_evaluations(kind, way):
    found = []
    for route in ("autograd", way):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double()
        x = torch.randn(16, 4, dtype=torch.float64)
        hvp = {"hvp": "finite_difference"} if route == "backward" else {}
        opt = OPTIMIZERS[kind](model.named_parameters(), curvature="blocks", **hvp)

        def loss(model=model, x=x):
            return model(x).square().mean()

        if route == "step":
            opt.step(closing(opt, loss))
        else:
            opt.backward(loss() if route == "autograd" else loss)
            opt.step()
        found.append(curvatures(opt))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-9)


@EACH
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_the_third_derivative_costs_no_more_than_rounding(kind, dtype, within):
    """Of exp it is as large as the second: a displacement of eps times the weights makes half of eps of an error."""
    found = []
    for route in ("backward", "closure"):
        w = nn.Parameter(torch.ones(4, dtype=dtype))
        opt = OPTIMIZERS[kind]([("layer.w", w)], lr=0.0)
        take_step(opt, lambda w=w: w.exp().sum(), route)
        found.append(curvatures(opt))
    torch.testing.assert_close(found[1], found[0], rtol=within, atol=0)


def test_layers_of_all_sizes_are_measured_in_one_evaluation():
    """One whose gradient is a million times another's may be displaced by that much less only, and the rest as ever.

    One whose gradient is tiny would have to go far: it goes as far as six bits of its weights show, which is enough.
    """
    found = []
    for route in ("backward", "closure"):
        weights = [nn.Parameter(torch.full((4,), size, dtype=torch.float64)) for size in (1.0, 0.7, 0.5, 0.4)]
        opt = OPTIMIZERS["sgd"]([(f"layer{i}.w", w) for i, w in enumerate(weights)], lr=0.0)

        def loss(weights=weights):
            return sum(s * w.exp().sum() for s, w in zip((1.0, 1.0, 1e6, 1e-8), weights, strict=True))

        take_step(opt, loss, route)
        found.append(curvatures(opt))
    torch.testing.assert_close(found[1][:3], found[0][:3], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1][3], found[0][3], rtol=0.05, atol=0)


@EACH
def test_a_layer_of_zeros_is_measured(kind):
    """Such as a residual branch's last: its displacement is by what its weights count as."""
    found = []
    for route in ("backward", "closure"):
        w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        opt = OPTIMIZERS[kind]([("layer.w", w)], lr=0.0)
        take_step(opt, lambda w=w: w.exp().sum(), route)
        assert opt.diagnostics()["layer"]["refreshes"] == 1
        found.append(curvatures(opt))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)


@EACH
def test_a_gradient_that_is_not_there_again_is_no_number(kind):
    """Of a layer of two tensors, one of which the last evaluation does not reach: half a curvature would be wrong."""
    layer, calls = nn.Linear(3, 2), []
    opt = OPTIMIZERS[kind](layer.named_parameters(prefix="layer"))
    rates, x = opt.rates(), torch.randn(5, 3)

    def loss():
        calls.append(None)
        bias = layer.bias if len(calls) < 3 else layer.bias.detach()
        return (x @ layer.weight.T + bias).square().mean()

    take_step(opt, loss)
    (row,) = opt.diagnostics().values()
    assert len(calls) == 3  # the second finds out whether it repeats
    assert (row["refreshes"], row["nonfinite"]) == (0, 1)
    assert opt.rates() == rates
