"""The gradients that a measurement leaves, and the measurement that belongs to them.

Catches: gradients that share memory, so that clipping one changes another; a measurement of gradients that were
dropped, or of layers as they were before a group came, which is taken for one of this step.
"""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net
from torch import nn

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.ones(3)) for _ in range(2))

    def forward(self):
        return (self.one + self.two).square().sum()


@EACH
@pytest.mark.parametrize("way", ["backward", "loss.backward"])
def test_each_leaf_has_memory_of_its_own(kind, way):
    """Autograd hands both terms of a sum the same tensor."""
    model = Sum()
    opt = OPTIMIZERS[kind](model) if way == "loss.backward" else OPTIMIZERS[kind](model.named_parameters())
    loss = model()
    loss.backward() if way == "loss.backward" else opt.backward(loss)
    model.one.grad.mul_(0.5)  # as clipping does, each in place
    assert model.one.grad.tolist() == [2.0] * 3
    assert model.two.grad.tolist() == [4.0] * 3


@EACH
def test_zero_grad_drops_what_was_measured_on_the_gradients(kind):
    """The step is then of another loss."""
    model, (first, second) = small_net(), batches(2)
    opt = OPTIMIZERS[kind](model.named_parameters())
    opt.backward(loss_of(model, first))
    opt.zero_grad()
    before = opt.rates()
    loss_of(model, second).backward()
    opt.step()
    assert opt.rates() == before
    assert all(row["refreshes"] == 0 for row in opt.diagnostics().values())
    assert opt.curvature_due  # as before


@EACH
def test_gradients_that_somebody_dropped_are_no_part_of_a_window(kind):
    """As ``model.zero_grad()`` drops them, which the optimizer does not see: the loss after that is a window's only."""
    found = []
    for dropped in (True, False):
        model, data = small_net(), batches(2)
        opt = OPTIMIZERS[kind](model.named_parameters())
        if dropped:
            opt.backward(loss_of(model, data[0]))
            model.zero_grad()
        opt.backward(loss_of(model, data[1]))
        opt.step()
        found.append(opt.diagnostics())
    assert found[0] == found[1]


@EACH
def test_a_group_that_comes_between_backward_and_step_is_measured_with_the_others(kind):
    model, data = small_net(), batches(2)
    named = list(model.named_parameters())
    opt = OPTIMIZERS[kind](named[:4])
    opt.backward(loss_of(model, data[0]))
    opt.add_param_group({"params": named[4:]})
    opt.step()
    assert opt.curvature_due
    opt.zero_grad()
    opt.backward(loss_of(model, data[1]))
    opt.step()
    assert [row["refreshes"] for row in opt.diagnostics().values()] == [1, 1, 1]


def test_decay_is_part_of_the_loss_in_a_part_of_a_window_too():
    """Where gradients stood before: the direction is that of all, descent and curvature are the last part's."""
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    pull, sharp, decay = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64), 2.0, 0.7
    opt = OPTIMIZERS["sgd"]([("layer.w", w)], weight_decay=decay, lr=0.0)
    (pull @ w).backward()
    opt.backward(sharp * w @ w / 2)
    opt.step()
    (row,) = opt.diagnostics().values()
    at = w.detach()
    direction = -(pull + sharp * at + decay * at)
    assert row["descent"] == pytest.approx(-((sharp + decay) * at @ direction).item(), rel=1e-12)
    assert row["curvature"] == pytest.approx((sharp * direction @ direction).item(), rel=1e-12)
