"""The second evaluation of a finite difference leaves every buffer as the first one did.

Catches: running statistics, or any other buffer of any module that is called, counting a batch twice, whoever owns the
module and however it is compiled; a hook or a warning that a compiled program notices; a recompilation at a refresh;
modules kept alive.
"""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from cases import batches
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lwas_fast import AdamWLW


class Counter(nn.Module):
    """No parameters; writes to one buffer, replaces another, also in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.calls += 1
        self.largest = torch.maximum(self.largest, x.detach().abs().max())
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.plain = nn.BatchNorm1d(8, affine=False)  # no parameter that leads to it
        self.counter = Counter()
        self.silent = Counter()  # used, but never called
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        self.silent.calls += 1
        return self.head(self.counter(self.plain(self.body(x))))


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_in_place(model, backend):
    model.compile(backend=backend)
    return model


WAYS = {
    "torch.compile(module)": lambda model, backend: torch.compile(model, backend=backend),
    "module.compile()": compile_in_place,
    "torch.compile(function)": lambda model, backend: torch.compile(lambda x: model(x), backend=backend),
    "graph break": lambda model, backend: torch.compile(
        lambda x: model.head(broken(model.counter(model.plain(model.body(x))))), backend=backend
    ),
}


def broken(x):
    torch._dynamo.graph_break()
    return x


@pytest.mark.parametrize(
    ("way", "backend"),
    [("plain", None), ("torch.compile(module)", "eager"), *((way, "aot_eager") for way in WAYS)],
)
def test_buffers_count_a_batch_once(way, backend):
    """Over 10 refreshes against the same steps without a refresh; no warning, and nothing is compiled after the first.

    The normalisation beside the model belongs to nobody that the optimizer knows.
    """
    data = batches(10, torch.float32)
    torch.manual_seed(0)
    start = Model()
    states = []
    for update_every in (1, 10**9):
        model, beside = copy.deepcopy(start), nn.BatchNorm1d(2)
        run = model if way == "plain" else WAYS[way](model, backend)
        # Rate 0, so that both see the same weights.
        opt = AdamWLW(model.named_parameters(), lr=0.0, update_every=update_every)
        compiled = []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*global hooks")
            for x, y in data:

                def closure(x=x, y=y, run=run, beside=beside, opt=opt):
                    opt.zero_grad()
                    loss = F.cross_entropy(beside(run(x)), y)
                    loss.backward()
                    return loss

                opt.step(closure)
                compiled.append((counters["stats"]["unique_graphs"], torch._dynamo.convert_frame.FRAME_COUNTER))
        # The second batch may compile for another reason than a refresh: the first one has initialised something.
        assert len(set(compiled[1:])) == 1
        assert (compiled[-1][0] > 0) == (way != "plain")
        assert {row["refreshes"] for row in opt.diagnostics().values()} == {10 if update_every == 1 else 1}
        states.append({**model.state_dict(), **{f"beside {k}": v for k, v in beside.state_dict().items()}})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert states[0]["counter.calls"] == 10
    assert states[0]["silent.calls"] == (0 if way == "graph break" else 10)  # that way passes by Model.forward


def test_buffers_go_back_into_their_place():
    """The very tensors: an exponential average, DDP or a compiled graph may hold on to them."""
    model, (x, y) = Model(), batches(1, torch.float32)[0]
    opt = AdamWLW(model.named_parameters(), update_every=1)
    seen = []

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        seen.append((dict(model.named_buffers()), {k: v.clone() for k, v in model.named_buffers()}))
        loss.backward()
        return loss

    opt.step(closure)
    first, values = seen[0]
    assert len(seen) == 3  # the second finds out whether it repeats
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == {n: id(b) for n, b in first.items()}
    assert all(torch.equal(buffer, values[name]) for name, buffer in model.named_buffers())
    assert model.counter.absent is None


class Odd(nn.Module):
    """Equal to every other."""

    __hash__ = nn.Module.__hash__

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def __eq__(self, other):
        return True

    def forward(self, x):
        self.calls += 1
        return x


@pytest.mark.parametrize("compiled", [False, True])
def test_modules_of_every_kind(compiled):
    """Equal ones, scripted ones, not materialised ones, inference tensors: alive or called, none is in the way."""
    model, (x, y) = nn.Linear(3, 2), batches(1, torch.float32)[0]
    odd, other, lazy = Odd(), Odd(), nn.LazyBatchNorm1d()
    with torch.inference_mode():
        frozen = nn.BatchNorm1d(2).eval()
    scripted = torch.jit.script(nn.BatchNorm1d(2))
    run = torch.compile(model, backend="eager") if compiled else model
    opt = AdamWLW(model.named_parameters(), update_every=1)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(scripted(other(odd(run(x)))), y)
        loss.backward()
        return loss

    opt.step(closure)
    assert odd.calls == other.calls == scripted.num_batches_tracked == 1
    assert lazy.running_mean is not None
    assert frozen.num_batches_tracked == 0


def test_modules_are_not_kept_alive():
    model, (x, y) = Model(), batches(1, torch.float32)[0]
    run = torch.compile(model, backend="eager")
    opt = AdamWLW(model.named_parameters(), update_every=1)

    def closure(opt=opt, run=run):
        opt.zero_grad()
        loss = F.cross_entropy(run(x), y)
        loss.backward()
        return loss

    opt.step(closure)
    gone = weakref.ref(model)
    del model, run, opt, closure
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
