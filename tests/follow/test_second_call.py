"""A followed model without second derivative is called once more.

Catches: another curvature than that of the same function with a second derivative; a failure that is not said, ends
the training or keeps a graph alive.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from cases import OPTIMIZERS, batches
from follow_cases import EACH, followed, steps
from torch import nn
from torch.nn import functional as F


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.two(Once.apply(self.one(x)))


class Smooth(Stubborn):
    """The same function, differentiable twice."""

    def forward(self, x):
        return self.two(self.one(x).sin())


@EACH
@pytest.mark.parametrize("way", ["plain", "accumulated", "scaled", "dropout", "loss inside"])
def test_a_model_without_second_derivative_is_called_once_more(kind, way):
    """What is measured is what the same function with a second derivative would give."""
    found = []
    for make in (Stubborn, Smooth):
        torch.manual_seed(0)
        model = make()
        if way == "dropout":
            model.two = nn.Sequential(nn.Dropout(0.3), model.two)
        if way == "loss inside":
            net = model
            model = type(
                "Inside", (nn.Module,), {"forward": lambda self, x, y: {"loss": F.cross_entropy(self.net(x), y)}}
            )()
            model.net = net
        model.double()
        opt = OPTIMIZERS[kind](model, curvature="blocks", update_every=1)
        scaler = torch.amp.GradScaler("cpu", enabled=way == "scaled", init_scale=64.0)
        torch.manual_seed(1)
        for k, (x, y) in enumerate(batches(4)):
            if k == 0:
                continue  # other numbers for each make
            for _ in range(2 if way == "accumulated" else 1):
                loss = model(x=x, y=y)["loss"] if way == "loss inside" else F.cross_entropy(model(x), y)
                scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            if k == 1 and make is Stubborn and way != "accumulated":
                assert opt.measured_by is None  # the first try told
            if k == 2:
                found.append(opt.diagnostics())
                break
        assert opt.measured_by == ("replay" if make is Stubborn else "loss.backward")
    assert all(row["refreshes"] >= 1 for row in found[0].values())


class Inside(nn.Module):
    """It returns its loss, what that is made from, and what it is not."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        hidden = self.net.one(x)
        logits = self.net(x)
        return {"hidden": hidden, "logits": logits, "loss": F.cross_entropy(logits, y)}


@EACH
@pytest.mark.parametrize(
    "way", ["plain", "loss inside", "loss of one output", "hooked", "hooked inside", "retained", "accumulated"]
)
def test_a_second_call_measures_what_autograd_does(kind, way):
    found = []
    for make in (Stubborn, Smooth):
        torch.manual_seed(0)
        model = Inside(make().double()) if "loss" in way else make().double()
        opt = OPTIMIZERS[kind](model, curvature="blocks", update_every=1)
        opt._now.following.replays = make is Stubborn
        if way == "hooked inside":
            model.two.register_forward_hook(lambda *call: call[-1].register_hook(lambda grad: grad * 0.5) and None)
        for x, y in batches(2 if way == "accumulated" else 1):
            out = model(x, y) if "loss" in way else model(x)
            if way == "hooked":
                out.register_hook(lambda grad: 3 * grad)
            if way == "retained":
                out.retain_grad()
            if way == "loss of one output":
                out = out["logits"]
            loss = out["loss"] if way == "loss inside" else F.cross_entropy(out, y, label_smoothing=0.1)
            loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        grads += [out.grad] if way == "retained" else []
        opt.step()
        found.append([(row["descent"], row["curvature"]) for row in opt.diagnostics().values()] + [grads])
        assert opt.measured_by == ("replay" if make is Stubborn else "loss.backward")
    torch.testing.assert_close(found[0][-1], found[1][-1])
    torch.testing.assert_close(torch.tensor(found[0][:-1]), torch.tensor(found[1][:-1]), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(
    "why", ["two calls", "changed in place", "input with a gradient", "penalty", "outputs of outputs"]
)
def test_what_cannot_be_measured_is_said_and_training_goes_on(why):
    model = Inside(Stubborn()) if why == "outputs of outputs" else Stubborn()
    opt = OPTIMIZERS["adamw"](model)
    x, y = batches(1, torch.float32)[0]

    def step():
        if why == "outputs of outputs":
            out = model(x, y)
            (out["loss"] + out["logits"].square().mean()).backward()
            opt.step()
            opt.zero_grad()
            return
        out = model(x.clone().requires_grad_() if why == "input with a gradient" else x)
        if why == "two calls":
            out = out + model(x)
        penalty = 0.1 * model.one.weight.square().sum() if why == "penalty" else 0.0
        (F.cross_entropy(out.mul_(2.0) if why == "changed in place" else out, y) + penalty).backward()
        opt.step()
        opt.zero_grad()

    with pytest.warns(UserWarning, match="once_differentiable|no second derivative") as caught:
        for _ in range(3):
            step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="10 steps since .*(once_differentiable|no second derivative)"):
        for _ in range(9):
            step()


@EACH
def test_a_failed_measurement_keeps_nothing_alive(kind, monkeypatch):
    model, opt = followed(kind)

    def fails(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("lwas_fast.measure.routes.by_autograd", fails)
    x, y = batches(1, torch.float32)[0]
    out = model(x)
    loss, ref = F.cross_entropy(out, y), weakref.ref(out)
    loss.backward()
    opt.step()
    del loss, out
    assert ref() is None
    opt.zero_grad()
    steps(opt, model, [(x, y)])
    assert opt.measured_by == "replay"
