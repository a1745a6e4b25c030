"""Closures that change what is to be measured, while they run.

Catches: a measurement of the groups or gradients that stood before the loss was evaluated; one that is lost and yet
counted as made.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net, usual
from torch import nn

BATCH = batches(1, torch.float32)[0]


def refreshes(opt):
    return [int(row["refreshes"]) for row in opt.diagnostics().values()]


def stepped(kind, **options):
    model = small_net(torch.float32)
    opt = OPTIMIZERS[kind](model.named_parameters(), update_every=1, **options)
    opt.step(usual(opt, model, BATCH))
    return model, opt


@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_window_that_the_closure_drops_does_not_count(kind, hvp):
    found = []
    for dropped in (False, True):
        model, opt = stepped(kind, hvp=hvp)

        def closure(opt=opt, model=model):
            opt.zero_grad()
            return loss_of(model, BATCH)

        if dropped:
            opt.backward(
                (lambda m=model: loss_of(m, BATCH)) if hvp != "autograd" else loss_of(model, BATCH), last=False
            )
        opt.backward(closure)
        opt.step()
        found.append([(row["descent"], row["curvature"]) for row in opt.diagnostics().values()])
    assert found[0] == found[1]


@pytest.mark.parametrize("way", ["backward", "step"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_group_that_the_closure_adds_is_measured(kind, way):
    model, opt = stepped(kind)
    head = nn.Linear(2, 2)

    def closure():
        if len(opt.param_groups) == 1:
            opt.add_param_group({"params": list(head.named_parameters(prefix="head"))})
        opt.zero_grad()
        loss = head(model(BATCH[0])).square().mean()
        if way == "step":
            loss.backward()
        return loss

    opt.step(closure) if way == "step" else (opt.backward(closure), opt.step())
    assert refreshes(opt) == [2, 2, 2, 1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_state_that_the_closure_loads_is_measured_on(kind):
    model, opt = stepped(kind)
    saved = copy.deepcopy(opt.state_dict())

    def closure():
        opt.load_state_dict(saved)
        return loss_of(model, BATCH)

    opt.backward(closure)
    opt.step()
    assert refreshes(opt) == [2, 2, 2]


@pytest.mark.parametrize("way", ["autograd", "finite_difference", "step"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_dtype_that_the_first_closure_changes_is_that_of_the_statistics(kind, way):
    model = small_net(torch.float32)
    opt = OPTIMIZERS[kind](model.named_parameters(), **({} if way == "step" else {"hvp": way}))

    def closure():
        opt.zero_grad()
        loss = loss_of(model.double(), (BATCH[0].double(), BATCH[1]))
        if way == "step":
            loss.backward()
        return loss

    opt.step(closure) if way == "step" else (opt.backward(closure), opt.step())
    assert all(state["layer"].dtype == torch.float64 for state in opt.state.values())
    assert refreshes(opt) == [1, 1, 1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_groups_put_in_place_of_others_are_those_that_move(kind):
    model, opt = stepped(kind)
    opt.param_groups = [{**group, "lr": 0.0} for group in opt.param_groups]
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(usual(opt, model, BATCH))
    pairs = zip(before, model.parameters(), strict=True)
    assert opt.param_groups[0]["steps"] == 2
    for old, new in pairs:
        # Schedule-free weights go on towards the iterate of the step before.
        torch.testing.assert_close(old, new, rtol=0, atol=0.1)
    assert all(row["applied"] == 0 for row in opt.diagnostics().values())


@pytest.mark.parametrize("schedule_free", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_element_without_a_finite_gradient_stays_in_plain_torch(kind, schedule_free):
    model, opt = stepped(kind, schedule_free=schedule_free, foreach=True)
    opt.zero_grad()
    opt.backward(loss_of(model, BATCH))
    weight = model[0].weight
    weight.grad[1, 1] = torch.nan
    state = {name: value.clone() for name, value in opt.state[weight].items()}
    before = weight.detach().clone()
    opt.step()
    assert torch.equal(weight[1, 1], before[1, 1]) and not torch.equal(weight[0, 0], before[0, 0])
    for name in opt.rule.buffers(opt.param_groups[0]):
        assert torch.equal(opt.state[weight][name][1, 1], state[name][1, 1]), name
        assert opt.state[weight][name].isfinite().all(), name
    assert opt.state[weight]["step"] == 2


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_layer_that_is_frozen_while_its_gradient_stands_is_not_measured(kind, follows, recwarn):
    """The step takes that gradient along, as torch's do; the other layers are measured as ever."""
    model, batch = small_net(), batches(1)[0]
    opt = OPTIMIZERS[kind](model if follows else model.named_parameters(), weight_decay=0.0)
    loss_of(model, batch).backward()
    opt.zero_grad(set_to_none=False)
    model[0].requires_grad_(False)
    loss = loss_of(model, batch)
    loss.backward() if follows else opt.backward(loss)
    opt.step()
    assert not recwarn.list
    assert [row["refreshes"] for row in opt.diagnostics().values()] == [0, 1, 1]
