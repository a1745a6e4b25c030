"""A model's second call is made as the first was.

Catches: another autocast, other random numbers or another mode in it, which make the difference of gradients one of two
functions: curvature that is wrong by orders, and no error.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from cases import OPTIMIZERS
from torch import nn


class Recorded(nn.Module):
    """Notes what it is called in."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 2), []

    def forward(self, x):
        out = self.linear(x)
        self.calls.append((torch.is_autocast_enabled("cpu"), out.dtype, self.training, torch.rand(3).tolist()))
        return out.float()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_a_model_is_called_again_as_it_was(kind, half):
    model = Recorded()
    opt = OPTIMIZERS[kind](model)
    opt._now.following.replays = True
    with nullcontext() if half is None else torch.autocast("cpu", half):
        out = model(torch.randn(8, 4))
    out.square().mean().backward()  # outside, as is usual
    opt.step()
    first, *others = model.calls
    assert others == [first, first]  # whether it repeats, and at displaced weights
    assert first[:2] == (half is not None, half or torch.float32)
    assert opt.measured_by == "replay"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_second_call_leaves_the_random_stream_where_it_was(kind):
    """Also where something was drawn since the first: the second begins further back."""
    found = []
    for measured in (False, True):
        torch.manual_seed(0)
        model = Recorded()
        opt = OPTIMIZERS[kind](model)
        opt._now.following.replays = True
        opt._now.following.due = measured
        out = model(torch.randn(8, 4))
        (out + torch.randn(8, 2)).square().mean().backward()
        found.append(torch.rand(4).tolist())
        assert len(model.calls) == (3 if measured else 1)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_displacement_is_seen_through_autocast(kind, half):
    """Weights from a checkpoint of half precision: less than half a unit of theirs, and nothing would have moved."""
    found = []
    for amp in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(16, 4, bias=False).to(half).float()
        opt = OPTIMIZERS[kind](model)
        opt._now.following.replays = amp
        with torch.autocast("cpu", half, enabled=amp):
            out = model(torch.randn(32, 16).to(half).float())
        out.float().square().mean().backward()
        opt.step()
        (row,) = opt.diagnostics().values()
        found.append(row["curvature"])
    assert found[1] == pytest.approx(found[0], rel=0.2)
