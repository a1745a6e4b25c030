"""Ctrl-C at any point: weights, state and counters are those before the call or those after it, and training goes on.

A real SIGINT is sent wherever Python looks for signals in a call: in the package's own code, torch's, the standard
library's.
Catches: a step taken by half, weights left displaced, a grad mode, a handler or a kernel that stays switched.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from trust.whole import CASES, EACH_CASE, QUICK, Run, equal, interrupted, points_of

from lwas_fast import interrupts

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not tell where handlers are")

# What is interrupted: how to come to it (given a fresh run), and the call. `due` is whether the curvature is measured.
CALLS: dict[str, tuple[Callable[[Run], object], Callable[[Run], object]]] = {
    "backward, due": (lambda run: run.due(True).opt.zero_grad(), lambda run: run.backward()),
    "backward, not due": (lambda run: run.due(False).opt.zero_grad(), lambda run: run.backward()),
    "step, measured": (lambda run: run.due(True).backward(), lambda run: run.opt.step()),
    "step, ordinary": (lambda run: run.due(False).backward(), lambda run: run.opt.step()),
    "step(closure), due": (lambda run: run.due(True), lambda run: run.opt.step(run.closure)),
    "step(closure), not due": (lambda run: run.due(False), lambda run: run.opt.step(run.closure)),
    "first step": (lambda run: None, lambda run: (run.backward(), run.opt.step())),
    "eval": (lambda run: run.due(False), lambda run: run.opt.eval()),
    "train": (lambda run: run.due(False).opt.eval(), lambda run: run.opt.train()),
    "averaged": (lambda run: run.due(False), lambda run: run.opt.averaged_state_dict(run.model)),
    "model in eval mode": (lambda run: run.due(False), lambda run: run.model.eval()(run.x[0])),
    "model.state_dict": (lambda run: run.due(True), lambda run: run.model.state_dict()),
    "state_dict": (lambda run: run.due(True), lambda run: run.opt.state_dict()),
    "load_state_dict": (lambda run: run.due(True), lambda run: run.opt.load_state_dict(run.saved)),
}


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """Python's own handler: a process that a shell put into the background ignores the signal."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


def prepared(case: str, call: str) -> Run:
    kind, options, followed = CASES[case]
    run = Run(kind, options, followed, steps=0 if call == "first step" else 3)
    if call == "load_state_dict":
        run.saved = Run(kind, options, followed, steps=5).opt.state_dict()
    CALLS[call][0](run)
    return run


def goes_on(run: Run) -> Any:
    """Where four more steps lead, the first of them again if it was interrupted."""
    run.model.train()
    run.opt.train()
    for _ in range(4):
        run.step()
    return run.snapshot()["weights"]


def try_points(row: Any, case: str, call: str, every: int, first: int = 0) -> None:
    done = prepared(case, call)
    before = done.snapshot()
    points = points_of(lambda: CALLS[call][1](done))
    after = done.snapshot()
    from_before, from_after = goes_on(prepared(case, call)), goes_on(done)
    for point in range(first % min(every, points), points, every):
        run = prepared(case, call)
        stopped, where = interrupted(lambda run=run: CALLS[call][1](run), point)
        if not where:  # caches of torch's are warm by now: it runs a little less than it did
            break
        here = f"{case}, {call}, point {point} of {points}, {where}"
        row.held(stopped, f"{here}: nothing was interrupted")
        now = run.snapshot()
        was = equal(now, before)
        row.held(was or equal(now, after), f"{here}: neither before nor after")
        kept = torch.is_grad_enabled() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        row.held(kept and not interrupts._waiting, f"{here}: grad mode or handler")
        torch.set_grad_enabled(True)
        if "load" not in call:  # the samples in a state are those of other weights: see the tests of loading
            row.held(equal(goes_on(run), from_before if was else from_after), f"{here}: training goes on otherwise")


@pytest.mark.parametrize("call", CALLS)
@EACH_CASE
def test_interrupts(tally, case, call):
    with tally("Ctrl-C at any point: whole, grad mode and handlers as they were, training goes on bit for bit") as row:
        # Other points for each.
        first = 37 * list(CALLS).index(call) + 101 * list(CASES).index(case)
        try_points(row, case, call, every=307 if case in QUICK else 29, first=first)
