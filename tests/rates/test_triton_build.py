"""What can be proved of the Triton kernels where no GPU is: they compile for GPUs, and well; and nothing needs them.

Catches: spilled registers, full chunks that are loaded number by number, an arrival that publishes nothing, a language
feature that a supported Triton lacks, training that breaks where Triton is absent or broken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHITECTURES = (80, 90, 100)
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_compile_for_gpus():
    pytest.importorskip("triton")
    told = run("-m", "tests.rates.compile_rates", *map(str, ARCHITECTURES))
    lines = [json.loads(line) for line in told.splitlines()]
    assert len(lines) == 4 * len(ARCHITECTURES)
    for line in lines:
        print(line)
        assert line["spilled"] == 0
        # Eight numbers a thread: of float32 (directions, a third of the rest) two loads, of the halves one.
        # Three versions of the whole chunk, each with direction and product, more if unrolled.
        assert line["vector_loads"] >= 10 + 4 * line["with_gradient"]
        assert line["published"] and line["fresh"]
        assert line["registers"] <= 65536 // (256 * 2)  # two programs or more share a multiprocessor


def test_training_needs_no_triton():
    """Where the device would be one for Triton and it is absent or broken, that is told and torch serves."""
    code = """
import sys, types
import torch
from lwas_fast import AdamWLW
from lwas_fast.rates import launch
model = torch.nn.Linear(3, 2)
opt = AdamWLW(model.named_parameters(), update_every=1)  # torch imports its compiler here, which wants a whole Triton
for triton in (None, types.ModuleType("triton"), types.SimpleNamespace(__version__="9.9")):
    sys.modules["triton"] = triton
    launch._fails.cache_clear()
    reason = launch._fails(torch.device("cuda", 0))
    assert reason and "Triton" in reason, reason
    for _ in range(3):
        opt.zero_grad()
        opt.backward(model(torch.randn(4, 3)).square().mean())
        opt.step()
assert all(row["refreshes"] == 9 for row in opt.diagnostics().values())
"""
    run("-c", code)
