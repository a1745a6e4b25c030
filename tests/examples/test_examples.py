"""The examples do what they say.

Catches: a step that is lost, taken twice or measured on stale gradients when ordinary steps are compiled or captured; a
run of several processes whose ranks part, that leaves measurements out, or whose checkpoint is not what was saved.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def problem(device: str, steps: int):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 4)).to(device)
    data = [(torch.randn(16, 10, device=device), torch.randint(0, 4, (16,), device=device)) for _ in range(steps)]
    return model, data


def test_compiled_model():
    import compiled_model

    found = []
    for compile in (None, lambda model: torch.compile(model, backend="aot_eager")):
        found.append(compiled_model.train(*problem("cpu", 25), compile))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_log_rates(tmp_path):
    import csv

    import log_rates

    log_rates.main(tmp_path, steps=41)
    rows = list(csv.DictReader(open(tmp_path / "rates.csv")))
    assert [int(row["step"]) for row in rows] == [0, 20, 40]
    assert {"loss", "applied/0", "applied/2", "measurements", "share_capped"} <= set(rows[0])
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_distributed(options, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launcher, "examples.distributed", "--steps", "122", "--every", "1", "--folder", tmp_path, *options]
    env = {name: value for name, value in os.environ.items() if name != "LWAS_FAST_DATA"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"^step +\d+, loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 122 and sum(losses[-10:]) < 0.9 * sum(losses[10:20])
    saved, loaded = re.search(r"^validation loss ([\d.]+), of the checkpoint ([\d.]+)$", done.stdout, re.M).groups()
    assert saved == loaded
    assert float(re.findall(r"^validation loss ([\d.]+)$", done.stdout, re.MULTILINE)[-1]) < float(saved)
    assert "measurements: 13 due, 13 taken; rates equal on 2 ranks: True" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(("schedule_free", "tolerance"), [(False, 1e-5), (True, 1e-2)])  # see the example on the gain
def test_cuda_graph(schedule_free, tolerance):
    import cuda_graph

    (eager_model, data), (model, _) = problem("cuda", 135), problem("cuda", 135)
    eager = cuda_graph.train(eager_model, data, captured=False, schedule_free=schedule_free)
    captured = cuda_graph.train(model, data, captured=True, schedule_free=schedule_free)
    torch.testing.assert_close(torch.stack(captured), torch.stack(eager), rtol=tolerance, atol=tolerance / 10)
    for one, other in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance / 10)
