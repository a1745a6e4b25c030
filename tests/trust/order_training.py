"""Calls that train, evaluate and read."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule
from order_base import Program
from programs import (
    LOSSES,
    batch_of,
    bits,
    loss_of,
    same,
)

import lwas_fast

choice = st.sampled_from


class Training(Program):
    """Training in all ways, gradients that users change, modes, and what may be asked at any time."""

    # Training

    def loss(self, kind, model=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            return loss_of(self.model if model is None else model, batch_of(self.number), kind)

    def backward(self, route, kind):
        opt = self.opt
        if route == "plain":
            loss = self.loss(kind)
            if loss.requires_grad:
                self.attempt(loss.backward)
            return
        self.may_move = True
        last = route != "partial"
        argument = (
            (lambda: self.loss(kind)) if route == "callable" or opt._how["hvp"] != "autograd" else self.loss(kind)
        )
        refused = self.refusals(closure=False) - {"mode", "fused"}
        refused |= {"twice"} if self.complete else set()
        refused |= {"no grad", "no graph"} if not any(p.requires_grad for p in self.model.parameters()) else set()
        if not isinstance(self.attempt(lambda: opt.backward(argument, last=last), *refused), Exception):
            self.complete = last
        self.may_move = False

    @rule(route=choice(["plain", "plain", "opt", "opt", "partial", "callable"]), kind=choice(LOSSES))
    def differentiate(self, route, kind):
        self.number += 1
        self.backward(route, kind)

    @rule()
    def step(self):
        refused = self.refusals()
        self.may_move = True
        if not isinstance(
            self.attempt(self.opt.step, *refused, must=bool({"average", "evaluated"} & refused)), Exception
        ):
            self.complete = False
        self.may_move = False

    @rule(
        route=choice(["plain", "opt", "callable"]), kind=choice(LOSSES), clip=st.booleans(), micro=choice([1, 1, 2, 3])
    )
    def train_a_step(self, route, kind, clip, micro):
        """As most steps are."""
        self.number += 1
        for _ in range(1 if micro > 1 else 3):
            self.zero_grad("opt")
            for i in range(micro):
                early = "partial" if route == "opt" else "plain"
                self.backward(early if i < micro - 1 else route, kind)
            if clip:
                self.change_gradients("clip")
            self.step()
            self.number += 1

    train_on = and_on = train_a_step  # more often than others

    @rule(form=choice(["usual", "usual", "own", "none", "number", "raises", "model"]), kind=choice(LOSSES))
    def step_by_a_closure(self, form, kind):
        self.number += 1

        def closure():
            (self.model if form == "model" else self.opt).zero_grad()
            loss = self.loss(kind)
            if form == "own":
                return self.opt.backward((lambda: self.loss(kind)) if self.opt._how["hvp"] != "autograd" else loss)
            if loss.requires_grad:
                loss.backward()
            if form == "raises":
                raise KeyError("the user's")
            return {"none": None, "number": 0.5}.get(form, loss)

        refused = self.refusals() | {"closure"} if form == "number" else self.refusals()
        refused |= {"no grad", "no graph"} if not any(p.requires_grad for p in self.model.parameters()) else set()
        if form == "own" and not self.trained:
            refused |= {"average", "evaluated"}
        if self.followed and not self.model.training:  # the closure's call of the model puts the average into it
            refused.add("evaluated")
        self.may_move = True
        try:
            result = self.attempt(lambda: self.opt.step(closure), *refused)
            assert form != "raises" or isinstance(result, Exception)
            self.complete = form == "own" and isinstance(result, Exception)
        except KeyError:
            assert form == "raises"
        self.may_move = False

    @rule(unscale=st.booleans(), kind=choice(LOSSES), own=st.booleans())
    def step_by_a_scaler(self, unscale, kind, own):
        self.number += 1
        self.zero_grad("opt")
        opt, scaler = self.opt, self.scaler
        self.may_move = True
        if own and opt._how["hvp"] == "autograd":
            loss = self.loss(kind)
            self.attempt(lambda: opt.backward(loss, scaler=scaler), *(self.refusals() - {"mode", "fused"}), "no graph")
        else:
            loss = self.loss(kind)
            if loss.requires_grad:
                self.attempt(lambda: scaler.scale(loss).backward())
        if any(p.grad is not None for group in opt.param_groups for p in group["params"]):
            if unscale:
                self.attempt(lambda: scaler.unscale_(opt))
            self.attempt(lambda: scaler.step(opt), *self.refusals())
            scaler.update()
        self.zero_grad("opt")  # gradients of a scaled loss are nobody else's
        self.may_move = False

    @rule(how=choice(["opt", "model", "zeros"]))
    def zero_grad(self, how):
        self.quiet(
            {"opt": self.opt.zero_grad, "model": self.model.zero_grad}.get(how, lambda: self.opt.zero_grad(False))
        )
        if how == "opt" or how == "zeros":
            self.complete = False

    @rule(
        how=choice(["clip", "nan", "inf", "element", "none", "replace", "transpose", "double"]), which=st.integers(0, 9)
    )
    def change_gradients(self, how, which=0):
        there = [p for p in self.model.parameters() if p.grad is not None and p.numel() > 0]
        if not there:
            return
        param = there[which % len(there)]
        if how == "clip":
            torch.nn.utils.clip_grad_norm_(there, 0.1)
        elif how in ("nan", "inf"):
            param.grad.fill_(float(how))
        elif how == "element":
            param.grad.view(-1)[0] = float("nan")
        elif how == "none":
            param.grad = None
        elif how == "replace":
            param.grad = torch.randn_like(param)
        elif how == "transpose" and param.ndim == 2:
            param.grad = param.grad.t().contiguous().t()
        elif how == "double":
            param.grad.mul_(2)

    # Evaluation

    def hold(self, call):
        """Call what may put the average in, or take it out: the weights to train on come back bit for bit."""
        if self.trained and self.held is None:
            self.held = bits(self.model)
        self.attempt(call)
        if self.trained and self.held is not None:
            assert same(self.held, bits(self.model)), "the weights to train on came back changed"
            self.held = None

    @rule(
        what=choice(["opt.eval", "opt.train", "opt.eval", "opt.train", "opt.train(False)", "model.eval", "model.train"])
    )
    def set_mode(self, what):
        name, _, method = what.partition(".")
        of = self.opt if name == "opt" else self.model
        self.hold((lambda: of.train(False)) if "(" in method else getattr(of, method))

    @rule(grad=st.booleans())
    def call_the_model(self, grad):
        def call():
            with torch.set_grad_enabled(grad):
                self.model(batch_of(self.number))

        self.hold(call)

    @rule()
    def evaluate_the_average(self):
        def call():
            with self.opt.averaged(), torch.no_grad():
                self.model(batch_of(self.number))

        self.hold(call)

    @rule(stops=st.booleans())
    def follow(self, stops):
        self.hold(self.opt.unfollow if stops else lambda: self.opt.follow(self.model))
        self.followed = not stops

    @rule()
    def gather_statistics(self):
        self.hold(lambda: lwas_fast.refresh_norms(self.model, [[batch_of(n)] for n in range(2)]))

    # Reading

    @rule(what=choice(["rates", "diagnostics", "log", "state_dict", "repr", "due", "model", "average", "by"]))
    def read(self, what):
        opt, model = self.opt, self.model
        call = {
            "repr": lambda: repr(opt),
            "due": lambda: opt.curvature_due,
            "by": lambda: opt.measured_by,
            "model": model.state_dict,
            "average": lambda: opt.averaged_state_dict(model),
        }.get(what) or getattr(opt, what)
        found = self.quiet(call)
        if what == "rates" and not isinstance(found, Exception):
            assert all(0 < rate < float("inf") for rate in found.values()), found
