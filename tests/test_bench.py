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

ROOT = Path(__file__).parents[1]


def test_update_benchmark_and_its_report(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "bench/test_update.py", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "1000 and SGD and fused and float32 and whole", f"--benchmark-json={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert "node" not in content["machine_info"]
    assert content["machine_info"]["lwas_fast"]["torch"]
    found = content["benchmarks"]
    assert found
    for benchmark in found:
        info = benchmark["extra_info"]
        assert info["ratio"] == pytest.approx(benchmark["stats"]["median"] / info["theirs_median"])
        assert info["tensors"] == 1000
    wide = os.environ | {"COLUMNS": "200"}
    report = subprocess.run(
        [sys.executable, "bench/report.py", out], cwd=ROOT, capture_output=True, text=True, timeout=100, env=wide
    )
    assert report.returncode == 0, report.stderr
    for benchmark in found:
        assert f"{benchmark['extra_info']['ratio']:.2f} (" in report.stdout
