"""A plain ``loss.backward()`` of a followed model measures.

Catches: a due step that is not measured, or measured twice or otherwise than by `opt.backward`; gradients, hooks or a
loop of the user's that come out otherwise than with torch's optimizers.
"""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from cases import OPTIMIZERS, batches, loss_of, rates_of, small_net
from follow_cases import EACH, STEPS, explicit, followed, same, steps, weights
from torch import nn
from torch.nn import functional as F

from lwas_fast import measure


@EACH
@pytest.mark.parametrize("options", [{}, {"schedule_free": False}, {"curvature": "blocks"}, {"weight_decay": 0.1}])
def test_plain_backward_is_opt_backward(kind, options):
    data = batches(STEPS, torch.float32)
    model, opt = followed(kind, **options)
    other = small_net(torch.float32)
    told = explicit(kind, other, **options)
    steps(opt, model, data)
    steps(told, other, data)
    assert same(weights(model), weights(other))
    assert opt.diagnostics() == told.diagnostics()
    assert (opt.measured_by, told.measured_by) == ("loss.backward", "opt.backward")
    assert all(row["refreshes"] == 3 for row in opt.diagnostics().values())


@EACH
def test_accumulation_needs_no_last(kind, monkeypatch):
    """The first window measures each micro-batch, for its length is not known; later ones the last."""
    data = batches(STEPS, torch.float32)
    model, opt = followed(kind, update_every=4)
    other = small_net(torch.float32)
    told = explicit(kind, other, update_every=4)
    seen = []
    original = measure.in_passing

    def in_passing(*args):
        seen.append(sum(p.grad is not None for p in model.parameters()))
        return original(*args)

    monkeypatch.setattr(measure, "in_passing", in_passing)
    steps(opt, model, data, parts=2)
    steps(told, other, data, parts=2)
    assert same(weights(model), weights(other))
    assert seen == [0] + 7 * [
        6
    ]  # gradients that stood before: the first micro-batch of the first window alone has none


@EACH
@pytest.mark.parametrize("divided", [True, False])
def test_earlier_gradients_and_their_share_do_not_matter(kind, divided):
    """Equal micro-batches, divided or not, accumulated in any way: the rates of the joint batch."""
    batch = batches(1, torch.float64)[0]
    found = []
    for parts in (1, 3):
        for way in ("followed", "told", "told late") if parts > 1 else ("told",):
            model = small_net()
            eps = {"eps": 1e-30} if kind == "adamw" else {}  # of the gradients' scale
            opt = OPTIMIZERS[kind](model, **eps) if way == "followed" else explicit(kind, model, **eps)
            for part in range(parts):
                loss = loss_of(model, batch) / (parts if divided else 1)
                if way == "followed" or (way == "told late" and part < parts - 1):
                    loss.backward()
                else:
                    opt.backward(loss, last=part == parts - 1)
            opt.step()
            rates = rates_of(opt)
            # What plain SGD's step is long by, its rate is short by.
            found.append(rates * (1 if divided or kind == "adamw" else parts))
    for rates in found[1:]:
        torch.testing.assert_close(rates, found[0], rtol=1e-9, atol=0)


@EACH
def test_the_order_of_a_loop_does_not_matter(kind):
    """zero_grad before the forward pass, between it and backward, or after the step; of the model or the optimizer."""
    data, found = batches(STEPS, torch.float32), []
    for order in ("first", "between", "last", "model"):
        model, opt = followed(kind)
        for batch in data:
            if order == "first":
                opt.zero_grad()
            loss = loss_of(model, batch)
            if order == "between":
                opt.zero_grad()
            loss.backward()
            opt.step()
            if order == "last":
                opt.zero_grad()
            if order == "model":
                model.zero_grad()
        found.append(weights(model))
    assert all(same(found[0], other) for other in found[1:])


class Attention(nn.Module):
    """A block with fused attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class Checkpointed(Attention):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Dictionary(Attention):
    def forward(self, x):
        return {"logits": [super().forward(x)], "hidden": None}


@pytest.mark.parametrize("make", [Attention, Recurrent, Checkpointed, Dictionary])
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@EACH
def test_what_has_no_second_derivative_is_measured(kind, make, amp, device):
    if make is Recurrent and amp is torch.float16 and device == "cpu":
        pytest.skip("torch's CPU has no LSTM of half precision")
    torch.manual_seed(0)
    model = make().to(device)
    opt = OPTIMIZERS[kind](model)
    x, y = torch.randn(16, 5, 8, device=device), torch.randint(0, 2, (16,), device=device)
    scaler = torch.amp.GradScaler(device, enabled=amp is torch.float16, init_scale=1024.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            with torch.autocast(device, amp or torch.bfloat16, enabled=amp is not None):
                out = model(x)
                loss = F.cross_entropy(out["logits"][0] if isinstance(out, dict) else out, y, label_smoothing=0.1)
            loss = loss + 1e-4 * model.out.weight.square().sum()  # a loss made of parts
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert all(row["refreshes"] == 2 for row in opt.diagnostics().values())


@EACH
def test_grad_scaler_changes_no_rate(kind):
    found = []
    for scale in (None, 2.0**10):
        model, opt = followed(kind)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        for batch in batches(STEPS, torch.float32):
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        found.append(rates_of(opt))
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


@EACH
def test_two_optimizers_on_one_loss(kind):
    """Each measures as if it were alone, and the gradients are those of one backward."""
    x, y = batches(1, torch.float32)[0]
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 2)
    alone = []
    for part in (encoder, decoder):
        opt = OPTIMIZERS[kind](part)
        F.cross_entropy(decoder(encoder(x)), y).backward()
        alone.append([p.grad.clone() for p in part.parameters()])
        opt.step()
        alone.append(opt.rates())
        [p.grad.zero_() for p in [*encoder.parameters(), *decoder.parameters()]]
        opt.unfollow()
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 2)
    opts = [OPTIMIZERS[kind](part) for part in (encoder, decoder)]
    F.cross_entropy(decoder(encoder(x)), y).backward()
    assert all(p.grad is not None for opt in opts for p in opt.param_groups[0]["params"])
    for opt in opts:
        opt.step()
        assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())
    assert opts[0].rates() == pytest.approx(alone[1])


@pytest.mark.parametrize("call", ["retain_graph", "gradient", "inputs", "twice"])
def test_backward_with_arguments_does_what_torch_does(call):
    x, y = batches(1, torch.float32)[0]
    grads = []
    for following in (True, False):
        model = small_net(torch.float32)
        opt = followed("adamw", model)[1] if following else None
        loss = F.cross_entropy(model(x), y)
        if call == "retain_graph":
            loss.backward(retain_graph=True)
            loss.backward()
        elif call == "gradient":
            loss.backward(torch.tensor(2.0))
        elif call == "inputs":
            loss.backward(inputs=list(model[0].parameters()))
        else:
            loss.backward()
            with pytest.raises(RuntimeError, match="second time"):
                loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        if call == "retain_graph" and opt is not None:
            opt.step()
            assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())
    torch.testing.assert_close(*grads)


@EACH
def test_a_closure_measures_in_its_only_call(kind):
    """As Lightning calls it: gradients there before, no zero_grad, and None for a batch that is skipped."""
    model, opt = followed(kind, update_every=2)
    calls = []
    for k, batch in enumerate(batches(9, torch.float32)):

        def closure(batch=batch, k=k):
            calls.append(k)
            if k == 5:
                return None
            loss = loss_of(model, batch)
            opt.zero_grad()
            loss.backward()
            return loss

        opt.step(closure)
    assert calls == list(range(9))
    assert all(row["refreshes"] >= 4 for row in opt.diagnostics().values())


@EACH
@pytest.mark.parametrize("more", ["fewer micro-batches", "a stray backward"])
def test_windows_may_become_shorter(kind, more):
    model, opt = followed(kind, update_every=5)
    data = batches(30, torch.float32)
    if more == "a stray backward":
        loss_of(model, data[0]).backward()
        opt.zero_grad(set_to_none=False)
    steps(opt, model, data[:6], parts=4 if more == "fewer micro-batches" else 1)
    steps(opt, model, data)
    assert all(row["refreshes"] >= 7 for row in opt.diagnostics().values())


@EACH
@pytest.mark.parametrize("how", ["plain", "default device", "list", "stack"])
def test_a_scaler_is_recognised(kind, how):
    rates = []
    for scale in (None, 1024.0):
        model, opt = followed(kind)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        loss = loss_of(model, batches(1, torch.float32)[0])
        with torch.device("cpu") if how == "default device" else contextlib.nullcontext():
            if how == "list":
                loss = scaler.scale([loss])[0]
            elif how == "stack":
                loss = torch.stack([scaler.scale(loss / 2), scaler.scale(loss / 2)]).sum()
            else:
                loss = scaler.scale(loss)
        loss.backward()
        scaler.step(opt)
        rates.append(rates_of(opt))
    torch.testing.assert_close(*rates, rtol=1e-3, atol=0)


@EACH
def test_hooks_see_the_gradient_alone(kind):
    """The second pass of a measurement brings other numbers: neither hooks nor retain_grad get to see these."""
    seen: dict[bool, list] = {}
    rates = {}
    for hooked in (False, True):
        model, opt = followed(kind)
        x, y = batches(1, torch.float32)[0]
        out = model(x)
        found = seen[hooked] = []
        if hooked:
            out.retain_grad()
            for tensor in (out, *model.parameters()):
                tensor.register_hook(lambda grad, found=found: found.append(grad.detach().clone()))
        F.cross_entropy(out, y).backward()
        if hooked:
            other = small_net(torch.float32)
            plain = other(x)
            plain.retain_grad()
            F.cross_entropy(plain, y).backward()
            torch.testing.assert_close(out.grad, plain.grad)
            assert not out.grad.requires_grad
        opt.step()
        rates[hooked] = opt.rates()
    assert len(seen[True]) == 1 + 6
    assert rates[True] == rates[False]


@EACH
def test_outputs_are_found_in_objects(kind):
    class Held:
        __slots__ = ("inner",)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net(torch.float32)

        def forward(self, x):
            held = Held()
            held.inner = torch.distributions.Independent(torch.distributions.Normal(self.net(x), 1.0), 1)
            return held

    model = Model()
    opt = OPTIMIZERS[kind](model)
    x, y = batches(1, torch.float32)[0]
    (-model(x).inner.log_prob(F.one_hot(y, 2).float()).mean()).backward()
    opt.step()
    assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())


@EACH
def test_rates_fit_clipped_gradients_where_the_graph_is_kept(kind):
    found = []
    for keep in (True, False):
        model, opt = followed(kind)
        for batch in batches(2, torch.float32):
            loss_of(model, batch).backward(retain_graph=keep)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            opt.step()
            opt.zero_grad()
        found.append(rates_of(opt))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
