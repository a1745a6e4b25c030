"""Schedule-free training: the average, what `train` and `eval` put into the parameters, and what goes with neither.

Catches: another formula than Schedule-Free's own (its authors' package, where it is installed, at a fixed rate); an
average that is not the iterates' mean; training on with the average in the parameters; a mode lost in saving; an option
that needs momentum and is silently without effect.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net, train

from lwas_fast import SGDLW, AdamWLW

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)
FIXED = {"warmup_steps": 10**9, "warmup_rate": 0.05, "ramp_steps": 0, "cap": math.inf}


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_close(one, two, tolerance):
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@EACH
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_at_a_fixed_rate_it_is_schedule_free_as_its_authors_have_it(kind, decay):
    theirs = pytest.importorskip("schedulefree")
    mine, other = small_net(), small_net()
    opt = OPTIMIZERS[kind](mine.named_parameters(), weight_decay=decay, **FIXED)
    if kind == "adamw":
        ref = theirs.AdamWScheduleFree(other.parameters(), lr=0.05, weight_decay=decay, foreach=False)
    else:
        ref = theirs.SGDScheduleFree(other.parameters(), lr=0.05, momentum=0.9, weight_decay=decay, foreach=False)
    ref.train()
    for batch in batches(30):
        train(opt, mine, [batch], how="plain")
        ref.zero_grad()
        loss_of(other, batch).backward()
        ref.step()
        assert_close(values(mine), values(other), 1e-10)
    opt.eval()
    ref.eval()
    assert_close(values(mine), values(other), 1e-10)


@EACH
def test_the_average_is_the_mean_of_the_iterates(kind):
    model = small_net()
    opt = OPTIMIZERS[kind](model.named_parameters(), update_every=3)
    beta = 0.9
    iterates = []
    for batch in batches(12):
        train(opt, model, [batch])
        weights = values(model)
        opt.eval()
        average = values(model)
        # weights = beta * average + (1 - beta) * iterate
        iterates.append([(w - beta * x) / (1 - beta) for w, x in zip(weights, average, strict=True)])
        mean = [torch.stack(list(z)).mean(0) for z in zip(*iterates, strict=True)]
        assert_close(average, mean, 1e-10)
        opt.train()
        assert_close(values(model), weights, 1e-14)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_are_taken_twice_without_effect_and_undone(kind, dtype):
    model = small_net(dtype)
    opt = OPTIMIZERS[kind](model.named_parameters())
    opt.eval()  # nothing trained: there is nothing to average
    opt.train()
    assert_close(values(model), values(small_net(dtype)), 0)
    train(opt, model, batches(15, dtype))
    before = values(model)
    opt.eval()
    average = values(model)
    opt.eval()
    assert_close(values(model), average, 0)
    assert any(not torch.equal(a, b) for a, b in zip(average, before, strict=True))
    opt.train()
    opt.train()
    assert_close(values(model), before, 1e-6 if dtype == torch.float32 else 2**-7)


@EACH
def test_training_on_with_the_average_is_refused_and_changes_nothing(kind):
    model, data = small_net(), batches(6)
    opt = OPTIMIZERS[kind](model.named_parameters())
    train(opt, model, data)
    opt.train(mode=False)
    before, state = values(model), copy.deepcopy(opt.state_dict())
    loss = loss_of(model, data[0])
    for call in (lambda: opt.backward(loss), opt.step, lambda: opt.step(lambda: loss)):
        with pytest.raises(RuntimeError, match=r"opt\.train\(\)"):
            call()
    assert_close(values(model), before, 0)
    for key, entry in opt.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][key][name]) for name, value in entry.items())
    opt.train()
    train(opt, model, data)


@EACH
def test_saved_with_the_average_it_goes_on_as_if_it_had_not_been(kind):
    model, data = small_net(), batches(12)
    opt = OPTIMIZERS[kind](model.named_parameters(), update_every=4)
    train(opt, model, data[:6])
    opt.eval()
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    opt.train()
    train(opt, model, data[6:])
    new_model = small_net(seed=5)
    new = OPTIMIZERS[kind](new_model.named_parameters(), update_every=4)
    new_model.load_state_dict(saved[0])
    new.load_state_dict(saved[1])
    with pytest.raises(RuntimeError, match=r"opt\.train\(\)"):
        new.step()
    new.train()
    train(new, new_model, data[6:])
    assert_close(values(model), values(new_model), 1e-12)


@EACH
def test_with_momentum_modes_change_nothing(kind):
    model = small_net()
    opt = OPTIMIZERS[kind](model.named_parameters(), schedule_free=False)
    train(opt, model, batches(5))
    before = values(model)
    opt.eval()
    assert_close(values(model), before, 0)
    opt.train()
    train(opt, model, batches(2))


def test_groups_may_differ_and_a_group_added_takes_the_mode():
    model = small_net()
    groups = [
        {"params": list(model[0].named_parameters(prefix="0"))},
        {"params": list(model[2].named_parameters(prefix="2")), "schedule_free": False},
    ]
    opt = AdamWLW(groups)
    train(opt, model, batches(5))
    assert ["offset" in opt.state[p] for p in model[:3].parameters()] == [True, True, False, False]
    first, second = model[0].weight.clone(), model[2].weight.clone()
    opt.eval()
    assert not torch.equal(model[0].weight, first)
    assert torch.equal(model[2].weight, second)
    opt.add_param_group({"params": list(model[4].named_parameters(prefix="4"))})
    with pytest.raises(RuntimeError, match=r"opt\.train\(\)"):
        opt.step()
    opt.train()
    train(opt, model, batches(5))


@pytest.mark.parametrize(("option", "value"), [("probe", "update"), ("noise_exponent", 0.25)])
def test_what_needs_momentum_is_refused_without(option, value):
    for cls in (SGDLW, AdamWLW):
        with pytest.raises(ValueError, match=rf"^{option}={value!r} needs momentum.*schedule_free=False"):
            cls(small_net().parameters(), **{option: value})
        cls(small_net().parameters(), schedule_free=False, **{option: value})


def test_a_state_with_momentum_is_refused_by_name():
    model = small_net()
    opt = AdamWLW(model.named_parameters(), schedule_free=False)
    train(opt, model, batches(2))
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["schedule_free"]  # of a version that did not have it
    with pytest.raises(ValueError, match="'offset'.*schedule_free=False"):
        AdamWLW(small_net().named_parameters()).load_state_dict(saved)
