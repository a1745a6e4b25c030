"""A third optimizer is a rule and a class: everything else is shared.

Catches: a room that knows the two optimizers by name, or needs compiled code that a new one does not have.
"""

from __future__ import annotations

import pytest
import torch
from cases import batches, loss_of, small_net, train

from lwas_fast.optimizer import LayerwiseOptimizer
from lwas_fast.rule import Rule


class SignRule(Rule):
    """The sign of the gradient; with momentum, of its average."""

    name = "SignLW"
    buffers_with_momentum = ("momentum_buffer",)
    buffers_schedule_free = ("offset",)
    cap_schedule_free, cap_with_momentum = 0.1, 0.05
    decoupled = True

    def share(self, group):
        return group["momentum"]

    def directions(self, group, here):
        signs = [g.sign() * factor for g, factor in zip(here.gradients, here.factors, strict=True)]
        return here.gradients, signs

    def advance(self, group, states, moving):
        if group["schedule_free"]:
            return [-g.sign() for g in moving.gradients]
        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, moving.taking_part(moving.gradients, momenta), 1 - group["momentum"])
        return [-m.sign() for m in momenta]


class SignLW(LayerwiseOptimizer):
    """SGD by signs, at measured rates."""

    rule = SignRule()

    def __init__(self, params, schedule_free=True, layers=None, **common):
        own = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "ramp_steps": 0, "cap": None, "warmup_rate": 1e-3}
        super().__init__(params, {**own, "schedule_free": schedule_free}, layers, common)


@pytest.mark.parametrize("how", ["autograd", "closure"])
@pytest.mark.parametrize("schedule_free", [True, False])
def test_a_third_optimizer(schedule_free, how):
    model, data = small_net(torch.float32), batches(1, torch.float32) * 60
    opt = SignLW(model.named_parameters(), schedule_free=schedule_free, update_every=5)
    before = loss_of(model, data[0]).item()
    train(opt, model, data, how)
    opt.eval()
    assert loss_of(model, data[0]).item() < 0.8 * before
    assert all(row["refreshes"] == 12 for row in opt.diagnostics().values())
    new = SignLW(model.named_parameters())
    new.load_state_dict(opt.state_dict())
    assert new.diagnostics() == opt.diagnostics()
    opt.train()
    opt.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match="none for SignLW"):
        train(opt, model, data[:1], how)
