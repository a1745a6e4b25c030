"""What trainers and users do around an optimizer, and what must come of it.

Catches: measurements that depend on how gradients were cleared, accumulated or clipped; wrappers that copy attributes;
parameters, states and gradients that somebody put in the place of others; a leftover learning rate.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, batches, closing, layer_vectors, loss_of, rates_of, small_net, train
from torch import nn

EACH = pytest.mark.parametrize("kind", OPTIMIZERS)


@EACH
@pytest.mark.parametrize("clearing", ["none", "optimizer", "model", "to zero"])
def test_a_closure_may_begin_with_gradients(kind, clearing):
    """Where it clears them it does not matter that they were there; where not, it is as if all were one window."""
    data = batches(4)

    def closure_of(opt, model, batch):
        def closure():
            if clearing == "optimizer":
                opt.zero_grad()
            elif clearing != "none":
                model.zero_grad(set_to_none=clearing == "model")
            loss = loss_of(model, batch) / 3
            loss.backward()
            return loss

        return closure

    found = []
    for accumulates in (True, False):
        model = small_net()
        opt = OPTIMIZERS[kind](model.named_parameters(), curvature="blocks")  # signs: differences weight the draw
        if accumulates:
            loss_of(model, data[0]).backward()
        if accumulates or clearing != "none":
            opt.step(closure_of(opt, model, data[1]))
        else:  # the same by hand
            (loss_of(model, data[0])).backward()
            opt.backward(loss_of(model, data[1]) / 3)
            opt.step()
        found.append(rates_of(opt))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


@EACH
def test_buffers_that_cannot_be_written_are_left_alone(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net(torch.float32)
            array = np.ones(3, np.float32)
            array.setflags(write=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, of the read-only array
                self.register_buffer("fixed", torch.from_numpy(array))
            self.register_buffer("wide", torch.ones(1).expand(3))

        def forward(self, x):
            return self.net(x * self.fixed * self.wide)

    model = Model()
    opt = OPTIMIZERS[kind](model.named_parameters(), update_every=1)
    train(opt, model, batches(3, torch.float32), how="closure")
    assert all(row["refreshes"] == 3 for row in opt.diagnostics().values())


@EACH
def test_a_layer_that_thaws_is_measured_with_its_second_step(kind):
    model = small_net(torch.float32)
    opt = OPTIMIZERS[kind](model.named_parameters(), update_every=50)
    model[0].requires_grad_(False)
    data = batches(30, torch.float32)
    train(opt, model, data[:25])
    model[0].requires_grad_(True)
    train(opt, model, data[25:])
    assert [row["refreshes"] for row in opt.diagnostics().values()] == [1, 2, 2]


@EACH
@pytest.mark.parametrize("follows", [True, False])
def test_a_wrapper_that_copies_attributes_shares_what_is_measured(kind, follows):
    """As Fabric and Lightning wrap an optimizer."""
    model = small_net(torch.float32)
    opt = OPTIMIZERS[kind](model) if follows else OPTIMIZERS[kind](model.named_parameters())

    class Wrapper(type(opt)):
        def __init__(self, inner):
            self.__dict__ = {name: value for name, value in inner.__dict__.items() if name != "step"}
            self.inner = inner

        def step(self):
            return self.inner.step()

    wrapper = Wrapper(opt)
    for batch in batches(12, torch.float32):
        wrapper.zero_grad()
        wrapper.backward(loss_of(model, batch))
        wrapper.step()
    assert all(row["refreshes"] == 2 for row in wrapper.diagnostics().values())
    assert wrapper.diagnostics() == opt.diagnostics()
    assert wrapper.log() == opt.log()
    wrapper.eval()
    assert not any(group["train_mode"] for group in opt.param_groups)


@EACH
def test_a_parameter_put_in_another_s_place_is_trained(kind):
    model = small_net(torch.float32)
    opt = OPTIMIZERS[kind](model.named_parameters())
    train(opt, model, batches(3, torch.float32))
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    opt.param_groups[0]["params"][0] = model[0].weight
    before = model[0].weight.detach().clone()
    train(opt, model, batches(3, torch.float32))
    assert not torch.equal(model[0].weight, before)


@EACH
def test_state_that_was_moved_by_hand_is_saved_as_it_is(kind):
    found = []
    for moves in (True, False):
        model = small_net(torch.float32)
        opt = OPTIMIZERS[kind](model.named_parameters(), update_every=2)
        data = batches(8, torch.float32)
        train(opt, model, data[:3])
        if moves:
            for entry in opt.state.values():
                for name, value in entry.items():
                    entry[name] = value.clone()
        train(opt, model, data[3:])
        found.append([entry["layer"] for entry in opt.state_dict()["state"].values()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@EACH
def test_a_model_may_move_after_a_state_was_taken(kind):
    """As some trainers do before training: layers are laid out where the model is at its first step."""
    model = small_net(torch.float32)
    opt = OPTIMIZERS[kind](model)
    opt.load_state_dict(opt.state_dict())
    opt.state_dict()
    model.double()
    train(opt, model, batches(2))
    assert opt._layout.buckets[0].table.dtype == torch.float64


@EACH
def test_gradients_are_added_in_place(kind):
    """They may be views of one buffer, as some trainers keep them."""
    model = small_net(torch.float32)
    opt = OPTIMIZERS[kind](model.named_parameters())
    flat = torch.zeros(sum(p.numel() for p in model.parameters()))
    for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = part.view_as(p)
    opt.backward(loss_of(model, batches(1, torch.float32)[0]))
    assert flat.count_nonzero() > 0
    assert all(
        torch.equal(p.grad.flatten(), q)
        for p, q in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True)
    )


def test_rates_fit_gradients_that_are_clipped_at_each_step():
    """AdamWLW trains alike with gradients clipped to a thousandth, for its directions have the same length."""
    data, found = batches(40), []
    for clip in (None, 1e-4):
        model = small_net()
        opt = OPTIMIZERS["adamw"](model, eps=1e-30, update_every=4)
        for batch in data:
            opt.zero_grad()
            loss_of(model, batch).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
        found.append(rates_of(opt))
    ratio = found[1] / found[0]
    assert ((ratio > 0.3) & (ratio < 3)).all()


@EACH
def test_a_scaler_may_step_with_a_closure(kind):
    model = small_net(torch.float32)
    opt = OPTIMIZERS[kind](model.named_parameters(), fused=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for batch in batches(3, torch.float32):
        opt.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(opt, closing(opt, lambda batch=batch: loss_of(model, batch)))
        scaler.update()
    assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())


@EACH
def test_a_leftover_learning_rate_is_warned_of(kind):
    model = small_net(torch.float32)
    with pytest.warns(UserWarning, match="lr=0.001: here lr multiplies"):
        OPTIMIZERS[kind](model.named_parameters(), lr=1e-3)
    opt = OPTIMIZERS[kind](model.named_parameters())
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-3, total_steps=10)
    with pytest.warns(UserWarning, match="lr=0.001: here lr multiplies") as caught:
        train(opt, model, batches(12, torch.float32) * 2)
    assert len(caught) == 1
    opt = OPTIMIZERS[kind](model.named_parameters())
    torch.optim.lr_scheduler.LinearLR(opt, 0.01, total_iters=30)  # a warm-up, which begins small
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(opt, model, batches(3, torch.float32))


@EACH
def test_the_effective_rate_is_in_the_groups(kind):
    model = small_net(torch.float32)
    opt = OPTIMIZERS[kind](model, lr=0.5)
    train(opt, model, batches(12, torch.float32))
    assert not opt.curvature_due  # which hears of the measurement
    median = sorted(opt.rates().values())[1]
    assert opt.param_groups[0]["effective_lr"] == pytest.approx(0.5 * median, rel=1e-6)
    shown = opt.log()
    assert shown["measurements"] == 2
    assert shown["applied/0"] == opt.diagnostics()["0"]["applied"]
    assert all(isinstance(value, (int, float)) for value in shown.values())


def test_norms_are_refreshed_with_the_average():
    import lwas_fast

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    opt = OPTIMIZERS["adamw"](model)
    data = batches(12, torch.float32)
    train(opt, model, data)
    trained = layer_vectors(model)
    lwas_fast.refresh_norms(model, [x for x, _ in data])
    torch.testing.assert_close(layer_vectors(model), trained, rtol=1e-6, atol=1e-7)
    with opt.averaged():
        hidden = model[0](torch.cat([x for x, _ in data])).mean(0)
    torch.testing.assert_close(model[1].running_mean, hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(data[0][0])


def test_rates_are_drawn():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    import lwas_fast

    axes = Figure().subplots()
    lwas_fast.plot_rates([(0, {"a": 1.0, "b": 2.0}), (10, {"a": 0.5, "b": 1.0, "c": 3.0})], axes)
    assert [line.get_label() for line in axes.get_lines()] == ["a", "b", "c"]
    assert axes.get_lines()[0].get_ydata().tolist() == [1.0, 0.5]
    assert axes.get_yscale() == "log"


@EACH
def test_a_tied_parameter_given_twice_moves_once(kind):
    """Under its first name, as `model.named_parameters(remove_duplicate=False)` has it."""
    found = []
    for twice in (False, True):
        model = small_net(torch.float32)
        named = list(model.named_parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt = OPTIMIZERS[kind](named + ([("tied.weight", named[0][1])] if twice else []))
        train(opt, model, batches(3, torch.float32))
        assert list(opt.rates()) == ["0", "2", "4"]
        found.append(layer_vectors(model))
    assert all(map(torch.equal, *found))
