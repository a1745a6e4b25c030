"""What programs of calls start from, what is known of an optimizer's state in them, and what holds after every call."""

from __future__ import annotations

import warnings

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from order_tables import OPTIONS, OWN, STYLES
from programs import (
    DOCUMENTED,
    DTYPES,
    PARTS,
    WARNED,
    Net,
    bits,
    counters,
    name_of,
    optimizer_of,
    same,
)

from lwas_fast.update import extension

choice = st.sampled_from


class Program(RuleBasedStateMachine):
    """One program: a model, its optimizer, and calls of these; subclasses have the calls."""

    sequences = calls = compared = resumed = 0

    @initialize(data=st.data())
    def start(self, data):
        type(self).sequences += 1
        pick = lambda values: data.draw(choice(list(values)))  # noqa: E731
        self.kind = pick(["sgd", "adamw"])
        parts = tuple(data.draw(st.lists(choice(sorted(PARTS)), min_size=0, max_size=3)))
        embedding = data.draw(st.booleans())
        self.net = (parts, embedding, embedding and data.draw(st.booleans()), pick(["float32", *DTYPES]))
        table = {**OPTIONS, **OWN[self.kind]}
        names = data.draw(st.lists(choice(sorted(table)), unique=True, max_size=6))
        self.options = {name: pick(table[name]) for name in names}
        self.options |= pick([{}, {}, {"foreach": True}, {"fused": False}, {"fused": True}])
        if self.options.get("fused") and (extension.EXTENSION is None or "mixed" in self.net[3] or "64" in self.net[3]):
            del self.options["fused"]  # refused by name: test_options.py
        self.style, self.amp = pick(STYLES), pick([False, False, True])
        torch.manual_seed(data.draw(st.integers(0, 9)))
        self.late, self.files, self.number = [], [], 0
        self.invalid, self.flipped, self.mode_of = set(), False, None
        self.complete = False  # whether opt.backward has been told that a window ends
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=self.amp)
        self.scheduler = None
        self.adopt(*self.made())

    def made(self):
        model = Net(*self.net)
        with warnings.catch_warnings(record=True):
            opt = optimizer_of(self.kind, model, self.style, self.options)
        for group in self.late:
            self.add_late(model, opt, group)
        return model, opt

    def add_late(self, model, opt, options):
        part = PARTS["tanh"]().to(DTYPES[self.net[3]][0])
        model.body.append(part)
        params = list(part.named_parameters(prefix=f"body.{len(model.body) - 1}"))
        opt.add_param_group(
            {"params": params if "param_names" in opt.param_groups[0] else [p for _, p in params], **options}
        )

    def adopt(self, model, opt, followed=None):
        """Go on with these."""
        self.model, self.opt = model, opt
        self.followed = self.style == "model" if followed is None else followed
        self.counted = [group["steps"] for group in opt.param_groups]
        self.seen, self.held = counters(opt) if not self.invalid else {}, None
        opt.register_step_post_hook(self.stepped)

    def stepped(self, opt, *_):
        for number, group in enumerate(opt.param_groups):
            self.counted[number] += any(p.grad is not None for p in group["params"])
        self.held = None

    # What is known of the state, for what may be refused in it.

    @property
    def trained(self):
        return all(group["train_mode"] for group in self.opt.param_groups)

    def refusals(self, closure=False):
        found = set()
        if not self.trained and (closure or not (self.followed and self.model.training)):
            found.add("evaluated" if self.followed else "average")
        if self.invalid:
            found.add("range")
        if self.flipped:
            found.add("mode")
        if any(group["fused"] for group in self.opt.param_groups):
            found.add("fused")
        if any(group["fused"] and group["foreach"] for group in self.opt.param_groups):
            found.add("both")
        return found

    def attempt(self, call, *allowed, must=False):
        """Call; of documented errors only `allowed` ones may come, and leave weights, counters and groups alone."""
        type(self).calls += 1
        may_move = self.may_move or not self.trained
        before, steps = bits(self.model), [group["steps"] for group in self.opt.param_groups]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                result = call()
                assert not must, f"nothing was refused: {allowed}"
            except tuple({kind for kind, _ in DOCUMENTED.values()}) as error:
                if isinstance(error, AssertionError) or name_of(error) not in allowed:
                    raise
                assert same(before, bits(self.model)) or may_move, f"{error} left other weights"
                assert steps == [group["steps"] for group in self.opt.param_groups]
                result = error
        for warning in warned:
            if warning.filename.endswith(("test_call_orders.py", "programs.py", "contextlib.py")):
                assert any(text in str(warning.message) for text in WARNED), warning.message
        return result

    may_move = False  # whether a refused call may have moved weights between average and iterate

    def quiet(self, call):
        """Call what changes nothing."""
        before = bits(self.model)
        found = self.attempt(call, *({"range"} if self.invalid else ()))
        assert same(before, bits(self.model))
        return found

    # What holds after every call

    @invariant()
    def weights_are_finite(self):
        if hasattr(self, "model"):
            for name, param in self.model.named_parameters():
                assert param.isfinite().all(), f"{name} is not finite"

    @invariant()
    def counters_go_up(self):
        if not hasattr(self, "opt"):
            return
        assert [group["steps"] for group in self.opt.param_groups] == self.counted
        assert len({group["train_mode"] for group in self.opt.param_groups}) == 1
        if self.invalid:
            return
        now = counters(self.opt)
        for name, row in self.seen.items():
            assert all(now[name][key] >= value for key, value in row.items()), (name, row, now[name])
        self.seen = now
