"""Which weights a followed model holds: evaluation and files have the average.

Catches: evaluation, a state dict or a checkpoint with the wrong set of weights; a resumed run that differs in a bit;
an evaluation or a saved file that changes the training.
"""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net
from follow_cases import EACH, STEPS, explicit, followed, same, steps, weights
from torch import nn


@EACH
def test_a_model_may_be_moved_after_it_was_evaluated(kind):
    model, opt = followed(kind)
    model.eval()
    model.train()
    model.double()
    assert opt._layout.buckets[0].table.dtype == torch.float64


@EACH
def test_evaluation_sees_the_average_and_training_goes_on(kind):
    data = batches(2 * STEPS, torch.float32)
    model, opt = followed(kind)
    other = small_net(torch.float32)
    told = explicit(kind, other)
    for half in (data[:STEPS], data[STEPS:]):
        steps(opt, model, half)
        steps(told, other, half)
        model.eval()
        told.eval()
        with torch.no_grad():
            assert torch.equal(model(half[0][0]), other(half[0][0]))
            assert torch.equal(model(half[0][0]), other(half[0][0]))  # and again, for it is idempotent
        assert same(weights(model), weights(other))
        model.train()
        told.train()


@pytest.mark.parametrize("how", ["part", "nested part", "inference mode", "mode set by hand", "generate"])
def test_whatever_is_called_in_evaluation_mode_sees_the_average(how):
    model = nn.Sequential(small_net(torch.float32), nn.Sequential(nn.Linear(2, 2)))
    _, opt = followed("adamw", model)
    steps(opt, model, batches(STEPS, torch.float32))
    x = torch.ones(1, 3)
    with opt.averaged():
        expected = model[0](x).detach()
    trained = model[0](x).detach()
    assert not torch.equal(expected, trained)
    if how == "mode set by hand":
        for part in model.modules():
            part.training = False
    else:
        model.eval()
    with torch.inference_mode() if how == "inference mode" else torch.no_grad():
        if how == "generate":
            for _ in range(3):
                model(x)
        found = model[0][4](model[0][:4](x)) if how == "nested part" else model[0](x)
    if how == "nested part":  # the slice is a module of its own, unknown: what comes after it is not
        assert not opt._now.following.trained
    else:
        assert torch.equal(found, expected)
    model.train()
    assert torch.allclose(model[0](x), trained, atol=1e-6)


@EACH
def test_state_dict_has_the_average_in_either_mode(kind):
    model, opt = followed(kind)
    steps(opt, model, batches(STEPS, torch.float32))
    with opt.averaged():
        average = weights(model)
    trained = weights(model)
    assert same(model.state_dict().values(), average)
    assert same(model[0].state_dict().values(), average[:2])
    assert same(model.state_dict(keep_vars=True).values(), trained)
    assert same(weights(model), trained)
    model.eval()
    assert same(model.state_dict().values(), average)
    assert same(opt.averaged_state_dict(model).values(), average)


def test_tied_weights_stay_one_tensor_in_a_state_dict():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    opt = OPTIMIZERS["adamw"](model)
    steps(opt, model, [(torch.ones(4, 3), torch.tensor([0, 1, 2, 0]))] * 3)
    saved = model.state_dict()
    assert saved["0.weight"] is saved["2.weight"]
    steps(opt, model, [(torch.ones(4, 3), torch.tensor([0, 1, 2, 0]))])
    assert not torch.equal(model.state_dict()["0.weight"], saved["0.weight"])


ORDERS = list(itertools.permutations(["model", "optimizer"]))


@EACH
@pytest.mark.parametrize("saves", ORDERS, ids=lambda order: f"save {order[0]} first")
@pytest.mark.parametrize("loads", ORDERS, ids=lambda order: f"load {order[0]} first")
@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_for_bit_in_any_order(kind, saves, loads, mode, dtype):
    data = batches(2 * STEPS, dtype)
    model, opt = followed(kind, small_net(dtype))
    steps(opt, model, data[:STEPS])
    if mode == "evaluation":
        model.eval()
        model(data[0][0])
    files = {}
    for what in saves:
        files[what] = io.BytesIO()
        torch.save((model if what == "model" else opt).state_dict(), files[what])
    model.train()
    resumed, again = followed(kind, small_net(dtype, seed=1))
    for what in loads:
        files[what].seek(0)
        (resumed if what == "model" else again).load_state_dict(torch.load(files[what], weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(opt, model, data[STEPS:])
        steps(again, resumed, data[STEPS:])
    assert same(weights(model), weights(resumed))
    assert opt.diagnostics() == again.diagnostics()


@EACH
def test_a_state_goes_back_into_the_optimizer_it_is_of(kind):
    """As some trainers do in passing: nothing changes."""
    data = batches(2 * STEPS, torch.float32)
    found = []
    for reload in (True, False):
        model, opt = followed(kind)
        steps(opt, model, data[:STEPS])
        state = opt.state_dict()
        if reload:
            opt.load_state_dict(state)
        steps(opt, model, data[STEPS:])
        found.append(weights(model))
    assert same(*found)


@EACH
def test_states_of_different_checkpoints_are_noticed(kind):
    data = batches(STEPS, torch.float32)
    model, opt = followed(kind)
    steps(opt, model, data)
    early, state = copy.deepcopy(model.state_dict()), None
    steps(opt, model, data)
    state = opt.state_dict()
    resumed, again = followed(kind, small_net(torch.float32, seed=1))
    resumed.load_state_dict(early)
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="not those that the loaded state"):
        steps(again, resumed, data[:1])
    resumed.load_state_dict(early)
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="not those that the loaded state"):
        resumed.eval()(data[0][0])
    assert same(resumed.state_dict().values(), early.values())


@EACH
def test_a_model_saved_in_one_mode_and_an_optimizer_in_the_other_are_put_right(kind):
    """Without following: the model's file after eval(), the optimizer's after train()."""
    data = batches(STEPS, torch.float32)
    model = small_net(torch.float32)
    opt = explicit(kind, model)
    steps(opt, model, data)
    opt.eval()
    files = copy.deepcopy(model.state_dict())
    opt.train()
    trained, state = weights(model), opt.state_dict()
    resumed = small_net(torch.float32, seed=1)
    again = explicit(kind, resumed)
    resumed.load_state_dict(files)
    again.load_state_dict(state)
    torch.testing.assert_close(weights(resumed), trained, rtol=1e-6, atol=1e-8)


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_loaded_weights_are_an_average(kind, training):
    """The best checkpoint, loaded for a test in a model that has trained on, is what was saved."""
    data = batches(STEPS, torch.float32)
    model, opt = followed(kind)
    steps(opt, model, data)
    best = copy.deepcopy(model.state_dict())
    steps(opt, model, data)
    if not training:
        model.eval()(data[0][0])
    model.load_state_dict(best)
    model.eval()
    model(data[0][0])
    assert same(weights(model), best.values())
    model.train()
    steps(opt, model, data)


def test_training_in_evaluation_mode_says_what_to_do():
    model, opt = followed("adamw")
    data = batches(2, torch.float32)
    steps(opt, model, data)
    model.eval()
    loss_of(model, data[0]).backward()
    with pytest.raises(RuntimeError, match="opt.unfollow"):
        opt.step()
    opt.zero_grad()
    opt.unfollow()
    opt.train()
    steps(opt, model, data)


def test_the_average_with_batch_norm_is_warned_of_once():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    opt = OPTIMIZERS["adamw"](model)
    data = batches(3, torch.float32)
    steps(opt, model, data)
    with pytest.warns(UserWarning, match="refresh_norms"):
        model.eval()(data[0][0])
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(opt, model, data)
        model.eval()(data[0][0])


@EACH
@pytest.mark.parametrize("flatten", [True, False])
def test_resume_through_distributed_checkpoint(kind, flatten):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    data = batches(2 * STEPS, torch.float32)
    model, opt = followed(kind)
    steps(opt, model, data[:STEPS])
    of_model, of_optimizer = get_state_dict(model, opt, options=how)
    resumed, again = followed(kind, small_net(torch.float32, seed=1))
    set_state_dict(
        resumed,
        again,
        model_state_dict=copy.deepcopy(of_model),
        optim_state_dict=copy.deepcopy(of_optimizer),
        options=how,
    )
    steps(opt, model, data[STEPS:])
    steps(again, resumed, data[STEPS:])
    if flatten:  # torch takes back the entries alone that every state has, and so drops what rounding loses
        torch.testing.assert_close(weights(model), weights(resumed), rtol=1e-3, atol=1e-5)
    else:
        assert same(weights(model), weights(resumed))
        assert opt.diagnostics() == again.diagnostics()


@EACH
def test_the_mode_is_known_before_the_model_is_called(kind):
    model, opt = followed(kind)
    data = batches(STEPS, torch.float32)
    steps(opt, model, data)
    with opt.averaged():
        average = weights(model)
        expected = model(data[0][0]).detach()
    model.eval()
    assert same(weights(model), average)
    assert same(weights(copy.deepcopy(model)), average)
    torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(data[0][0])
    exported = torch.export.export(model, (data[0][0],)).module()
    torch.testing.assert_close(exported(data[0][0]), expected)
    model.train()
    assert opt._now.following.trained


@EACH
def test_parts_that_are_added_are_saved_with_their_average(kind):
    model, opt = followed(kind)
    data = batches(STEPS, torch.float32)
    steps(opt, model, data)
    model.append(nn.Linear(2, 2))
    opt.add_param_group({"params": [(f"5.{name}", p) for name, p in model[5].named_parameters()]})
    steps(opt, model, data)
    with opt.averaged():
        average = weights(model)
    assert same(model.state_dict().values(), average)


@EACH
def test_weights_loaded_in_evaluation_mode_are_trained_from(kind):
    model, opt = followed(kind)
    data = batches(STEPS, torch.float32)
    steps(opt, model, data)
    other = small_net(torch.float32, seed=5).state_dict()
    model.eval()(data[0][0])
    model.load_state_dict(other)
    model.train()(data[0][0])
    assert same(weights(model), other.values())


@EACH
def test_a_load_that_fails_loses_nothing(kind):
    model, opt = followed(kind)
    steps(opt, model, batches(STEPS, torch.float32))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"2.weight": torch.zeros(9, 9)}, strict=False)
    assert same(model.state_dict().values(), before.values())
    model.state_dict()["2.weight"].zero_()
    assert same(model.state_dict().values(), before.values())


@EACH
def test_evaluation_between_backward_and_step(kind):
    data = batches(STEPS, torch.float32)
    found = []
    for evaluates in (True, False):
        model, opt = followed(kind)
        for batch in data:
            loss_of(model, batch).backward()
            if evaluates:
                model.eval()
                with torch.no_grad():
                    model(batch[0])
                    model.train()
            opt.step()
            opt.zero_grad()
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluating_and_saving_change_nothing(kind, dtype):
    data, found = batches(2 * STEPS, dtype), []
    for disturbs in (True, False):
        model, opt = followed(kind, small_net(dtype))
        for batch in data:
            steps(opt, model, [batch])
            if disturbs:
                model.eval()(batch[0])
                with torch.inference_mode():
                    model.state_dict()
                    opt.state_dict()
                model.train()
                model.state_dict()
                opt.state_dict()
        found.append(weights(model))
    assert same(*found)
