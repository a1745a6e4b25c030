"""bench/gpu.sh does not waste a rare run: its logic, with a Python that only notes what it is asked.

Catches: a stage's failure or time-out ending the run, a status that is not told, a typo in a command, a stage left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHORT = ["build", "tests", "update", "step", "sanitizer", "rates", "training"]
STAGES = [*SHORT, "step_rest", "profile", "scaling", "quality"]

FAKE = """#!/usr/bin/env bash
[ "$1" = - ] && exec {python} "$@"
echo "$@" >>"{calls}"
case "$*" in *"$FAIL"*) exit 3 ;; *"$HANG"*) sleep 60 ;; esac
"""


def run(
    tmp_path: Path, *stages: str, fail: str = "nothing", hang: str = "nothing", **variables: str
) -> tuple[int, list[str], dict]:
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
        env=os.environ | environment | variables,
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
        "-m gpu and not slow tests/update",
        "tests/rates/test_rates.py",
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
    # All that there is comes back in one file.
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as archive:
        assert {f"stages/{stage}.log" for stage in STAGES} <= set(archive.getnames())


def test_a_stage_that_fails_or_hangs_stops_nothing(tmp_path):
    """Of the stages that were chosen, no other runs."""
    code, _, summary = run(tmp_path, "tests", "update", "rates", fail="-m gpu and", hang="bench/test_update.py")
    assert code == 1
    assert [(s["stage"], s["status"]) for s in summary["stages"]] == [("tests", 3), ("update", 124), ("rates", 0)]


def test_what_no_time_is_left_for_is_told(tmp_path):
    code, calls, summary = run(tmp_path, "short", WITHIN="6", LIMIT="100")
    assert code == 1
    assert [s["stage"] for s in summary["stages"]] == SHORT
    assert {s["status"] for s in summary["stages"]} == {125}
    assert not calls


def test_a_stage_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    assert run(tmp_path, "build", "udpate") == (2, [], {})
