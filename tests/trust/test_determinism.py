"""The same seed gives the same bits, whatever the number of threads; and nobody else's random numbers are touched.

Catches: sums whose order depends on how many threads share them, in rates, norms, the plain step and the compiled one;
an operation that torch refuses under ``use_deterministic_algorithms``; a random number drawn from the user's stream.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from cases import COMPILED, OPTIMIZERS, batches, closing, loss_of, usual
from torch import nn
from trust.resume_cases import KINDS, MODES, Run, resume, same, save

from lwas_fast.selection import squared_norms

THREADS = (1, 2, 3, 4)
SIZES = (2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1, 2**16, 2**16 + 1, 100_003, 2**17 + 3, 2**20 - 1, 2**20 + 9)
LONG = (2**21 - 1, 2**21)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def shapes_of(size):
    """Tensors of so many elements, or about: flat, transposed, with gaps, expanded, channels_last."""
    rows = size // 64
    yield "flat", lambda: torch.randn(size)
    yield "transposed", lambda: torch.randn(64, rows).t()
    yield "with gaps", lambda: torch.randn(rows, 70)[:, 3:67]
    yield "every second", lambda: torch.randn(2 * size)[::2]
    yield "expanded", lambda: torch.randn(rows, 1).expand(rows, 64)
    yield "channels_last", lambda: torch.randn(rows // 9, 64, 3, 3).contiguous(memory_format=torch.channels_last)


class Given(nn.Module):
    """A loss with products that only multiply: (a w**2 + b w).sum(), gradient 2 a w + b, Hessian 2 a."""

    def __init__(self, made):
        super().__init__()
        self.weight = nn.Parameter(made())
        self.a, self.b = made().abs() + 0.1, made()


class Loss(torch.autograd.Function):
    """Its value does not matter, and must not depend on threads either."""

    @staticmethod
    def forward(ctx, weight, a, b):
        ctx.save_for_backward(weight, a, b)
        return weight.new_ones(())

    @staticmethod
    def backward(ctx, gradient):
        weight, a, b = ctx.saved_tensors
        return 2 * a * weight + b, None, None


def bits_after(kind, options, made, route, steps=3):
    """Weights, state and rates after a few steps that all measure."""
    torch.manual_seed(0)
    model = Given(made)
    opt = OPTIMIZERS[kind]([model.weight], update_every=1, **options)
    for _ in range(steps):

        def loss():
            return Loss.apply(model.weight, model.a, model.b)

        if route == "closure":
            opt.step(closing(opt, loss))
        else:
            opt.zero_grad()
            opt.backward(loss())
            if route == "clipped":
                model.weight.grad.mul_(0.5)
            opt.step()
    assert opt.param_groups[0]["last_refresh"] == steps - 1
    return [model.weight.detach().clone(), *(v.clone() for v in opt.state[model.weight].values())]


def same_for_all_threads(work):
    found = []
    for count in THREADS:
        torch.set_num_threads(count)
        found.append(work())
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def rows(sizes):
    """The cases of `bits_after`: every optimizer, mode and update; routes and layouts in turn."""
    routes = itertools.cycle(("autograd", "closure", "clipped"))
    implementations = (None, True) if COMPILED else (True,)
    for size in sizes:
        for (kind, free, foreach), route in zip(itertools.product(KINDS, MODES, implementations), routes, strict=False):
            yield size, kind, {"schedule_free": free, "foreach": foreach}, route


def try_steps(tally, sizes, layouts):
    with tally("the same bits for 1 to 4 threads: weights, state, rates") as row:
        for size, kind, options, route in rows(sizes):
            for name, made in shapes_of(size):
                if name in layouts:
                    held = same_for_all_threads(lambda: bits_after(kind, options, made, route))  # noqa: B023
                    row.held(held, f"{kind}, {options}, {route}, {size} elements, {name}")


def test_steps_do_not_depend_on_threads(tally):
    try_steps(tally, (2**16 + 1,), ("flat",))


def test_steps_of_tensors_with_gaps_do_not_either(tally):
    try_steps(tally, (50_001,), ("with gaps",))


@pytest.mark.slow
def test_steps_of_all_sizes_and_layouts_do_not_either(tally):
    try_steps(tally, (*SIZES, *LONG), [name for name, _ in shapes_of(64**2) if name != "expanded"])


def test_norms_do_not_depend_on_threads(tally):
    """Gradients may be expanded, as that of a sum is, in any precision."""
    with tally("the same bits for 1 to 4 threads: norms") as row:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for size in (2**15 + 1, 100_003, 2**19 + 1):
                tensors = [made().to(dtype) for _, made in shapes_of(size)]
                row.held(same_for_all_threads(lambda: squared_norms(tensors, torch.float32)), f"{dtype}, {size}")  # noqa: B023


@pytest.fixture
def deterministic():
    """Algorithms that torch knows to be no function of their input are refused, and new memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def whole_life(run):
    """Train, evaluate, save, load, copy."""
    run.train(0, 16)
    run.opt.eval()
    run.opt.train()
    file = save(run, "evaluated")
    resume(run, file, True)
    run.train(16, 24)
    run.model.eval()
    run.loss(24)
    run.model.train()
    return run


def test_deterministic_algorithms(tally, request):
    """Nothing of ours is refused, and nothing reads what was never written."""
    cases = list(itertools.product(KINDS, MODES, (None, True), (True, False)))
    make = {
        case: (lambda c=case: Run(c[0], torch.float32, c[3], {"schedule_free": c[1], "foreach": c[2]}))
        for case in cases
    }
    before = [whole_life(make[case]()) for case in cases]
    request.getfixturevalue("deterministic")
    with tally("torch.use_deterministic_algorithms(True): nothing raised, the same bits") as row:
        for case, run in zip(cases, before, strict=True):
            row.held(same(run, whole_life(make[case]())), case)


def streams():
    """Where torch's, Python's and numpy's random numbers stand."""
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def uses(run):
    """What a script may do with an optimizer, by name; the model draws nothing."""
    opt, model, file = run.opt, run.model, io.BytesIO()
    yield "construction", lambda: OPTIMIZERS["adamw"](copy.deepcopy(model))
    yield "first steps", lambda: run.train(0, 4)
    yield "steps", lambda: run.train(4, 14)
    yield "eval", opt.eval
    yield "train", opt.train
    yield "save", lambda: torch.save(opt.state_dict(), file)
    yield "load", lambda: opt.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    yield "numbers", lambda: (opt.rates(), opt.diagnostics(), opt.log(), repr(opt))
    yield "copy", lambda: copy.deepcopy((model, opt))
    yield "pickle", lambda: pickle.loads(pickle.dumps((model, opt)))
    yield "averaged", lambda: opt.averaged_state_dict(model)
    yield "a new group", lambda: opt.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))]})
    yield "steps again", lambda: run.train(14, 20)
    yield "zero_grad", opt.zero_grad


def test_the_users_random_numbers_are_not_touched(tally):
    with tally("the user's random streams undisturbed: torch, random, numpy") as row:
        for kind, free, curvature, follows in itertools.product(KINDS, MODES, ("signs", "blocks"), (True, False)):
            run = Run(kind, torch.float32, follows, {"schedule_free": free, "curvature": curvature})
            for name, use in uses(run):
                before = streams()
                use()
                row.held(streams() == before, f"{kind}, {free}, {curvature}, follows={follows}: {name}")


@pytest.mark.parametrize("follows", (True, False))
def test_dropout_draws_as_with_torchs_own(follows, tally):
    """A second evaluation, or a model that is called once more, repeats the draws of the first, and adds none."""
    with tally("the user's random stream with dropout: as with torch's AdamW") as row:
        for kind, hvp, how in itertools.product(KINDS, ("autograd", "finite_difference"), ("backward", "closure")):
            stands = []
            for ours in (True, False):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))
                params = model if follows and ours else model.parameters()
                opt = OPTIMIZERS[kind](params, hvp=hvp, update_every=2) if ours else torch.optim.AdamW(params)
                found = []
                for batch in batches(6, torch.float32):
                    if how == "closure":
                        opt.step(usual(opt, model, batch))
                    else:
                        opt.zero_grad()
                        if not ours or follows and hvp == "autograd":
                            loss_of(model, batch).backward()
                        else:
                            opt.backward(lambda: loss_of(model, batch))  # noqa: B023
                        opt.step()
                    found.append(torch.get_rng_state().tolist())
                assert not ours or opt.param_groups[0]["last_refresh"] == 4
                stands.append(found)
            row.held(stands[0] == stands[1], f"{kind}, {hvp}, {how}, follows={follows}")
