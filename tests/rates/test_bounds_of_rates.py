"""What one measurement may make of a rate, at most: against the reference, whose bounds are its own.

Catches: another limit of growth or fall, or of what Newton's step may promise; none of which an ordinary run meets.
"""

from __future__ import annotations

import pytest
import torch
from cases import ALL, REFERENCES
from torch import nn

# Curvature and value of the loss at each measurement: a flat stretch, a cliff, and values next to 0.
SEQUENCES = {
    "growth": [(1.0, 3.0), (1e-7, 3.0), (1e-7, 3.0), (1.0, 3.0)],
    "fall": [(1e-3, 30.0), (1e3, 30.0), (1e3, 30.0), (1.0, 30.0)],
    "promise": [(1.0, 1e-6), (1.0, 1e-6), (2.0, 1e-5)],
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("kind", ALL)
def test_rates_are_bounded_as_in_the_reference(kind, name):
    w = nn.Parameter(torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64))
    opt = ALL[kind]([("layer.w", w)], lr=0.0, update_every=1)
    ref = REFERENCES[kind]([w.detach()], lr=0.0, update_every=1)
    for sharp, value in SEQUENCES[name]:

        def loss(layers, sharp=sharp, value=value):
            (v,) = layers
            away = v - w.detach()  # where the weights stand the loss has this value and slope
            return value + away.sum() + sharp * away @ away / 2

        opt.zero_grad()
        opt.backward(loss([w]))
        opt.step()
        ref.step(loss, z=[1.0])
        assert opt.rates()["layer"] == pytest.approx(ref.rate[0], rel=1e-9)
