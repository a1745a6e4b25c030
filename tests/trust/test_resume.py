"""Runs that are stopped and resumed equal those that are not, bit for bit.

Catches: a number that a checkpoint lacks or rounds, an order of saving or loading that costs the average or the weights
to train on, a measurement or a random sign that moves to another step, a file that needs code to be read, one that only
the process that wrote it can go on from.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import ALL
from torch import nn
from trust import resume_cases
from trust.resume_cases import DTYPES, MODES, SAVES, Run, resume, same, save, stopped_and_whole

ROOT = Path(__file__).parents[2]
EQUAL = "resume at random steps, in any order of saving and loading: bits equal"
EACH = list(itertools.product(ALL, MODES, DTYPES, (None, True)))  # foreach=True is plain torch


def maker(kind, free, dtype, foreach, follows):
    return lambda: Run(kind, dtype, follows, {"schedule_free": free, "foreach": foreach})


def few(kind):
    """Every mode and dtype, by compiled code and plain torch, with a followed model and with parameters in turn."""
    return [case for i, case in enumerate(case for case in EACH if case[0] == kind) if i % 4 in (0, 3)]


@pytest.mark.parametrize("kind", ALL)
def test_stopped_runs_equal_whole_ones(kind, tally):
    drawn = random.Random(kind)
    with tally(EQUAL) as row:
        for i, case in enumerate(few(kind)):
            run, whole, said = stopped_and_whole(maker(*case, follows=i % 2 == 0), 60, 4, drawn)
            row.held(same(run, whole), f"{case}: {said}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_long_stopped_runs_equal_whole_ones(kind, tally):
    drawn = random.Random(f"long {kind}")
    with tally(EQUAL) as row:
        for case in (case for case in EACH if case[0] == kind):
            for follows in (True, False):
                run, whole, said = stopped_and_whole(maker(*case, follows=follows), 1000, 8, drawn)
                row.held(same(run, whole), f"{case}, follows={follows}: {said}")


class Once(torch.autograd.Function):
    """A function that cannot be differentiated twice, as kernels of one's own often cannot."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class OnceTanh(nn.Module):
    def forward(self, x):
        return Once.apply(x)


@pytest.mark.parametrize("kind", ALL)
def test_models_without_second_derivative(kind, tally, monkeypatch):
    """That a model has none is found out by a measurement that fails: a resumed run must know."""

    def net(dtype):
        return nn.Sequential(nn.Linear(3, 5), OnceTanh(), nn.Linear(5, 2)).to(dtype)

    def make():
        torch.manual_seed(0)
        return Run(kind, torch.float32, True, {})

    monkeypatch.setattr(resume_cases, "small_net", net)
    with tally(EQUAL) as row:
        for seed in range(3):
            run, whole, said = stopped_and_whole(make, 40, 2, random.Random(seed))
            row.held(same(run, whole) and whole.opt.measured_by == "replay", said)


@pytest.mark.parametrize("kind", ALL)
def test_a_resumed_run_waits_for_as_many_micro_batches(kind, tally):
    """Where accumulation changes, the window after a measured one decides in which step the next measurement is."""
    with tally(EQUAL) as row:
        for stop in (12, 20):
            run, whole = maker(kind, True, torch.float32, None, True)(), maker(kind, True, torch.float32, None, True)()
            run.train(0, stop)
            assert run.opt.param_groups[0]["last_refresh"] == 10 and 10 % 13 > 9  # measured in two micro-batches
            file, run = save(run, "model first"), maker(kind, True, torch.float32, None, True)()
            resume(run, file, True)
            run.train(stop, 30)
            whole.train(0, 30)
            row.held(same(run, whole), f"{kind}, stopped at {stop}")


class Blank(Run):
    """A run in which one batch has no gradient, when a measurement is due: it is to be made at the next step."""

    def loss(self, k):
        return super().loss(k) * (k != 20)


@pytest.mark.parametrize("kind", ALL)
def test_a_measurement_that_found_nothing_is_tried_again(kind, tally):
    def make():
        return Blank(kind, torch.float32, True, {"update_every": 5})

    with tally(EQUAL) as row:
        for stop, how in itertools.product((20, 21, 22), SAVES[:2]):
            run, whole = make(), make()
            run.train(0, stop)
            file, run = save(run, how), make()
            resume(run, file, True)
            run.train(stop, stop + 1)
            whole.train(0, stop + 1)
            row.held(same(run, whole), f"{kind}, stopped at {stop}, {how}")


def started(case, tmp_path, name, **given):
    """A process that trains this case, and the file of its checkpoints."""
    kind, free, dtype, foreach, follows = case
    given = {"kind": kind, "dtype": str(dtype).split(".")[1], "follows": follows, "steps": 30, "every": 30} | given
    given |= {"options": {"schedule_free": free, "foreach": foreach}, "how": "model first", "model_first": True} | given
    (tmp_path / f"{name}.json").write_text(json.dumps(given))
    code = "import runpy, sys; sys.path[:0] = [sys.argv[1]]; sys.argv = sys.argv[2:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = [ROOT / "tests", ROOT / "tests" / "trust" / "resume_process.py", tmp_path / f"{name}.json"]
    return subprocess.Popen([sys.executable, "-c", code, *map(str, script)], cwd=ROOT), tmp_path / f"{name}.pt"


def test_another_process_goes_on(tally, tmp_path):
    """One process: fresh interpreters differ in nothing that a case would add."""
    case = ("adamw", True, torch.float32, None, True)
    run, whole = (maker(*case)() for _ in range(2))
    run.train(0, 14)
    (tmp_path / "run.pt").write_bytes(save(run, "evaluated"))
    process, file = started(case, tmp_path, "run")
    assert process.wait(timeout=300) == 0
    run = maker(*case)()
    resume(run, file.read_bytes(), True)
    whole.train(0, 30)
    with tally("resume in another process: bits equal") as row:
        row.held(same(run, whole), case)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("kind", ALL)
def test_killed_while_it_saves(kind, tally, tmp_path):
    """Killed at any time: the last whole checkpoint is there, and what goes on from it equals an unbroken run."""
    drawn = random.Random(f"kill {kind}")
    with tally("SIGKILL while checkpoints are written, three times a run: bits equal") as row:
        for i, case in enumerate(few(kind)):
            follows, how, steps = i % 2 == 0, drawn.choice(SAVES), 400
            given = {"steps": steps, "every": 1, "how": how, "model_first": drawn.random() < 0.5}
            for _ in range(3):
                process, file = started((*case, follows), tmp_path, f"killed{i}", **given)
                seen, deadline = file.stat().st_mtime_ns if file.exists() else 0, time.monotonic() + 120
                while not (file.exists() and file.stat().st_mtime_ns > seen) and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(drawn.random() * 0.5)
                process.send_signal(signal.SIGKILL)
                process.wait()
            run, whole = (maker(*case, follows=follows)() for _ in range(2))
            resume(run, file.read_bytes(), given["model_first"])
            reached = run.opt.param_groups[0]["steps"]
            run.train(reached, reached + 20)
            whole.train(0, reached + 20)
            row.held(0 < reached <= steps and same(run, whole), f"{case}, follows={follows}, {how}, at {reached}")
