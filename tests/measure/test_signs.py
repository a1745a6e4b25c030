"""Signs of the directions: drawn so that terms between layers cancel, and curvature is of what acts on a layer.

Catches: signs that are not random, not new at each measurement or shared by groups, each of which makes the estimator
biased without any error; decay that counts where it does not act.
"""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS, take_step
from torch import nn

from lwas_fast.measure.probes import draw_signs

DRAWS, LAYERS = 4000, 5
FAR = 5 / DRAWS**0.5  # five standard deviations of a mean of so many signs


def test_signs_are_fair_and_independent():
    """Of layers, of measurements and of seeds."""
    draws = torch.tensor([draw_signs(0, step, LAYERS) for step in range(DRAWS)])
    other = torch.tensor([draw_signs(1, step, LAYERS) for step in range(DRAWS)])
    assert draws.abs().eq(1).all()
    assert (draws.mean(0).abs() < FAR).all()
    assert ((draws.T @ draws / DRAWS - torch.eye(LAYERS)).abs() < FAR).all()
    assert ((draws[1:].T @ draws[:-1] / DRAWS).abs() < FAR).all()
    assert ((draws.T @ other / DRAWS).abs() < FAR).all()
    assert draws[7].tolist() == draw_signs(0, 7, LAYERS)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_terms_between_layers_cancel_over_measurements(kind, groups):
    """Whichever groups the layers are in; as many draws as it takes to see it."""
    one, two = (nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)) for _ in range(2))
    layers = [("one.w", one), ("two.w", two)]
    params = [{"params": [layer]} for layer in layers] if groups == 2 else layers
    opt = OPTIMIZERS[kind](params, lr=0.0, update_every=1, **({"eps": 1e-30} if kind == "adamw" else {}))
    found, count = torch.zeros(2, dtype=torch.float64), 150
    for _ in range(count):
        take_step(opt, lambda: (one @ one + two @ two + one @ two) / 2, "backward")
        found += torch.tensor([row["curvature"] for row in opt.diagnostics().values()]) / count
    # Both have the same gradient: the term between them, which carries both signs, is half of their own.
    direction = one.grad if kind == "sgd" else torch.ones(2)
    own = (direction @ direction).item()
    assert ((found / own - 1).abs() < 5 * 0.5 / count**0.5).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_decay_that_does_not_act_changes_no_rate(kind):
    found = []
    for decay in (0.0, 10.0):
        vector = nn.Parameter(torch.linspace(0.5, 2, 5, dtype=torch.float64))
        opt = OPTIMIZERS[kind]([("layer.w", vector)], weight_decay=decay, weight_decay_on="matrices", lr=0.0)
        take_step(opt, lambda w=vector: (w**4).sum(), "backward")
        found.append(opt.rates())
    assert found[0] == found[1]
