"""Random programs in float64, each step beside the reference (tests/reference.py), wherever that speaks.

Catches: a call between two steps, in whatever order, that leaves a trace in what comes after: evaluation, files,
copies, measurements thrown away, refused calls, options set in mid-training.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import OPTIMIZERS, layer_vectors, loss_of, loss_of_vectors, reference_of
from torch import nn

pytest.importorskip("hypothesis")

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from programs import run_programs, through_a_file

from lwas_fast.measure.probes import draw_signs

choice = st.sampled_from
OPTIONS = {
    "update_every": [None, 1, 2, 3],
    "curvature": ["signs", "blocks"],
    "schedule_free": [True, False],
    "maximize": [False, True],
    "warmup_steps": [0, 2],
    "warmup_rate": [0.02, 1e-3],
    "weight_decay": [0.0, 0.3],
    "weight_decay_on": ["all", "matrices"],
    "lr": [1.0, 0.5],
    "seed": [0, 3],
}
ALWAYS = {"cap": [0.02, 0.1], "ramp_steps": [0, 5]}  # whose defaults differ between the modes
OWN = {
    "sgd": {"momentum": [0.9, 0.0, 0.5]},
    "adamw": {"betas": [(0.9, 0.99), (0.5, 0.8), (0.0, 0.0)], "eps": [1e-8, 1e-1]},
}
SET = ("lr", "cap", "ramp_steps", "weight_decay", "update_every", "warmup_rate", "maximize", "momentum", "betas", "eps")
EVENTS = {"negative": "negative", "nonfinite": "nonfinite", "nondescent": "no_descent", "growth": "growth"}
EVENTS |= {name: name for name in ("capped", "skipped", "refreshes")}


def batch_of(number):
    made = torch.Generator().manual_seed(number)
    x = torch.randn(8, 3, generator=made, dtype=torch.float64)
    return x, (x.sum(-1) + torch.randn(8, generator=made, dtype=torch.float64) > 0).long()


def net_of(widths):
    parts = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1]).double()


class BesideTheReference(RuleBasedStateMachine):
    """One program, and the reference's."""

    sequences = steps = 0

    @initialize(data=st.data())
    def start(self, data):
        type(self).sequences += 1
        pick = lambda values: data.draw(choice(list(values)))  # noqa: E731
        self.kind, self.widths = pick(OPTIMIZERS), pick([(3, 2), (3, 3, 2), (3, 2, 3, 2)])
        self.table = {**OPTIONS, **OWN[self.kind], **ALWAYS}
        names = data.draw(st.lists(choice(sorted(self.table)), unique=True, max_size=5))
        self.options = {name: pick(self.table[name]) for name in sorted({*names, *ALWAYS})}
        self.style, self.number, self.saved = pick(["model", "names"]), 0, None
        self.options.setdefault("weight_decay_on", "all")
        torch.manual_seed(data.draw(st.integers(0, 9)))
        self.model, self.opt = self.made()
        of_reference = {name: value for name, value in self.options.items() if name != "seed"}
        self.reference = reference_of(self.kind, self.model, **of_reference)
        self.followed, self.known = self.style == "model", 0

    def made(self):
        model = net_of(self.widths)
        params = model if self.style == "model" else model.named_parameters()
        return model, OPTIMIZERS[self.kind](params, **self.options)

    # Steps

    @rule(
        route=choice(["opt", "closure", "plain", "micro", "scaler", "callable"]),
        change=choice([None, None, "clip", "nan"]),
        count=st.integers(1, 4),
    )
    def train(self, route, change, count):
        for _ in range(count):
            self.train_a_step(route, change)

    and_on = train_on = train  # more often than others

    def train_a_step(self, route, change):
        type(self).steps += 1
        self.number += 1
        model, opt, ref, batch = self.model, self.opt, self.reference, batch_of(self.number)
        function = loss_of_vectors(model, batch)
        vectors = [w.clone().requires_grad_() for w in ref.W]  # a loaded model may hold the average as yet
        gradient = list(torch.autograd.grad(function(vectors), vectors))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        changed = None
        if change == "clip":
            factor = min(1.0, 0.05 / (torch.cat(gradient).norm().item() + 1e-6))
            changed = [g * factor for g in gradient]
        elif change == "nan":
            changed = [gradient[0].index_fill(0, torch.tensor([0]), float("nan")), *gradient[1:]]

        def change_them():
            if route == "scaler":
                scaler.unscale_(opt)
            if change == "clip":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            elif change == "nan":
                next(model.parameters()).grad.view(-1)[0] = float("nan")

        def closure():
            opt.zero_grad()
            loss = loss_of(model, batch)
            loss.backward() if self.followed else opt.backward(loss)
            change_them()
            return loss

        count, by_model = 2 if route == "micro" else 1, self.followed and route in ("plain", "closure")
        if by_model and count < self.known:
            route = "plain"
        # Nobody measures; or as many losses are waited for as the last measurement had.
        unmeasured = (route == "plain" and not self.followed) or (by_model and count < self.known)
        is_due = ref.k >= ref.due
        if is_due and not unmeasured:
            self.known = count
        elif is_due if by_model else route != "plain":  # of a model that is followed, losses are seen when it is due
            self.known = min(count, self.known)
        if unmeasured:
            ref.due = max(ref.due, ref.k + 1)
        ref.step(function, z=draw_signs(self.options.get("seed", 0), ref.k, len(ref.W)), gradient=changed)
        if route == "closure":
            opt.step(closure)
        else:
            opt.zero_grad()
            if route == "micro":
                opt.backward(loss_of(model, batch) / 2, last=False)
                opt.backward(loss_of(model, batch) / 2)
            elif route == "plain":
                loss_of(model, batch).backward()
            elif route == "callable":
                opt.backward(lambda: loss_of(model, batch))
            else:
                opt.backward(loss_of(model, batch), **({"scaler": scaler} if route == "scaler" else {}))
            change_them()
            opt.step()  # not the scaler's, which would leave a step with NaN out
        self.compare()

    def compare(self):
        ref = self.reference
        for mine, theirs in zip(layer_vectors(self.model), ref.W, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(list(self.opt.rates().values()), ref.rate, rtol=1e-7, atol=0)
        for shown, events, applied in zip(self.opt.diagnostics().values(), ref.events, ref.applied, strict=True):
            assert {name: shown[mine] for name, mine in EVENTS.items()} == events
            assert shown["applied"] == pytest.approx(applied, rel=1e-7)

    # What must leave no trace

    @rule(how=choice(["opt", "model", "averaged"]))
    def evaluate(self, how):
        """The average is the reference's as well; then training goes on."""
        if how == "averaged":
            with self.opt.averaged():
                found = layer_vectors(self.model)
        else:
            of = self.opt if how == "opt" or not self.followed else self.model
            of.eval()
            found = layer_vectors(self.model)
            of.train()
        expected = self.reference.X if self.options.get("schedule_free", True) else self.reference.W
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
        self.model.train()

    @rule(what=choice(["rates", "diagnostics", "log", "state_dict", "curvature_due"]))
    def read(self, what):
        found = getattr(self.opt, what)
        if callable(found):
            found()

    @rule(clears=choice(["opt", "model"]), route=choice(["opt", "plain", "partial"]))
    def throw_a_measurement_away(self, clears, route):
        loss = loss_of(self.model, batch_of(99))
        loss.backward() if route == "plain" else self.opt.backward(loss, last=route == "opt")
        (self.opt if clears == "opt" else self.model).zero_grad()

    @rule(what=choice(["group", "lr", "evaluated", "loss"]))
    def be_refused(self, what):
        opt = self.opt
        if what == "group":
            with pytest.raises(ValueError, match="is not valid"):
                opt.add_param_group({"params": [torch.ones(1, requires_grad=True)], "lr": -1})
        elif what == "lr":
            kept, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], float("nan")
            with pytest.raises(ValueError, match="is not valid"):
                opt.step()
            opt.param_groups[0]["lr"] = kept
        elif what == "loss":
            with pytest.raises(ValueError, match="must be a scalar"):
                opt.backward(self.model(batch_of(0)[0]))
        elif not self.followed:
            opt.eval()
            with pytest.raises(RuntimeError, match="hold the average"):
                opt.step()
            opt.train()

    @rule(averages=st.booleans(), fresh=st.booleans(), model_first=st.booleans())
    def save_and_load(self, averages, fresh, model_first):
        if averages:
            self.opt.eval()
        saved = through_a_file((self.model.state_dict(), self.opt.state_dict()))
        if averages:
            self.opt.train()
        if fresh:
            self.model, self.opt = self.made()
            if not self.followed:
                self.opt.unfollow()
            elif self.style != "model":
                self.opt.follow(self.model)
        calls = [lambda: self.model.load_state_dict(saved[0]), lambda: self.opt.load_state_dict(saved[1])]
        for call in calls if model_first else reversed(calls):
            call()
        self.known = 0
        if averages:
            self.opt.train()

    @rule(how=choice(["deepcopy", "pickle"]), follows=st.booleans())
    def go_on_with_a_copy(self, how, follows):
        both = self.model, self.opt
        self.model, self.opt = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        self.followed, self.known = follows, 0
        if follows:
            self.opt.follow(self.model)
        self.opt.train()  # which a state that was just loaded asks for

    @rule(follows=st.booleans())
    def follow(self, follows):
        self.opt.follow(self.model) if follows else self.opt.unfollow()
        self.opt.train()
        self.followed = follows

    # What the reference does as well

    @precondition(lambda self: self.reference.k > 0)
    @rule(data=st.data())
    def set_an_option(self, data):
        name = data.draw(choice([name for name in SET if name in self.table]))
        value = data.draw(choice(self.table[name]))
        self.opt.param_groups[0][name] = value
        setattr(self.reference.hyper, name, value)


SAYS = "call orders in float64: every step equals the reference's (programs)"


def test_any_program_equals_the_reference(tally):
    with tally(SAYS) as row:
        run_programs(BesideTheReference, row, 0, 80, 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_any_program_equals_the_reference_many_times(tally, seed):
    with tally(SAYS) as row:
        run_programs(BesideTheReference, row, seed, 400, 12)
