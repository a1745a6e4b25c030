"""Checkpoints loaded into the live model and optimizer that they were saved from.

Catches: an iterate that is dropped because the model holds the weights it was saved with already; groups that disagree
on what the model holds.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net
from follow_cases import EACH, followed, same, steps, weights


@pytest.mark.parametrize("optimizer_first", [True, False])
@EACH
def test_a_checkpoint_may_be_loaded_where_it_was_just_saved(kind, optimizer_first):
    """In any order: the model holds the weights to train on that the state was saved with, and gets their average."""
    data = batches(8, torch.float32)
    found = []
    for loads in (False, True):
        model, opt = followed(kind)
        steps(opt, model, data[:4])
        if loads:
            saved = copy.deepcopy((opt.state_dict(), model.state_dict()))
            calls = [lambda: opt.load_state_dict(saved[0]), lambda: model.load_state_dict(saved[1])]  # noqa: B023
            for call in calls if optimizer_first else calls[::-1]:
                call()
        steps(opt, model, data[4:])
        found.append(weights(model))
    assert same(*found)


@EACH
def test_other_weights_that_are_loaded_there_start_anew(kind):
    data = batches(8, torch.float32)
    model, opt = followed(kind)
    steps(opt, model, data[:4])
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    assert all(not state["offset"].any() for state in opt.state.values())


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("which", [0, 1])
@EACH
def test_going_back_to_a_checkpoint_that_some_groups_have_not_left(kind, which, optimizer_first):
    """One group holds the weights that it was saved with, the other does not."""
    data, found = batches(8, torch.float32), []
    for goes_back in (False, True):
        model = small_net(torch.float32)
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
        opt = OPTIMIZERS[kind]([*groups, {"params": list(model[4].parameters())}])
        opt.follow(model)
        steps(opt, model, data[:4])
        if goes_back:
            saved = copy.deepcopy((opt.state_dict(), model.state_dict()))
            for batch in data[:2]:
                loss_of(model, batch).backward()
                for param in model[2 * which].parameters():
                    param.grad = None
                opt.step()
                opt.zero_grad()
            calls = [lambda: opt.load_state_dict(saved[0]), lambda: model.load_state_dict(saved[1])]  # noqa: B023
            for call in calls if optimizer_first else calls[::-1]:
                call()
            assert len({group["train_mode"] for group in opt.param_groups}) == 1
        steps(opt, model, data[4:])
        found.append(weights(model))
    assert same(*found)
