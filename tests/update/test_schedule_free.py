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
from cases import (
    ALL,
    COMPILED,
    batches,
    layer_vectors,
    loss_of,
    loss_of_vectors,
    reference_of,
    small_net,
    train,
)

from lwas_fast import SGDLW, AdamWLW
from lwas_fast.measure.probes import draw_signs
from lwas_fast.update import extension

EACH = pytest.mark.parametrize("kind", ALL)
FIXED = {"warmup_steps": 10**9, "warmup_rate": 0.05, "ramp_steps": 0, "cap": math.inf}


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_close(one, two, tolerance):
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_at_a_fixed_rate_it_is_schedule_free_as_its_authors_have_it(kind, decay):
    theirs = pytest.importorskip("schedulefree")
    mine, other = small_net(), small_net()
    opt = ALL[kind](mine.named_parameters(), weight_decay=decay, **FIXED)
    if kind == "adamw":
        ref = theirs.AdamWScheduleFree(
            other.parameters(), lr=0.05, betas=(0.9, 0.99), weight_decay=decay, foreach=False
        )
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
    opt = ALL[kind](model.named_parameters(), update_every=3)
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
    opt = ALL[kind](model.named_parameters())
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
    opt = ALL[kind](model.named_parameters())
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
    opt = ALL[kind](model.named_parameters(), update_every=4)
    train(opt, model, data[:6])
    opt.eval()
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    opt.train()
    train(opt, model, data[6:])
    new_model = small_net(seed=5)
    new = ALL[kind](new_model.named_parameters(), update_every=4)
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
    opt = ALL[kind](model.named_parameters(), schedule_free=False)
    train(opt, model, batches(5))
    before = values(model)
    opt.eval()
    assert_close(values(model), before, 0)
    opt.train()
    train(opt, model, batches(2))


def test_groups_may_differ_and_have_the_defaults_of_their_own_mode():
    model = small_net()
    groups = [
        {"params": list(model[0].named_parameters(prefix="0"))},
        {"params": list(model[2].named_parameters(prefix="2")), "schedule_free": False},
    ]
    opt = SGDLW(groups)
    assert [opt.rule.cap(g) for g in opt.param_groups] == [0.15, 0.03]
    train(opt, model, batches(5))
    assert ["offset" in opt.state[p] for p in model[:3].parameters()] == [True, True, False, False]
    first, second = model[0].weight.clone(), model[2].weight.clone()
    opt.eval()
    assert not torch.equal(model[0].weight, first)
    assert torch.equal(model[2].weight, second)
    opt.train()
    free = {"params": list(model[4].named_parameters(prefix="4")), "schedule_free": True}
    late = SGDLW([free], schedule_free=False)
    assert late.rule.cap(late.param_groups[0]) == 0.15


def test_a_group_added_while_the_average_is_in_waits_for_train_too():
    model = small_net()
    opt = AdamWLW(model[0].named_parameters(prefix="0"))
    train(opt, model, batches(3))
    opt.eval()
    opt.add_param_group({"params": list(model[2].named_parameters(prefix="2"))})
    assert not opt.param_groups[1]["train_mode"]
    opt.train()
    train(opt, model, batches(3))


@EACH
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_average_goes_where_the_weights_go(kind, dtype, fused):
    """Moves below the type's spacing are lost to the weights: they must not pile up in the state."""
    if fused and (extension.EXTENSION is None or kind not in COMPILED):
        pytest.skip("no compiled update")
    found = []
    for one in (dtype, torch.float64):
        p = torch.ones(64, dtype=one).requires_grad_()
        options = {**FIXED, "warmup_rate": 1e-3, "weight_decay": 0.0}
        opt = ALL[kind]([p], **options, **({"fused": True} if fused and one == dtype else {"foreach": True}))
        for _ in range(500):
            p.grad = torch.ones_like(p) * (p - 0.25).sign().detach()
            opt.step()
        opt.eval()
        found.append(p.detach().double())
    assert (found[1] - 0.75).abs().max() < 0.05
    there, stuck = (found[0] - found[1]).abs() < 0.05, (found[0] - 1).abs() < 0.01
    assert there.all() or stuck.all(), found[0]


@pytest.mark.parametrize("fused", [True, False])
def test_in_half_precision_the_iterate_makes_the_move_that_is_left(fused):
    """By hand: the weights make all of a move but a share of the average, and so much of their rounding is its."""
    if fused and extension.EXTENSION is None:
        pytest.skip("no compiled update")
    w = torch.randn(200).to(torch.bfloat16).requires_grad_()
    opt = SGDLW(
        [w], momentum=0.9, **{**FIXED, "warmup_rate": 0.01}, **({"fused": True} if fused else {"foreach": True})
    )
    iterate = average = w.detach().double()
    for n in range(1, 7):
        w.grad = torch.randn(200).to(torch.bfloat16)
        opt.step()
        iterate = iterate - 0.01 * w.grad.double()
        average = average + (iterate - average) / n
        exact = 0.9 * average + 0.1 * iterate
        torch.testing.assert_close(w.detach().double(), exact, rtol=2**-8, atol=0)  # half a unit in the last place
        left = (w.detach().double() - exact) / (1 - 0.9 * (1 - 1 / n))
        iterate, average = iterate + left, average + left / n
        torch.testing.assert_close(opt.state[w]["offset"].double(), iterate - average, rtol=1e-4, atol=1e-6)


@EACH
def test_a_share_that_schedulers_cycle_mixes_anew(kind):
    model, data = small_net(), batches(15)
    opt = ALL[kind](model.named_parameters(), update_every=3)
    ref = reference_of(kind, model, update_every=3)
    for k, batch in enumerate(data):
        share = 0.9 - 0.05 * (k % 4)
        if "betas" in opt.defaults:
            opt.param_groups[0]["betas"] = ref.hyper.betas = (share, 0.5 if kind == "muon" else 0.999)
        else:
            opt.param_groups[0]["momentum"] = ref.hyper.momentum = share
        ref.step(loss_of_vectors(model, batch), z=draw_signs(0, k, len(ref.W)))
        train(opt, model, [batch])
        assert_close(layer_vectors(model), ref.W, 1e-9)
    opt.param_groups[0].update({"betas": (0.1, 0.9)} if "betas" in opt.defaults else {"momentum": 0.1})
    opt.eval()
    assert_close(layer_vectors(model), ref.X, 1e-9)


@EACH
def test_what_happens_within_a_closure_is_seen(kind):
    model, data = small_net(), batches(3)
    opt = ALL[kind](model.named_parameters())
    train(opt, model, data)

    def closure():
        opt.zero_grad()
        loss = loss_of(model, data[0])
        loss.backward()
        opt.eval()
        return loss

    with pytest.raises(RuntimeError, match=r"opt\.train\(\)"):
        opt.step(closure)


def test_another_mode_in_mid_training_is_refused_by_name():
    model = small_net()
    opt = AdamWLW(model.named_parameters())
    train(opt, model, batches(2))
    opt.param_groups[0]["schedule_free"] = False
    before = values(model)
    with pytest.raises(RuntimeError, match="schedule_free=False.*mid-training.*'exp_avg'"):
        opt.step()
    opt.eval()
    opt.train()
    assert_close(values(model), before, 1e-14)


@EACH
def test_a_state_from_before_there_was_a_choice_goes_on_with_momentum(kind):
    model, data = small_net(), batches(6)
    opt = ALL[kind](model.named_parameters(), schedule_free=False)
    train(opt, model, data[:3])
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        for name in ("schedule_free", "train_mode", "share"):
            del group[name]
    new_model = copy.deepcopy(model)
    new = ALL[kind](new_model.named_parameters())
    new.load_state_dict(saved)
    train(opt, model, data[3:])
    train(new, new_model, data[3:])
    assert_close(values(model), values(new_model), 1e-14)
