"""Hooks on a model: whose they are, how they go, what they leave.

Catches: a marked tensor, a hook or a context of torch's that outlives its step or optimizer; optimizers of one model
that get in each other's way; a copy that is followed.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, small_net
from follow_cases import EACH, STEPS, followed, same, steps, weights
from torch import Tensor, nn
from torch.nn import functional as F

from lwas_fast.measure.watch import Watched


@EACH
def test_names_and_groups(kind):
    model = small_net(torch.float32)
    for wrapped in (model, torch.compile(model, backend="eager"), nn.DataParallel(model)):
        _, opt = followed(kind, wrapped)
        (group,) = opt.param_groups
        assert list(opt.rates()) == ["0", "2", "4"]
        assert group["param_names"] == [name for name, _ in model.named_parameters()]
        assert group["weight_decay_on"] == "matrices"
        assert opt._layout.buckets[0].decays == [True, False] * 3
    assert followed(kind, weight_decay_on="all")[1].param_groups[0]["weight_decay_on"] == "all"
    with pytest.raises(ValueError, match="none of the module's parameters"):
        opt.follow(small_net())


@EACH
def test_copies_and_pickles_are_followed_by_nobody(kind):
    model, opt = followed(kind)
    steps(opt, model, batches(3, torch.float32))
    before = weights(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.train(False) is other
        assert model.training
        other.eval()(torch.ones(1, 3))
        other.load_state_dict(other.state_dict())
    assert same(weights(model), before)
    assert opt._now.following.trained
    copied = copy.deepcopy(opt)
    copied.eval()
    assert copied._now.following is None


@EACH
def test_hooks_go_with_the_optimizer(kind):
    model, opt = followed(kind)
    assert model._forward_pre_hooks
    opt.unfollow()
    assert not model._forward_pre_hooks
    opt.follow(model)
    del opt
    gc.collect()
    for part in model.modules():
        assert not part._forward_pre_hooks
        assert not part._state_dict_hooks
        assert not part._load_state_dict_pre_hooks


@EACH
def test_nothing_stays_marked(kind):
    model, opt = followed(kind)
    x, y = batches(1, torch.float32)[0]
    out = model(x)
    loss = F.cross_entropy(out, y)
    assert type(loss) is Watched
    assert type(loss.detach()) is Tensor
    loss.backward()
    assert type(loss) is Tensor
    assert type(out) is Watched
    opt.step()
    assert type(out) is Tensor
    loss = F.cross_entropy(model(x), y)  # an ordinary step
    assert type(loss) is Tensor
    with torch.no_grad():
        assert type(model(x)) is Tensor


@EACH
def test_the_next_optimizer_of_a_model_takes_over(kind):
    model, first = followed(kind)
    data = batches(2 * STEPS, torch.float32)
    steps(first, model, data[:STEPS])
    second = OPTIMIZERS[kind](model)
    for batch in data[STEPS:]:
        loss_of(model, batch).backward()
        second.step()
        second.zero_grad()
    with second.averaged():
        average = weights(model)
    assert same(model.state_dict().values(), average)
    del first
    gc.collect()
    model.eval()
    with torch.no_grad():
        model(data[0][0])
    assert same(weights(model), average)
    assert "train" in model.__dict__


@EACH
def test_an_optimizer_that_made_way_takes_the_weights_for_their_average(kind):
    """What it had averaged is of weights that the model no longer has once the other has moved them."""
    model, first = followed(kind)
    data = batches(2 * STEPS, torch.float32)
    steps(first, model, data[:STEPS])
    second = OPTIMIZERS[kind](model)
    steps(second, model, data[STEPS:])
    before = weights(model)
    first.eval()
    assert same(weights(model), before)


@EACH
def test_an_interrupt_in_the_model_leaves_nothing_behind(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.stops = small_net(torch.float32), True

        def forward(self, x):
            if self.stops:
                raise KeyboardInterrupt
            return self.net(x)

    model, flash = Model(), torch.backends.cuda.flash_sdp_enabled()
    opt = OPTIMIZERS[kind](model)
    data = batches(3, torch.float32)
    with pytest.raises(KeyboardInterrupt):
        model(data[0][0])
    model.stops = False
    steps(opt, model, data)
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())


@EACH
def test_a_watched_loss_shows_and_stores_as_any_other(kind):
    model, opt = followed(kind)
    x, y = batches(1, torch.float32)[0]
    loss = F.cross_entropy(model(x), y)
    value = loss.item()
    assert f"{loss:.4f}" == f"{value:.4f}"
    assert "Watched" not in f"{loss} {loss!r}"
    file = io.BytesIO()
    torch.save({"loss": loss}, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)["loss"]) is Tensor
    assert type(loss) is Watched
    out = model(x)
    opt.unfollow()
    assert type(out) is type(loss) is Tensor


@EACH
def test_train_keeps_its_arguments(kind):
    class Model(nn.Sequential):
        def train(self, mode=True, freeze=False):
            super().train(mode)
            self.frozen = freeze
            return self

    model = Model(nn.Linear(3, 2))
    opt = OPTIMIZERS[kind](model)
    assert model.train(True, freeze=True) is model
    assert model.frozen
    del opt


@EACH
def test_two_optimizers_for_two_halves_of_a_model(kind):
    model = small_net(torch.float32)
    halves = [[(n, p) for n, p in model.named_parameters() if (p.ndim > 1) is matrices] for matrices in (True, False)]
    opts = [OPTIMIZERS[kind](half) for half in halves]
    for opt in opts:
        opt.follow(model)
    for batch in batches(12, torch.float32):
        loss_of(model, batch).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    assert all(row["refreshes"] == 2 for opt in opts for row in opt.diagnostics().values())
    assert torch.backends.cuda.flash_sdp_enabled()
    model.eval()
    assert not any(opt._now.following.trained for opt in opts)
    opts[0].unfollow()
    assert "train" in model.__dict__
    opts[1].unfollow()
    assert "train" not in model.__dict__


def test_frozen_quantised_weights_are_left_out():
    model = small_net(torch.float32)
    model.register_parameter("codes", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    assert list(OPTIMIZERS["adamw"](model).rates()) == ["0", "2", "4"]
