"""The examples do what they say.

Catches: a step that is lost, taken twice or measured on stale gradients when ordinary steps are compiled or captured.
"""

from __future__ import annotations

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
