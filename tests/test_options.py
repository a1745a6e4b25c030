"""Options: what is refused, and what is said of those that earlier versions had.

Catches: a removed option that is swallowed or called unknown; one in a parameter group that goes unnoticed; a number
given as a string, which fails somewhere later; an impossible value set in mid-training, which makes weights NaN or
fails half-way through a step; `weight_decay_on` without effect there.
"""

from __future__ import annotations

import pytest
import torch
from cases import MODES, OPTIMIZERS, batches, each_case, loss_of, small_net, usual

from lwas_fast.options import RANGES, REMOVED

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)


def parameter():
    return torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize("name", REMOVED)
@EACH
def test_a_removed_option_is_told_what_became_of_it(kind, name):
    assert name not in RANGES
    value, became = REMOVED[name]
    with pytest.raises(TypeError, match=f"no option '{name}' any more: {became}. Leave it out"):
        OPTIMIZERS[kind]([parameter()], **{name: value})
    with pytest.raises(TypeError, match=f"no option '{name}' any more"):
        OPTIMIZERS[kind]([{"params": [parameter()], name: value}])


@EACH
def test_the_joint_estimator_is_gone(kind):
    with pytest.raises(TypeError, match='curvature="joint" is gone.*"blocks"'):
        OPTIMIZERS[kind]([parameter()], curvature="joint")


@EACH
def test_groups_may_carry_keys_of_the_users_own(kind):
    opt = OPTIMIZERS[kind]([{"params": [parameter()], "tag": "head"}])
    assert opt.param_groups[0]["tag"] == "head"


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
@EACH
def test_an_lr_that_no_step_can_take_is_refused_in_mid_training(kind, value):
    model, (batch,) = small_net(torch.float32), batches(1, torch.float32)
    opt = OPTIMIZERS[kind](model.parameters())
    opt.step(usual(opt, model, batch))
    before = [p.clone() for p in model.parameters()]
    opt.param_groups[0]["lr"] = value
    with pytest.raises(ValueError, match="lr=.*is not valid"):
        opt.step(usual(opt, model, batch))
    assert all(map(torch.equal, before, model.parameters()))


def test_a_number_is_no_string():
    for name in ("lr", "eps", "weight_decay", "cap", "warmup_rate"):
        with pytest.raises(ValueError, match=f"{name}='1e-8' is not valid: it must be"):
            OPTIMIZERS["adamw"]([parameter()], **{name: "1e-8"})


IMPOSSIBLE = {"lr": float("nan"), "weight_decay": float("inf"), "cap": -1.0, "ramp_steps": "9", "update_every": "2"}
IMPOSSIBLE |= {"betas": (0.9, 1.0), "momentum": 1.0, "warmup_rate": "0.1", "maximize": None, "fused": 2}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("follows", [True, False])
@each_case(*MODES)
def test_what_is_impossible_in_mid_training_is_refused_and_mended(kind, options, follows, name):
    data, weights = batches(6, torch.float32), []
    for broken in (False, True):
        model = small_net(torch.float32)
        opt = OPTIMIZERS[kind](model if follows else model.named_parameters(), update_every=2, **options)
        group = opt.param_groups[0]
        if name not in group:
            return
        for k, batch in enumerate(data):
            opt.zero_grad()
            if broken and k == 4:
                kept, before = group[name], [p.clone() for p in model.parameters()]
                group[name] = IMPOSSIBLE[name]
                for call in (opt.step, lambda: opt.step(usual(opt, model, batch)), opt.rates, opt.log):  # noqa: B023
                    with pytest.raises(ValueError, match=f"{name}=.* in parameter group 0 is not valid: it must be"):
                        call()
                assert all(map(torch.equal, before, model.parameters()))
                assert group["steps"] == k
                group[name] = kept
                opt.zero_grad()
            loss = loss_of(model, batch)
            loss.backward() if follows else opt.backward(loss)
            opt.step()
        weights.append(list(model.parameters()))
    assert all(map(torch.equal, *weights))


@EACH
def test_a_tensor_and_a_list_may_be_written_to(kind):
    param = parameter()
    name, value = ("betas", [0.9, 0.99]) if kind == "adamw" else ("momentum", torch.tensor(0.9))
    opt = OPTIMIZERS[kind]([param], lr=torch.tensor(1.0), **{name: value})
    for broken in ("lr", name):
        param.grad = torch.ones(2)
        opt.step()
        kept, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], torch.tensor(1.0)
        opt.step()
        opt.param_groups[0]["lr"].fill_(-1) if broken == "lr" else value.__setitem__(0 if kind == "adamw" else ..., 1.5)
        with pytest.raises(ValueError, match=f"{broken}="):
            opt.step()
        opt.param_groups[0]["lr"] = kept


@EACH
def test_where_decay_acts_can_be_set_in_mid_training(kind):
    biases = []
    for decays_on in ("all", "matrices"):
        param = torch.ones(2, requires_grad=True)
        opt = OPTIMIZERS[kind]([param], weight_decay=0.3, weight_decay_on="matrices", warmup_rate=0.1)
        for k in range(3):
            if k == 1:
                opt.param_groups[0]["weight_decay_on"] = decays_on
            param.grad = torch.zeros(2)
            opt.step()
        biases.append(param.detach().clone())
        assert opt.param_groups[0]["steps"] == 3
    assert (biases[0] < 1).all()
    assert torch.equal(biases[1], torch.ones(2))


@pytest.mark.parametrize("foreach", [None, True])
@EACH
def test_numbers_may_be_tensors(kind, foreach):
    found = []
    for form in (float, torch.tensor):
        param = torch.ones(2, 2, requires_grad=True)
        opt = OPTIMIZERS[kind]([param], lr=form(0.5), weight_decay=form(0.25), cap=form(0.125), foreach=foreach)
        for _ in range(2):
            param.grad = torch.ones(2, 2)
            opt.step()
        found.append(param.detach().clone())
    assert torch.equal(*found)


@EACH
def test_a_step_that_a_scaler_could_not_take_leaves_no_scale_behind(kind):
    """With fused=True a GradScaler puts it on the optimizer, and takes it off after the step alone."""
    model = small_net(torch.float32)
    try:
        opt = OPTIMIZERS[kind](model, fused=True)
    except RuntimeError:
        pytest.skip("needs the compiled update")
    scaler, batch = torch.amp.GradScaler("cpu", init_scale=2.0**4), batches(1, torch.float32)[0]
    for lr in (-1.0, 1.0):
        opt.param_groups[0]["lr"] = lr
        opt.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        if lr < 0:
            with pytest.raises(ValueError, match="is not valid"):
                scaler.step(opt)
            assert not {"grad_scale", "found_inf"} & vars(opt).keys()
        else:
            scaler.step(opt)
        scaler.update()
    assert opt.param_groups[0]["steps"] == 1
