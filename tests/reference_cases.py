"""What the tests of the reference share: plain settings, vectors, and a tiny net whose Hessian is at hand."""

from __future__ import annotations

import itertools
import math

import torch
from reference import ReferenceAdamWLW, ReferenceMuonLW, ReferenceSGDLW
from torch.nn.functional import softplus

METHODS = [ReferenceSGDLW, ReferenceAdamWLW, ReferenceMuonLW]
# Nothing but the closed form, at M = 2: the rate is t, nothing bounds it, and it is what is applied.
PLAIN = {
    "rate_horizon": 0.0,
    "self_concordance": 2.0,
    "cap": math.inf,
    "max_growth": math.inf,
    "ramp_steps": 0,
    "update_every": 1,
    "curvature": "blocks",
    "weight_decay": 0.0,
    "schedule_free": False,
}
NETS = [(3, 4, 2), (2, 3, 2, 3, 1)]


def vec(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual, expected, tolerance=1e-14):
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def tiny_net(widths, seed):
    """A tanh net with softplus loss: loss(W), the layers (weight and bias in one vector), where they lie."""
    gen = torch.Generator().manual_seed(seed)
    X, y = (torch.randn(7, n, generator=gen, dtype=torch.float64) for n in (widths[0], widths[-1]))
    shapes = list(itertools.pairwise(widths))
    W = [torch.randn((i + 1) * o, generator=gen, dtype=torch.float64) for i, o in shapes]

    def loss(W):
        h = X
        for (i, o), w in zip(shapes, W, strict=True):
            h = torch.tanh(h @ w[: i * o].view(i, o) + w[i * o :])
        return softplus(h - y).square().mean()

    ends = list(itertools.accumulate(w.numel() for w in W))
    return loss, W, [slice(end - w.numel(), end) for end, w in zip(ends, W, strict=True)]
