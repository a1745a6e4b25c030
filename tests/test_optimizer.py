"""What users expect of any torch optimizer, over the table of options.

Catches: state that does not survive saving, another dtype or the checkpoint library; groups, closures, frozen
parameters and late groups misbehaving; measurements at other steps than documented; a NaN that spreads; errors that
come after something was changed.
"""

from __future__ import annotations

import copy
import math
import warnings

import cases
import pytest
import torch
from cases import ALL, FEW, batches, each_case, layer_vectors, loss_of, small_net, train
from reference import ReferenceAdamWLW
from torch import nn

from lwas_fast import SGDLW, AdamWLW
from lwas_fast.measure.probes import draw_signs

EACH = pytest.mark.parametrize("kind", ALL)


def assert_same(one: nn.Module, two: nn.Module) -> None:
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@each_case(*FEW, "warmup_and_ramp", kinds=ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit(kind, options, dtype, tmp_path):
    data = batches(14, dtype)
    unbroken = small_net(dtype)
    opt = ALL[kind](unbroken.named_parameters(), **options)
    train(opt, unbroken, data[:7])
    torch.save((unbroken.state_dict(), opt.state_dict()), tmp_path / "saved.pt")
    train(opt, unbroken, data[7:])
    resumed = small_net(dtype, seed=9)
    new = ALL[kind](resumed.named_parameters(), **options)
    weights, state = torch.load(tmp_path / "saved.pt")
    resumed.load_state_dict(weights)
    new.load_state_dict(state)
    train(new, resumed, data[7:])
    assert_same(unbroken, resumed)
    assert new.diagnostics() == opt.diagnostics()


@EACH
def test_float32_state_survives_a_bf16_model(kind):
    model = small_net(torch.float32)
    opt = ALL[kind](model.named_parameters())
    train(opt, model, batches(3, torch.float32))
    half = small_net(torch.bfloat16)
    new = ALL[kind](half.named_parameters())
    new.load_state_dict(opt.state_dict())
    for p, q in zip(model.parameters(), half.parameters(), strict=True):
        for name, value in opt.state[p].items():
            assert torch.equal(value, new.state[q][name])
    train(new, half, batches(2, torch.bfloat16))


@EACH
@pytest.mark.parametrize("flat", [False, True])
def test_state_goes_through_distributed_checkpoint(kind, tmp_path, flat):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    data = batches(10)
    model = small_net()
    opt = ALL[kind](model.named_parameters(), update_every=3)
    train(opt, model, data[:5])
    new_model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is one process only, and the library says so
        checkpoint.save(
            {"opt": get_optimizer_state_dict(model, opt, options=how)}, checkpoint_id=tmp_path, no_dist=True
        )
        new = ALL[kind](new_model.named_parameters(), update_every=3)
        state = {"opt": get_optimizer_state_dict(new_model, new, options=how)}
        checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(new_model, new, state["opt"], options=how)
    train(opt, model, data[5:])
    train(new, new_model, data[5:])
    assert_same(model, new_model)


@EACH
def test_frozen_parameters_and_late_groups(kind):
    model = small_net()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    opt = ALL[kind](list(model[2].named_parameters(prefix="2")) + list(model[0].named_parameters(prefix="0")))
    train(opt, model, batches(3))
    opt.add_param_group({"params": list(model[4].named_parameters(prefix="4")), "update_every": 2})
    assert opt.curvature_due
    train(opt, model, batches(3))
    assert torch.equal(frozen, model[0].weight)
    counts = {name: row["refreshes"] for name, row in opt.diagnostics().items()}
    assert counts == {"2": 1, "0": 0, "4": 2}


@EACH
def test_a_nan_batch_costs_only_that_refresh(kind):
    data = batches(6)
    found = []
    for poisoned in (False, True):
        model = small_net()
        opt = ALL[kind](model.named_parameters(), update_every=1, ramp_steps=0)
        train(opt, model, data[:3])
        if poisoned:
            before = layer_vectors(model)
            train(opt, model, [(data[0][0] * torch.nan, data[0][1])])
            assert all(torch.equal(a, b) for a, b in zip(before, layer_vectors(model), strict=True))
            assert all(row["nonfinite"] == row["skipped"] == 1 for row in opt.diagnostics().values())
            opt.param_groups[0]["steps"] -= 1  # the signs of the two runs are to agree again
            opt.param_groups[0]["next_refresh"] -= 1
            opt.param_groups[0]["last_refresh"] -= 1
        train(opt, model, data[3:])
        found.append(model)
    assert_same(*found)


@EACH
def test_plain_backward_of_a_model_not_followed_warns_again_at_ten_times_the_age(kind):
    model = small_net()
    opt = ALL[kind](model.named_parameters(), update_every=2)
    with pytest.warns(UserWarning, match=rf"{type(opt).__name__}\(model\)") as caught:
        losses = train(opt, model, batches(12) * 3, how="plain")
    assert [str(w.message).split(" steps")[0].split()[-1] for w in caught] == ["2", "20"]
    assert all(w.filename == cases.__file__ for w in caught)  # where opt.step() stands
    assert losses[-1] < losses[0]


@EACH
@pytest.mark.parametrize(
    ("option", "value"),
    [("update_every", 0), ("cap", 0), ("curvature", "exact"), ("warmup_rate", float("nan"))],
)
def test_bad_options_are_named(kind, option, value):
    with pytest.raises(ValueError, match=f"^{option}="):
        ALL[kind](small_net().named_parameters(), **{option: value})


@EACH
def test_errors_come_before_changes(kind):
    model = small_net()
    opt = ALL[kind](model.named_parameters())
    batch = batches(1)[0]
    before = layer_vectors(model)
    with pytest.raises(ValueError, match="scalar"):
        opt.backward(model(batch[0]))
    with pytest.raises(TypeError, match="must return the loss as a tensor"):
        opt.step(lambda: 3.0)
    with pytest.raises(ValueError, match="complex"):
        ALL[kind]([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    loss = loss_of(model, batch)
    loss.backward()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="in place of loss.backward"):
        opt.backward(loss)
    opt.backward(loss_of(model, batch))
    with pytest.raises(RuntimeError, match="last=False"):
        opt.backward(loss_of(model, batch))
    wrong = opt.state_dict()
    other = ALL[kind](small_net().parameters())
    with pytest.raises(ValueError, match="other layers"):
        other.load_state_dict(wrong)
    assert all(torch.equal(a, b) for a, b in zip(before, layer_vectors(model), strict=True))


@EACH
def test_accumulation_equals_the_joint_batch_when_micro_batches_are_alike(kind):
    batch = batches(1)[0]
    found = []
    for parts in (1, 3):
        model = small_net()
        opt = ALL[kind](model.named_parameters(), update_every=1)
        for _ in range(5):
            opt.zero_grad()
            for part in range(parts):
                opt.backward(loss_of(model, batch) / parts, last=part == parts - 1)
            opt.step()
        found.append(layer_vectors(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@EACH
def test_grad_scaler_changes_nothing(kind):
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = small_net()
        opt = ALL[kind](model.named_parameters(), update_every=2)
        for batch in batches(6):
            opt.zero_grad()
            opt.backward(loss_of(model, batch), scaler=scaler)
            if scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
        found.append(layer_vectors(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_measurements_come_often_at_first_and_rarely_later():
    """Every tenth step, then after a tenth of the steps so far, at last every hundredth; counted from warm-up on."""
    for warmup in (0, 7):
        weight = torch.ones(3, requires_grad=True)
        opt = SGDLW([weight], warmup_steps=warmup)
        due = []
        for step in range(2400):
            if opt.curvature_due:
                due.append(step - warmup)
            opt.zero_grad()
            opt.backward(weight.square().sum())
            opt.step()
        assert due[:12] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110]
        assert due[12:16] == [121, 133, 146, 160] and len([k for k in due if k < 500]) == 28
        assert set(map(int, torch.tensor(due).diff()[-10:])) == {100}


def test_the_default_schedule_follows_the_reference():
    """Over intervals that grow, and with them the averages' memory."""
    torch.manual_seed(0)
    start = torch.randn(4, dtype=torch.float64)
    weight = start.clone().requires_grad_()
    opt, ref = AdamWLW([weight]), ReferenceAdamWLW([start])
    for step in range(260):
        scale = 1 + 0.5 * math.sin(step)

        def loss(vectors, scale=scale):
            return scale * (vectors[0] ** 4).sum() + (vectors[0] - 1).square().sum()

        ref.step(loss, z=draw_signs(0, step, 1))
        opt.zero_grad()
        opt.backward(loss([weight]))
        opt.step()
    assert opt.diagnostics()["param0"]["refreshes"] == ref.events[0]["refreshes"] == 21
    torch.testing.assert_close(weight.detach(), ref.W[0], rtol=1e-9, atol=1e-11)
    assert opt.rates()["param0"] == pytest.approx(ref.rate[0], rel=1e-9)  # steps are at the cap, which hides it


def test_a_group_without_gradients_is_measured_as_soon_as_it_has_taken_a_step():
    body, head = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    opt = SGDLW([{"params": [body]}, {"params": [head]}])
    for step in range(4):
        opt.zero_grad()
        opt.backward(body.square().sum() if step < 2 else (body * head).square().sum())
        opt.step()
    refreshes = {name: row["refreshes"] for name, row in opt.diagnostics().items()}
    assert refreshes == {"param0": 1, "param1": 1}
    assert [group["steps"] for group in opt.param_groups] == [4, 2]


def test_a_state_from_before_last_refresh_was_kept():
    model, data = small_net(), batches(4)
    opt = AdamWLW(model.named_parameters(), update_every=2)
    train(opt, model, data)
    state = opt.state_dict()
    del state["param_groups"][0]["last_refresh"]
    fresh = AdamWLW(model.named_parameters(), update_every=2)
    fresh.load_state_dict(state)
    train(fresh, model, data)
    assert all(row["refreshes"] == 4 for row in fresh.diagnostics().values())
