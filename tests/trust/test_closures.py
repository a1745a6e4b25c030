"""Closures that `step` evaluates again: what they draw, and modules that other threads call meanwhile.

Catches: a second evaluation with other random numbers, taken for curvature without a word; the user's random numbers
moved by it; another thread's running statistics put back.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, rates_of
from torch import Tensor, nn
from torch.nn import functional as F
from trust.whole import warned

KINDS = pytest.mark.parametrize("kind", OPTIMIZERS)
SHARED: dict[str, Callable[[], Tensor]] = {
    "torch": lambda: torch.randint(512, (64,)),
    "numpy": lambda: torch.from_numpy(np.random.randint(0, 512, 64)),
    "random": lambda: torch.tensor(random.sample(range(512), 64)),
}


class Task:
    def __init__(self, kind: str):
        torch.manual_seed(0)
        self.x, self.y = torch.randn(512, 6), torch.randint(4, (512,))
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        self.opt = OPTIMIZERS[kind](self.model.parameters(), hvp="finite_difference")

    def step(self, draw: Callable[[], Tensor]) -> None:
        def closure() -> Tensor:
            self.opt.zero_grad()
            which = draw()
            loss = F.cross_entropy(self.model(self.x[which]), self.y[which])
            loss.backward()
            return loss

        self.opt.step(closure)


@KINDS
def test_shared_generators_draw_alike_in_both_evaluations(tally, kind):
    with tally("closures that draw from torch, numpy, random: the same curvature, random numbers not disturbed") as row:
        for name, draw in SHARED.items():
            random.seed(0), np.random.seed(0)
            drawing, fixed = Task(kind), Task(kind)
            for _ in range(12):
                drawing.step(draw)
            after = draw()
            random.seed(0), np.random.seed(0)
            Task(kind)  # torch's generator, as it was
            for _ in range(12):
                which = draw()
                fixed.step(lambda which=which: which)
            row.held(torch.equal(rates_of(drawing.opt), rates_of(fixed.opt)), f"{kind}, {name}: other rates")
            row.held(torch.equal(after, draw()), f"{kind}, {name}: other numbers drawn later")


@KINDS
def test_what_the_second_evaluation_draws_besides_is_not_missed_later(tally, kind):
    with tally("closures that draw from torch, numpy, random: the same curvature, random numbers not disturbed") as row:
        for name, draw in SHARED.items():
            task, calls = Task(kind), []

            def more(draw: Callable[[], Tensor] = draw, calls: list[Tensor] = calls) -> Tensor:
                calls.append(draw())
                if len(calls) > 1:
                    draw()
                return calls[0]

            random.seed(0), np.random.seed(0), torch.manual_seed(0)
            task.step(more)
            after = draw()
            random.seed(0), np.random.seed(0), torch.manual_seed(0)
            draw()
            row.held(len(calls) == 3 and torch.equal(after, draw()), f"{kind}, {name}: other numbers drawn later")


@KINDS
@pytest.mark.parametrize("curvature", ["signs", "blocks"])
def test_generators_of_a_closures_own_are_told_of(tally, kind, curvature):
    task = Task(kind)
    task.opt._how["curvature"] = curvature
    own = np.random.default_rng(0)
    with tally("closures that draw from a generator of their own: no measurement, one warning") as row:
        with warned() as said:
            for _ in range(60):
                task.step(lambda: torch.from_numpy(own.integers(0, 512, 64)))
        about = [w for w in said if "other gradients" in str(w.message)]
        row.held(len(about) == 1, f"{kind}: {len(about)} warnings")
        counts = task.opt.diagnostics().values()
        row.held(all(c["refreshes"] == 0 for c in counts), f"{kind}: {counts}")


@KINDS
def test_modules_of_other_threads_are_left_alone(tally, kind):
    with tally("modules that another thread calls during a second evaluation: their running statistics stay") as row:
        for _ in range(4):
            theirs, called = nn.BatchNorm1d(6), []
            task = Task(kind)

            def batch(task: Task = task, theirs: nn.Module = theirs, called: list[int] = called) -> Tensor:
                other = threading.Thread(target=lambda: theirs(task.x[:64]))
                other.start()
                other.join()
                called.append(1)
                return torch.arange(64)

            for _ in range(3):
                task.step(batch)
            row.held(theirs.num_batches_tracked == len(called) > 3, f"{theirs.num_batches_tracked} of {len(called)}")
