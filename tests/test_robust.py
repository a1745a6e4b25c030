"""What one bad measurement, or one layer that is like no other, does to the rest.

Catches: a layer of absurd curvature that sets everybody's rates through the terms between layers; a rate from a flat
start that stays; a measurement that is lost for ten steps or more, or without a word.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import ALL, REFERENCES, batches, loss_of, small_net, take_step
from torch import nn

from lwas_fast import AdamWLW
from lwas_fast.measure.probes import draw_signs, shares
from lwas_fast.table import Column

STEPS = 121


def one_sharp_layer(layers, curvatures):
    """Quadratic, with terms between the last layer and each other one."""
    *others, sharp = layers
    *least, most = curvatures
    value = most * sharp @ sharp / 2
    for c, w in zip(least, others, strict=True):
        value = value + c * w @ w / 2 + 0.5 * (c * most) ** 0.5 * w @ sharp
    return value


def of_quadratic(kind, how, curvatures, **options):
    """Rates after 13 measurements, in steps that move nothing."""
    torch.manual_seed(0)
    weights = [nn.Parameter(0.1 + torch.rand(3, dtype=torch.float64) * (c < 1e5)) for c in curvatures]
    opt = ALL[kind]([(f"layer{i}.w", w) for i, w in enumerate(weights)], lr=0.0, **options)
    for _ in range(STEPS):
        take_step(opt, lambda: one_sharp_layer(weights, curvatures), how)
    return weights, torch.tensor(list(opt.rates().values()))


@pytest.mark.parametrize("how", ["backward", "closure"])
@pytest.mark.parametrize("kind", ALL)
def test_one_absurd_layer_does_not_set_the_others_rates(kind, how):
    curvatures = [1.0, 2.0, 3.0, 4.0, 1e10]
    weights, rates = of_quadratic(kind, how, curvatures)
    _, exact = of_quadratic(kind, how, curvatures, curvature="blocks")
    assert ((rates / exact).log2().abs() < 3).all(), (rates, exact)
    if how == "backward":  # and it is what the reference does
        ref = REFERENCES[kind]([w.detach() for w in weights], lr=0.0)
        for k in range(STEPS):
            ref.step(lambda layers: one_sharp_layer(layers, curvatures), z=draw_signs(0, k, 5))
        torch.testing.assert_close(rates, torch.tensor(ref.rate), rtol=1e-5, atol=0)


def test_shares():
    """Ordinary networks have layers 25 and 70 times as sharp as the median: whole, and no reason to shorten another."""
    rows = torch.zeros(2, 3, len(Column))
    rows[..., Column.CURVATURE] = torch.tensor([[1.0, -1.0, 0.0], [1.0, 70.0**2, 1e4**2]])  # 0: not measured yet
    probes = [SimpleNamespace(rows=half) for half in rows]
    first, second = shares(probes, "signs")
    assert first.tolist() == [1, 1, 1] and second.tolist() == [1, 1, 2.0**-8]  # 70/1e4, rounded down
    assert [share.tolist() for share in shares(probes, "blocks")] == [[1, 1, 1]] * 2
    lengths = [torch.ones(3), torch.tensor([1.0, 1.0, 1e-4])]  # what is sharp is the product
    assert [share.tolist() for share in shares(probes, "signs", lengths)] == [[1, 1, 1]] * 2


def test_a_flat_start_is_forgotten_after_a_few_measurements():
    def rates(first):
        w = nn.Parameter(torch.ones(4, dtype=torch.float64))
        opt = ALL["adamw"]([("layer.w", w)], lr=0.0)
        for k in range(41):
            opt.zero_grad()
            opt.backward((first if k == 0 else 1.0) * (w * w).sum() + w.sum())  # the slope is there from the start
            opt.step()
            yield opt.rates()["layer"]

    flat, plain = list(rates(1e-6)), list(rates(1.0))
    assert flat[0] > 1e3 * plain[0] and flat[40] < 10 * plain[40]


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


@pytest.mark.parametrize("kind", ALL)
def test_a_layer_without_a_number_is_measured_again_at_the_next_step(kind):
    model = Switched()
    opt = ALL[kind](model.named_parameters())
    due = []
    for k, (x, _) in enumerate(batches(13, torch.float32)):
        model.on = k > 0
        due.append(opt.curvature_due)
        opt.zero_grad()
        opt.backward(model(x))
        opt.step()
    assert [k for k, is_due in enumerate(due) if is_due] == [0, 1, 11]
    assert [row["refreshes"] for row in opt.diagnostics().values()] == [3, 2]


@pytest.mark.parametrize("kind", ALL)
def test_after_three_tries_it_is_said_once_and_waits(kind):
    model = Switched()
    opt = ALL[kind](model.named_parameters())
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
        opt = ALL["adamw"](model.named_parameters())
        for k, (x, _) in enumerate(batches(6, torch.float32)):
            model.on = k > 1
            if resume and k == 1:
                saved, opt = opt.state_dict(), ALL["adamw"](model.named_parameters())
                opt.load_state_dict(saved)
            opt.zero_grad()
            opt.backward(model(x))
            opt.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(itertools.starmap(torch.equal, zip(*found, strict=True)))


def test_each_layer_has_its_own_three_tries():
    """One is lost at steps 0 to 2, another at step 12 alone, which a layer given up does not keep from a retry."""
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = ALL["adamw"]([("a.w", a), ("b.w", b)])
    due = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(15):
            due.append(opt.curvature_due)
            opt.zero_grad()
            opt.backward((0.0 if k == 12 else 1.0) * a.square().sum() + 0.0 * b.square().sum())
            opt.step()
    assert [k for k, is_due in enumerate(due) if is_due] == [0, 1, 2, 12, 13]
    assert ["'b'" in str(one.message) for one in caught] == [True]


def test_a_retry_counts_as_the_measurement_it_stands_for():
    weights = []
    for lost in (False, True):
        w = nn.Parameter(torch.ones(3))
        opt = ALL["adamw"]([("layer.w", w)], lr=0.0)
        for k in range(12):
            opt.zero_grad()
            opt.backward((0.0 if lost and k == 10 else 1.0) * w.square().sum())
            opt.step()
        weights.append(opt.state[w]["layer"][Column.WEIGHT].item())
    assert weights[0] == pytest.approx(weights[1], rel=1e-6)


def test_groups_that_are_measured_together_stay_together():
    """For their steps share what the loss has to give. One group's lost measurement must not part them."""
    model = Switched()
    layers = [[(name, p) for name, p in model.named_parameters() if name.startswith(of)] for of in ("body", "extra")]
    opt = AdamWLW([{"params": layer} for layer in layers])
    for k, (x, _) in enumerate(batches(30, torch.float32)):
        model.on = k > 0
        opt.zero_grad()
        opt.backward(model(x))
        opt.step()
        first, second = opt.param_groups
        assert first["next_refresh"] == second["next_refresh"]


class Overflow(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


@pytest.mark.parametrize("kind", ALL)
def test_a_step_that_the_scaler_skips_leaves_no_measurement_of_some_layers(kind):
    def rates(overflows):
        torch.manual_seed(0)
        body, head = nn.Linear(3, 4), nn.Linear(4, 1)
        named = [(f"{of}.{name}", p) for of, m in (("body", body), ("head", head)) for name, p in m.named_parameters()]
        opt = ALL[kind](named, lr=0.0, curvature="blocks")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for overflow in (*overflows, False):
            hidden = torch.tanh(body(torch.ones(2, 3)))
            opt.zero_grad()
            opt.backward(head(Overflow.apply(hidden) if overflow else hidden).square().mean(), scaler=scaler)
            scaler.step(opt)
            scaler.update()
        return opt.rates(), opt.diagnostics()["head"]["refreshes"]

    assert rates([True]) == rates([])


def test_steps_that_the_scaler_skips_are_no_tries():
    model, scaler = small_net(torch.float32), torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    opt = ALL["adamw"](model.named_parameters())
    due = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for batch in batches(12, torch.float32):
            due.append(opt.curvature_due)
            opt.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch)
            opt.backward(loss, scaler=scaler)
            scaler.step(opt)
            scaler.update()
    skipped = due.index(False) - 1
    assert skipped > 3 and due == [True] * (skipped + 1) + [False] * (11 - skipped)
    assert all(row["refreshes"] == 1 for row in opt.diagnostics().values())


def test_a_step_that_is_skipped_by_what_the_scaler_sets_is_no_try():
    """``fused=True`` has GradScaler set `found_inf` and leave the step to us: the next is due, as this one was."""
    model = small_net(torch.float32)
    opt = ALL["adamw"](model.named_parameters(), update_every=5)
    for k, batch in enumerate(batches(8, torch.float32)):
        assert opt.curvature_due is (k in (0, 5, 6, 7))
        last = opt.param_groups[0]["last_refresh"]
        opt.found_inf = torch.tensor(1.0 if k in (5, 6) else 0.0)
        opt.zero_grad()
        opt.backward(loss_of(model, batch))
        opt.step()
        if k in (5, 6):
            assert opt.curvature_due
            assert opt.param_groups[0]["last_refresh"] == last == 0
    assert all(row["refreshes"] == 2 for row in opt.diagnostics().values())


def test_what_is_on_its_way_survives_other_groups_and_copies():
    model = Switched()
    groups = [{"params": list(part.named_parameters(prefix=name))} for name, part in model.named_children()]
    opt = ALL["adamw"](groups)
    opt.backward(model(batches(1, torch.float32)[0][0]))
    opt.step()
    assert copy.deepcopy(opt).param_groups[1]["next_refresh"] == 1
    opt.param_groups = opt.param_groups[:1]
    assert opt.curvature_due  # together with the group that is gone


def test_layers_without_a_direction_do_not_hide_a_sharp_one():
    weights = [nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64)) for _ in range(5)]
    opt = ALL["adamw"]([(f"layer{i}.w", w) for i, w in enumerate(weights)], lr=0.0, update_every=1)
    for k in range(2):

        def loss(k=k):
            sharpness = (1.0, *((1.0, 1.0, 1.0) if k == 0 else (0.0, 0.0, 0.0)), 1e8)
            value = sum(h * w.square().sum() for h, w in zip(sharpness, weights, strict=True))
            return value + 1e4 * weights[0] @ weights[4]

        take_step(opt, loss)
    assert abs(opt.diagnostics()["layer0"]["curvature"]) < 1e3  # the term between the two would be 3e4


def test_ordinary_networks_are_not_measured_more_often():
    model = small_net()
    opt = ALL["adamw"](model.named_parameters())
    due = []
    for batch in batches(31):
        due.append(opt.curvature_due)
        opt.zero_grad()
        opt.backward(loss_of(model, batch))
        opt.step()
    assert [k for k, is_due in enumerate(due) if is_due] == [0, 10, 20, 30]
