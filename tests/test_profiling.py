"""Ranges for profilers.

Catches: a range that is missing, nested wrongly or not switched off; a profile script or a picture that breaks.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lwas_fast import AdamWLW, profiling

ROOT = Path(__file__).parents[1]
NAMES = ["lwas::curvature", "lwas::rates", "lwas::update"]


def ranges_of(opt, step) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(opt)
    events = sorted(profile.events(), key=lambda e: e.time_range.start)
    return [e.name for e in events if e.name.startswith("lwas::")]


def by_autograd(opt):
    weight = opt.param_groups[0]["params"][0]
    opt.zero_grad()
    opt.backward(weight.square().sum())
    opt.step()


def by_closure(opt):
    def closure():
        opt.zero_grad()
        loss = opt.param_groups[0]["params"][0].square().sum()
        loss.backward()
        return loss

    opt.step(closure)


@pytest.mark.parametrize("step", [by_autograd, by_closure])
def test_ranges(step):
    opt = AdamWLW([torch.ones(3, requires_grad=True)], update_every=2)
    profiling.annotate()
    try:
        assert ranges_of(opt, step) == NAMES
        assert ranges_of(opt, step) == NAMES[2:]  # no measurement
    finally:
        profiling.annotate(False)
    assert ranges_of(opt, step) == []
    assert profiling.span("update") is profiling.span("rates")  # free: one object that does nothing


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_switches_them_on(value, on, monkeypatch):
    monkeypatch.delenv("LWAS_FAST_RANGES", raising=False)
    if value is not None:
        monkeypatch.setenv("LWAS_FAST_RANGES", value)
    anew = runpy.run_path(profiling.__file__)  # as a process that starts would
    assert (anew["span"]("x") is not anew["_NOTHING"]) == on


def test_the_profile_script_without_nsys(tmp_path):
    """Its trace has the ranges of every step, and its picture is drawn."""
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    command = [ROOT / "bench/profile_nsys.sh", "MLP", "--steps", "4", "--draw", tmp_path / "trace.png"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert names.count("step") == names.count("lwas::update") == 4 and names.count("lwas::curvature") == 2
    assert "lwas::rates" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "trace.png").stat().st_size > 5000
