"""Files, copies, and twins that take the same step."""

from __future__ import annotations

import copy
import pickle

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from order_training import Training
from programs import (
    LOSSES,
    bits,
    counters,
    same,
    through_a_file,
)

from lwas_fast.update import extension

choice = st.sampled_from


class Copies(Training):
    """What is saved, loaded, copied and resumed."""

    # Files and copies

    @rule()
    def save(self):
        saved = self.quiet(lambda: (self.model.state_dict(), self.opt.state_dict()))
        rates = {} if self.invalid else self.opt.rates()
        model, state = through_a_file(saved)
        valid = (set(self.invalid), self.flipped, self.followed)
        self.files = [
            *self.files,
            (model, state, rates, None if self.invalid else counters(self.opt), list(self.late), valid),
        ][-3:]

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 2), fresh=st.booleans(), model_first=st.booleans(), weights=choice([True, True, False]))
    def load(self, which, fresh, model_first, weights):
        model_state, state, rates, counts, late, valid = self.files[which % len(self.files)]
        if valid[0]:  # it was saved with an option that no step takes
            same_groups = [list(map(str, group)) for group in self.late] == [list(map(str, group)) for group in late]
            errors = ("range", "both") if same_groups else ("range", "both", "other groups")
            self.attempt(lambda: self.opt.load_state_dict(copy.deepcopy(state)), *errors, must=True)
            return
        if fresh:
            self.late = list(late)
            self.adopt(*self.made())
        self.scheduler = None  # its keys in the groups may be gone, as with torch's optimizers
        fits = [list(map(str, group)) for group in self.late] == [list(map(str, group)) for group in late]
        if not fits:
            self.attempt(lambda: self.opt.load_state_dict(copy.deepcopy(state)), "other groups", must=True)
            return
        calls = [lambda: self.opt.load_state_dict(state), lambda: self.model.load_state_dict(model_state)]
        if not (weights or fresh):
            calls = calls[:1]
        for call in reversed(calls) if model_first else calls:
            self.attempt(call)
        self.held, self.invalid, self.flipped = None, set(), valid[1]
        self.complete = False
        self.counted = [group["steps"] for group in self.opt.param_groups]
        assert self.counted == [group["steps"] for group in state["param_groups"]]
        assert self.opt.rates() == rates, "rates are not those that were saved"
        assert counters(self.opt) == counts
        self.seen = counts
        if (weights or fresh) and valid[2] and self.followed:  # files have the average, and so has the model now
            held = self.quiet(self.model.state_dict)
            assert all(torch.equal(held[name], value) for name, value in model_state.items())

    @rule(how=choice(["deepcopy", "pickle"]), follow=st.booleans())
    def copy_all(self, how, follow):
        def call():
            return (
                copy.deepcopy((self.model, self.opt))
                if how == "deepcopy"
                else pickle.loads(pickle.dumps((self.model, self.opt)))
            )

        model, opt = self.quiet(call)
        assert same(bits(self.model), bits(model))
        assert self.invalid or (self.opt.rates() == opt.rates() and counters(self.opt) == counters(opt))
        held = self.held
        self.adopt(model, opt, followed=False)
        self.scheduler, self.held, self.complete = None, held, False
        if follow and not self.flipped:
            self.hold(lambda: self.opt.follow(self.model))
            self.followed = True

    # Twins: the same step, taken elsewhere from the same state

    def step_of(self, model, opt, kind):
        torch.manual_seed(self.number)
        opt.zero_grad()
        self.attempt(lambda: opt.backward(lambda: self.loss(kind, model)), "no graph")
        self.attempt(opt.step)
        return bits(model), opt.rates(), counters(opt)

    def differs(self, one, other, exact):
        """What two steps have made of the same state, if that is not the same."""
        (weights, rates, counts), (others, their_rates, their_counts) = one, other
        if rates != their_rates:
            return f"rates {rates} and {their_rates}"
        if counts != their_counts:
            return f"counts {counts} and {their_counts}"
        # What compiled code takes back costs digits of moves of eight times a weight, in half precision of two.
        size = max(1e-2, *(float(a.abs().max()) for a in weights if a.numel()))
        for a, b in zip(weights, others, strict=True):
            close = (4 if a.dtype == torch.bfloat16 else 32) * torch.finfo(a.dtype).eps * size
            if not (torch.equal(a, b) if exact else bool(((a - b).abs() <= close).all())):
                return f"weights {a} and {b}, which differ by {a - b}"
        return None

    def trains(self):
        """Whether a step can be taken now; gradients of an unfinished one are dropped."""
        usual = self.trained and not self.invalid and any(p.requires_grad for p in self.model.parameters())
        if usual:
            self.zero_grad("opt")
            self.number += 1
        return usual and not (self.followed and not self.model.training)

    @precondition(lambda self: extension.EXTENSION is not None)
    @rule(kind=choice(LOSSES))
    def a_step_of_the_other_code(self, kind):
        if not self.trains():
            return
        model, opt = copy.deepcopy((self.model, self.opt))
        plain = self.opt.param_groups[0]["foreach"] is None and self.opt.param_groups[0]["fused"] is not False
        for group in opt.param_groups:
            group["foreach"], group["fused"] = plain or None, None
        one, other = self.step_of(self.model, self.opt, kind), self.step_of(model, opt, kind)
        type(self).compared += 1
        difference = self.differs(one, other, exact=False)
        assert difference is None, difference

    @rule(kind=choice(LOSSES), model_first=st.booleans(), first=choice(["opt.eval", "model.eval", None]))
    def resume(self, kind, model_first, first):
        if not self.trains():
            return
        if first is not None:
            self.set_mode(first)
        saved = through_a_file((self.model.state_dict(), self.opt.state_dict()))
        model, opt = self.made()
        (opt.follow if self.followed else lambda _: opt.unfollow())(model)
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            theirs.requires_grad_(mine.requires_grad)
        calls = [lambda: model.load_state_dict(saved[0]), lambda: opt.load_state_dict(saved[1])]
        for call in calls if model_first else reversed(calls):
            self.attempt(call)
        if first is not None:
            for of in (self.model, self.opt, model, opt):
                of.train()
        held, self.held = self.held, None
        assert held is None or same(held, bits(self.model))
        one, other = self.step_of(self.model, self.opt, kind), self.step_of(model, opt, kind)
        type(self).resumed += 1
        difference = self.differs(one, other, exact=True)
        assert difference is None, difference
        counted = self.counted
        self.adopt(model, opt, followed=self.followed)
        assert self.counted == counted
        self.scheduler = None
