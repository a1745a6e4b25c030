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
    # pytest-benchmark, which runs there, measures nothing in what looks like a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["COLUMNS"] = "200"
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Benchmarks:
    """Those chosen by pytest's words, run; what their JSON says, their report, and their picture."""

    def __init__(self, folder: Path, choice: str):
        out = folder / "out.json"
        run("-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-k", choice, f"--benchmark-json={out}")
        self.content = json.loads(out.read_text())
        self.report = run("bench/report.py", out)
        run("bench/draw.py", out, "--out", folder)
        self.pictures = [*folder.glob("*.png")]

    def of(self, file: str) -> list[dict]:
        rows = [b for b in self.content["benchmarks"] if b["fullname"].startswith(f"bench/test_{file}.py")]
        assert rows
        return rows


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Benchmarks:
    """A few of each file, in one run."""
    update = "(test_update and 1000 and SGD and default and float32 and whole)"
    plain = "(test_plain and 1000 and SGD and momentum)"
    choice = f"{update} or {plain} or (test_rates and 1000) or (test_step and MLP and AdamW)"
    return Benchmarks(tmp_path_factory.mktemp("bench"), choice)


def test_of_the_machine_the_versions_and_not_the_name(benchmarks):
    machine = benchmarks.content["machine_info"]
    assert "node" not in machine
    assert machine["lwas_fast"]["torch"]


@pytest.mark.parametrize("file", ["update", "plain", "rates"])
def test_a_benchmark_and_its_report(benchmarks, file):
    found = [b for b in benchmarks.of(file) if "ratio" in b["extra_info"]]
    assert found
    for benchmark in found:
        info = benchmark["extra_info"]
        assert info["ratio"] == pytest.approx(benchmark["stats"]["median"] / info["theirs_median"])
        assert info["tensors"] == 1000
        assert f"{info['ratio']:.2f} (" in benchmarks.report


def whole_steps(benchmarks: Benchmarks, file: str) -> None:
    """The mean lies between the two kinds of steps that it is made of, as often as the schedule has them."""
    for benchmark in benchmarks.of(file):
        info = benchmark["extra_info"]
        share = info["refreshes"] / 500
        assert 28 <= info["refreshes"] <= 30  # two more tries, should so small a model reach a loss of 0
        mean = info["ratio"] + share * (info["ratio_measuring"] - info["ratio"])
        assert info["ratio_mean"] == pytest.approx(mean)
        assert info["by_interval"]["1"] == pytest.approx(info["ratio_measuring"])
        assert f"/ {info['ratio_mean']:.2f}" in benchmarks.report
        assert set(info["parts"]) == {"forward and backward", "curvature", "rates", "update"}
        assert info["peak_bytes"] >= 4 * info["parameters"]  # the gradients
        assert info["peak_bytes"] == pytest.approx(info["theirs_peak_bytes"], rel=0.05)
    (picture,) = benchmarks.pictures
    assert picture.stat().st_size > 10_000


def test_whole_steps_their_table_and_their_picture(benchmarks):
    whole_steps(benchmarks, "step")


@pytest.mark.slow
def test_scaling_its_table_and_its_picture(tmp_path):
    whole_steps(Benchmarks(tmp_path, "test_scaling and 256 and AdamW"), "scaling")
