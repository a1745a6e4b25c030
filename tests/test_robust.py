"""What one bad measurement, or one layer that is like no other, does to the rest.

Catches: a layer of absurd curvature that sets everybody's rates through the terms between layers; a rate from a flat
start that stays; a measurement that is lost for ten steps or more, or without a word.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from cases import OPTIMIZERS, REFERENCES, batches, loss_of, small_net
from torch import nn

from lwas_fast.measure.probes import draw_signs

SHARP = 1e6


def one_sharp_layer(layers):
    """Quadratic: curvatures 1, 2, 3, 4 and SHARP, terms between the last layer and each other one."""
    *others, sharp = layers
    value = SHARP * sharp @ sharp / 2
    for i, w in enumerate(others, 1):
        value = value + i * w @ w / 2 + 0.5 * (i * SHARP) ** 0.5 * w @ sharp
    return value


def of_quadratic(kind, how, **options):
    """Measured at 13 of 121 steps that move nothing."""
    weights = [nn.Parameter(0.1 + torch.rand(3, dtype=torch.float64) * 10.0 ** -(3 * (i == 4))) for i in range(5)]
    named = [(f"layer{i}.w", w) for i, w in enumerate(weights)]
    opt = OPTIMIZERS[kind](named, lr=0.0, **options)
    for _ in range(121):

        def closure():
            opt.zero_grad()
            value = one_sharp_layer(weights)
            value.backward()
            return value

        if how == "closure":
            opt.step(closure)
            continue
        opt.zero_grad()
        opt.backward(one_sharp_layer(weights))
        opt.step()
    return weights, torch.tensor(list(opt.rates().values()))


@pytest.mark.parametrize("how", ["backward", "closure"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_absurd_layer_does_not_set_the_others_rates(kind, how):
    torch.manual_seed(0)
    weights, rates = of_quadratic(kind, how)
    torch.manual_seed(0)
    _, exact = of_quadratic(kind, how, curvature="blocks")
    assert ((rates / exact).log2().abs() < 3).all(), (rates, exact)
    if how == "backward":  # and it is what the reference does
        ref = REFERENCES[kind]([w.detach() for w in weights], lr=0.0)
        for k in range(121):
            ref.step(one_sharp_layer, z=draw_signs(0, k, 5))
        torch.testing.assert_close(rates, torch.tensor(ref.rate), rtol=1e-5, atol=0)


def test_a_flat_start_is_forgotten_after_a_few_measurements():
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = OPTIMIZERS["adamw"]([("layer.w", w)], lr=0.0)
    rates = []
    for k in range(41):
        opt.zero_grad()
        opt.backward((1e-6 if k == 0 else 1.0) * (w * w).sum() + w.sum())  # the slope is there from the start
        opt.step()
        rates.append(opt.rates()["layer"])
    last = 3e-6 * rates[0]  # what later measurements find: up to three times as steep, a million times sharper
    assert rates[0] > 1e4 * rates[10] and rates[40] < 10 * last


class Switched(nn.Module):
    """Its second layer has no effect, so no descent, while the switch is off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.extra, self.on = nn.Linear(3, 4), nn.Linear(4, 1), False

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return hidden.square().mean() + (
            self.extra(hidden).square().mean() if self.on else 0 * self.extra(hidden).sum()
        )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_layer_without_a_number_is_measured_again_at_the_next_step(kind):
    model = Switched()
    opt = OPTIMIZERS[kind](model.named_parameters())
    due = []
    for k, (x, _) in enumerate(batches(13, torch.float32)):
        model.on = k > 0
        due.append(opt.curvature_due)
        opt.zero_grad()
        opt.backward(model(x))
        opt.step()
    assert [k for k, is_due in enumerate(due) if is_due] == [0, 1, 11]
    assert [row["refreshes"] for row in opt.diagnostics().values()] == [3, 2]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_after_three_tries_it_is_said_once_and_waits(kind):
    model = Switched()
    opt = OPTIMIZERS[kind](model.named_parameters())
    measured = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, _ in batches(40, torch.float32):
            measured.append(opt.curvature_due)
            opt.zero_grad()
            opt.backward(model(x))
            opt.step()
    assert [k for k, is_due in enumerate(measured) if is_due] == [0, 1, 2, 12, 22, 32]
    (said,) = [str(one.message) for one in caught]
    assert "three measurements in a row of 1 layer(s)" in said and "'extra'" in said
    assert opt.diagnostics()["extra"]["no_descent"] == 6


def test_a_state_saved_between_the_tries_goes_on_as_the_run_would():
    found = []
    for resume in (False, True):
        model = Switched()
        opt = OPTIMIZERS["adamw"](model.named_parameters())
        for k, (x, _) in enumerate(batches(6, torch.float32)):
            model.on = k > 1
            if resume and k == 1:
                saved, opt = opt.state_dict(), OPTIMIZERS["adamw"](model.named_parameters())
                opt.load_state_dict(saved)
            opt.zero_grad()
            opt.backward(model(x))
            opt.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(itertools.starmap(torch.equal, zip(*found, strict=True)))


def test_ordinary_networks_are_not_measured_more_often():
    model = small_net()
    opt = OPTIMIZERS["adamw"](model.named_parameters())
    due = []
    for batch in batches(31):
        due.append(opt.curvature_due)
        opt.zero_grad()
        opt.backward(loss_of(model, batch))
        opt.step()
    assert [k for k, is_due in enumerate(due) if is_due] == [0, 10, 20, 30]
