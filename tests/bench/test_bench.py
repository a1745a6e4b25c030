"""The benchmarks run and say what they measured.

Catches: a benchmark that no longer fits the package; a ratio that is not the one of the medians; a report that leaves
rows out; a machine's name in the JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: object) -> str:
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300, env=wide
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def benchmarks(out: Path, file: str, choice: str) -> list[dict]:
    run("-m", "pytest", f"bench/{file}", "-q", "-p", "no:cacheprovider", "-k", choice, f"--benchmark-json={out}")
    content = json.loads(out.read_text())
    assert "node" not in content["machine_info"]
    assert content["machine_info"]["lwas_fast"]["torch"]
    assert content["benchmarks"]
    return content["benchmarks"]


@pytest.mark.parametrize(
    ("file", "choice"),
    [("test_update.py", "1000 and SGD and fused and float32 and whole"), ("test_rates.py", "1000")],
)
def test_a_benchmark_and_its_report(tmp_path, file, choice):
    out = tmp_path / "out.json"
    found = [b for b in benchmarks(out, file, choice) if "ratio" in b["extra_info"]]
    report = run("bench/report.py", out)
    assert found
    for benchmark in found:
        info = benchmark["extra_info"]
        assert info["ratio"] == pytest.approx(benchmark["stats"]["median"] / info["theirs_median"])
        assert info["tensors"] == 1000
        assert f"{info['ratio']:.2f} (" in report


@pytest.mark.parametrize(("file", "choice"), [("test_step.py", "MLP and AdamW"), ("test_scaling.py", "256 and AdamW")])
def test_whole_steps_their_table_and_their_picture(tmp_path, file, choice):
    """The mean lies between the two kinds of steps that it is made of, as often as the schedule has them."""
    out = tmp_path / "out.json"
    found = benchmarks(out, file, choice)
    report = run("bench/report.py", out)
    for benchmark in found:
        info = benchmark["extra_info"]
        share = info["refreshes"] / 500
        assert info["refreshes"] == 28
        mean = info["ratio"] + share * (info["ratio_measuring"] - info["ratio"])
        assert info["ratio_mean"] == pytest.approx(mean)
        assert info["by_interval"]["1"] == pytest.approx(info["ratio_measuring"])
        assert f"/ {info['ratio_mean']:.2f}" in report
        assert set(info["parts"]) == {"forward and backward", "curvature", "rates", "update"}
        assert info["peak_bytes"] >= 4 * info["parameters"]  # the gradients
        assert info["peak_bytes"] == pytest.approx(info["theirs_peak_bytes"], rel=0.05)
    run("bench/draw.py", out, "--out", tmp_path)
    assert next(tmp_path.glob("*.png")).stat().st_size > 10_000
