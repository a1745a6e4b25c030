"""Runs of a hundred thousand steps: memory stays as it is, counters are exact, a warning is said once.

Catches: a graph, a plan, a layout or a hook that each step or refresh leaves behind, an entry for each pattern of
layers that has had a gradient, a counter that loses steps, a warning at each step.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
import tracemalloc
import warnings
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
from cases import OPTIMIZERS, closing, loss_of
from torch import Tensor, nn
from trust.resume_cases import KINDS, MODES

MIB = 2**20
STATUS = Path("/proc/self/status")


def resident() -> int:
    """The process's own memory in bytes, without pages of files, which come and go; 0 where the system does not say."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def tensors() -> int:
    """How many tensors live."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())  # isinstance may make modules warn


def sizes(opt: object) -> dict[str, int]:
    """The length of every collection that an optimizer holds, however deep, by where it is."""
    found: dict[str, int] = {}
    seen: set[int] = set()

    def look(thing: object, where: str) -> None:
        if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type, FunctionType, ModuleType, nn.Module)):
            return
        seen.add(id(thing))
        if isinstance(thing, (dict, list, tuple, set)):
            thing = {k: v for k, v in thing.items() if k != "tries"} if isinstance(thing, dict) else thing
            found[where] = found.get(where, 0) + len(thing)  # but for what is there after a measurement that failed
            for part in thing.values() if isinstance(thing, dict) else thing:
                look(part, f"{where}/")
        elif not isinstance(thing, Tensor) and hasattr(thing, "__dict__"):
            for name, part in list(vars(thing).items()):
                look(part, f"{where}.{name}")

    look(opt, type(opt).__name__)
    return found


def net(middling: bool) -> nn.Module:
    torch.manual_seed(0)
    if not middling:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    body = [part for _ in range(6) for part in (nn.Linear(32, 32), nn.LayerNorm(32), nn.Tanh())]
    return nn.Sequential(nn.Linear(3, 32), *body, nn.Linear(32, 2))


class Watched:
    """A run in ten parts of which memory, collections and times are noted after each."""

    def __init__(self, kind: str, follows: bool, middling: bool = False, **options: object):
        self.model, self.made = net(middling), torch.Generator().manual_seed(1)
        self.follows, self.taken, self.refreshes = follows, 0, 0
        self.twice = options.get("hvp") == "finite_difference"  # which calls a closure twice
        self.opt = OPTIMIZERS[kind](self.model if follows else self.model.named_parameters(), **options)
        self.noted: list[dict[str, object]] = []

    def step(self) -> None:
        """The routes in turn; now and then no loss reaches the last layer's bias, and the model is evaluated."""
        x = torch.randn(8, 3, generator=self.made)
        batch = x, (x.sum(1) > 0).long()
        k, self.taken = self.taken, self.taken + 1
        self.refreshes += self.opt.curvature_due
        if k % 10 == 7 or self.twice:
            self.opt.step(closing(self.opt, lambda: loss_of(self.model, batch)))
        else:
            self.opt.zero_grad()
            loss = loss_of(self.model, batch)
            loss.backward() if self.follows else self.opt.backward(loss)
            if k % 50 == 31:
                self.model[-1].bias.grad = None
            self.opt.step()
        if k % 200 == 199:
            self.opt.eval()
            self.opt.train()
            self.opt.diagnostics()

    def run(self, steps: int) -> None:
        """Take a tenth of the steps ten times; notes are taken after some, the first of them when all is set up."""
        for part in range(10):
            start = time.perf_counter()
            for _ in range(steps // 10):
                self.step()
            taken = time.perf_counter() - start
            if part in (1, 4, 9):
                now = {"tensors": tensors(), "sizes": sizes(self.opt), "resident": resident()}
                self.noted.append({**now, "blocks": sys.getallocatedblocks(), "seconds": taken})

    def traced(self, steps: int) -> float:
        """By how many bytes Python's memory grew in so many further steps, a multiple of 200; they take long."""
        tracemalloc.start()
        found = []
        for _ in range(2):
            for _ in range(steps):
                self.step()
            gc.collect()
            found.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        return found[1] - found[0]

    def grew(self) -> str:
        """What there is more of at the end than at the start, but for what the notes themselves take."""
        first, last = self.noted[0], self.noted[-1]
        more = [f"{last['tensors'] - first['tensors']} tensors"] * (last["tensors"] > first["tensors"])
        more += [f"{name}: {n}" for name, n in last["sizes"].items() if n > first["sizes"].get(name, 0)]
        if last["blocks"] - first["blocks"] > 2000:
            more.append(f"{last['blocks'] - first['blocks']} blocks of Python's memory")
        if last["resident"] - self.noted[1]["resident"] > 8 * MIB:
            more.append(f"{(last['resident'] - self.noted[1]['resident']) / MIB:.1f} MiB of the process")
        return "; ".join(more)

    def counted(self) -> bool:
        """Whether steps, measurements and each parameter's updates are what they were."""
        groups, rows = self.opt.param_groups, self.opt.diagnostics().values()
        tried = {row["refreshes"] + row["nonfinite"] + row["no_descent"] for row in rows}
        without = sum(k % 50 == 31 for k in range(self.taken)) * (not self.twice)
        steps = [self.opt.state[p]["step"].item() for p in self.model.parameters()]
        expected = [self.taken] * (len(steps) - 1) + [self.taken - without]
        return [g["steps"] for g in groups] == [self.taken] and tried == {self.refreshes} and steps == expected


def watch(row, steps, label, traced=0, **case):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Watched(**case)
        run.run(steps)
        grew = run.grew()
        if traced and (grown := run.traced(traced)) > MIB / 16:
            grew += f"; {grown / 1024:.0f} KiB of Python's memory in {traced} steps"
    said = [str(warning.message) for warning in caught]
    twice = [message for message in said if said.count(message) > 1]
    row.held(not grew and not twice and run.counted(), f"{label}: {grew or twice or 'counters'}")
    ratio = run.noted[-1]["seconds"] / run.noted[0]["seconds"]
    print(f"{label}: {run.taken} steps, {run.refreshes} measurements; last tenth / second tenth: {ratio:.2f} in time")
    print(f"{label}: {grew or twice or 'nothing grew'}")


FLAT = "long runs: memory and collections flat, warnings once, counters exact"


@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_steps(kind, tally):
    with tally(FLAT) as row:
        watch(row, 2000, kind, kind=kind, follows=kind == "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("case", [*itertools.product(KINDS, MODES)], ids=str)
def test_a_hundred_thousand_steps(case, tally):
    kind, free = case
    with tally(FLAT) as row:
        watch(row, 100_000, str(case), 600, kind=kind, follows=free, schedule_free=free)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*itertools.product(KINDS, ("autograd", "finite_difference"))], ids=str)
def test_five_thousand_refreshes(case, tally):
    kind, hvp = case
    with tally(FLAT) as row:
        watch(row, 5000, str(case), 200, kind=kind, follows=hvp == "autograd", middling=True, update_every=1, hvp=hvp)
