"""bench/gpu.sh does not waste a rare run: its logic, with a Python that only notes what it is asked.

Catches: a stage's failure or time-out ending the run, a status that is not told, a typo in a command, a stage left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = ["build", "tests", "update", "rates", "step", "scaling", "profile", "sanitizer", "quality"]

FAKE = """#!/usr/bin/env bash
[ "$1" = - ] && exec {python} "$@"
echo "$@" >>"{calls}"
case "$*" in *"$FAIL"*) exit 3 ;; *"$HANG"*) sleep 60 ;; esac
"""


def run(tmp_path: Path, *stages: str, fail: str = "nothing", hang: str = "nothing") -> tuple[int, list[str], dict]:
    calls, out = tmp_path / "calls", tmp_path / "out"
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python", "compute-sanitizer"):
        (tools / name).write_text(FAKE.format(python=sys.executable, calls=calls))
        (tools / name).chmod(0o755)
    environment = {"OUT": str(out), "PYTHON": str(tools / "python"), "LIMIT": "2", "FAIL": fail, "HANG": hang}
    environment["PATH"] = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *stages],
        env=os.environ | environment,
        capture_output=True,
        timeout=100,
    )
    summary = json.loads((out / "summary.json").read_text()) if (out / "summary.json").exists() else {}
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], summary


def test_all_stages_run_and_are_told(tmp_path):
    status, calls, summary = run(tmp_path)
    assert status == 0
    assert [s["stage"] for s in summary["stages"]] == STAGES
    assert {s["status"] for s in summary["stages"]} == {0}
    assert summary["environment"]["torch"]
    for words in (
        "pip install -v -e .",
        "pytest tests -m gpu",
        "bench/test_update.py",
        "bench/test_rates.py",
        "bench/test_step.py",
        "memcheck",
        "racecheck",
    ):
        assert any(words in call for call in calls), words
    # What the commands name is there.
    for call in calls:
        for word in call.split():
            if word.startswith(("bench/", "tests")):
                assert (ROOT / word).exists(), word


def test_a_stage_that_fails_or_hangs_stops_nothing(tmp_path):
    """Of the stages that were chosen, no other runs."""
    code, _, summary = run(tmp_path, "tests", "update", "rates", fail="pytest tests", hang="bench/test_update.py")
    assert code == 1
    assert [(s["stage"], s["status"]) for s in summary["stages"]] == [("tests", 3), ("update", 124), ("rates", 0)]


def test_a_stage_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    assert run(tmp_path, "build", "udpate") == (2, [], {})
