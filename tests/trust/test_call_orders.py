"""Calls in any order: random models, groups, dtypes and options, and random programs of an optimizer's calls.

Catches: an error that docs/troubleshooting.md does not know; NaN in weights; weights, counters or rates changed by a
call that must not change them, or that was refused; weights to train on that do not come back from `eval`; a stale rate
or measurement after loading; a copy or a resumed run that goes on otherwise; compiled code that differs from plain
torch, and either from the reference.
"""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from order_copies import Copies
from order_tables import GROUPS, INVALID, SET
from programs import (
    bits,
    run_programs,
    same,
)

from lwas_fast.update import extension

choice = st.sampled_from
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # `Program.attempt` looks at them


class Calls(Copies):
    """Parameter groups and options besides."""

    # Groups and options

    @precondition(lambda self: len(self.late) < 2 and not self.invalid)
    @rule(options=choice([{}, {"lr": 0.5}, {"update_every": 1, "weight_decay": 0.0}, {"ramp_steps": 2}]))
    def add_a_group(self, options):
        there, before = list(self.model.parameters()), bits(self.model)
        if self.attempt(lambda: self.add_late(self.model, self.opt, options)) is None:
            self.late.append(options)
            self.counted.append(0)
            assert same(before, [param.detach() for param in there])
            self.held = None

    @rule(what=choice(sorted(GROUPS)))
    def add_an_impossible_group(self, what):
        error, group = GROUPS[what]
        named = "param_names" in self.opt.param_groups[0]
        self.attempt(lambda: self.opt.add_param_group(group(torch.nn.Parameter(torch.ones(2)))), error, must=True)
        assert len(self.opt.param_groups) == len(self.counted), named

    @rule(which=st.integers(0, 9), frozen=st.booleans())
    def freeze(self, which, frozen):
        params = list(self.model.parameters())
        params[which % len(params)].requires_grad_(not frozen)

    @rule(data=st.data(), which=st.integers(0, 2))
    def set_an_option(self, data, which):
        table = {**SET, "momentum": [0.5, 0.9], "betas": [(0.8, 0.9), (0.9, 0.99)]}
        group = self.opt.param_groups[which % len(self.opt.param_groups)]
        name = data.draw(choice(sorted((table.keys() & group.keys()) - ({"foreach"} if group["fused"] else set()))))
        group[name] = data.draw(choice(table[name]))
        self.invalid.discard((which % len(self.opt.param_groups), name))

    @rule(data=st.data(), which=st.integers(0, 2), mended=choice([True, True, True, False]))
    def set_an_option_to_what_it_cannot_be(self, data, which, mended):
        number = which % len(self.opt.param_groups)
        group = self.opt.param_groups[number]
        name = data.draw(choice(sorted(INVALID.keys() & group.keys())))
        kept, group[name] = group[name], data.draw(choice(INVALID[name]))
        before = (number, name) in self.invalid
        self.invalid.add((number, name))
        for call in (self.opt.step, self.opt.rates, self.opt.log):
            refused = self.refusals()
            self.attempt(call, *refused, must=True)
        if mended and not before:
            group[name] = kept
            self.invalid.discard((number, name))

    @rule()
    def flip_the_mode(self):
        group = self.opt.param_groups[0]
        if any(self.opt.state.get(p) for p in group["params"]):
            group["schedule_free"] = not group["schedule_free"]
            self.flipped = True
            self.attempt(self.opt.step, *self.refusals())
            group["schedule_free"] = not group["schedule_free"]
            self.flipped = False

    @precondition(lambda self: not self.invalid)
    @rule(kind=choice(["step", "cycle", "cosine", "lambda"]))
    def schedule(self, kind):
        of = torch.optim.lr_scheduler
        for group in self.opt.param_groups:  # as torch's schedulers want them
            group["lr"] = float(group["lr"]) or 1.0
            group.pop("initial_lr", None)
        made = {
            "step": lambda: of.StepLR(self.opt, 2, 0.7),
            "cycle": lambda: of.OneCycleLR(self.opt, 1.0, total_steps=50),
            "cosine": lambda: of.CosineAnnealingLR(self.opt, 5),
            "lambda": lambda: of.LambdaLR(self.opt, lambda k: 1 / (k + 1)),
        }
        self.scheduler = made[kind]()

    @precondition(lambda self: self.scheduler is not None and not self.invalid)
    @rule()
    def schedulers_step(self):
        if self.scheduler.last_epoch < 45 and len(self.scheduler.base_lrs) == len(self.opt.param_groups):
            with warnings.catch_warnings(record=True):
                self.scheduler.step()


SAYS = "call orders: only documented errors, no NaN, no stale rate, nothing changed that must not be (programs)"
TWINS = "call orders: a step by compiled code and by plain torch, from any state"
RESUMED = "call orders: a step of a resumed run equals that of the one that was saved, bit for bit"


def check(tally, seed, count):
    with tally(SAYS) as row:
        ran = run_programs(Calls, row, seed, count, 20)
    for what, tried in ((TWINS, ran.compared), (RESUMED, ran.resumed)):
        if extension.EXTENSION is not None or what != TWINS:
            with tally(what) as row:
                row.tried = tried


def test_any_order_of_calls(tally):
    check(tally, 0, 220)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 41))
def test_any_order_of_calls_many_times(tally, seed):
    check(tally, seed, 200)
