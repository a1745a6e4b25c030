"""The average of a run's last weights.

Catches: weights that enter with another share than documented, a first update that keeps the initial weights, the model
itself changed, a share out of range.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lwas_fast import averaged


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_shares(share):
    """Against the definition; at share 1 it is the mean."""
    model = nn.Linear(2, 1, bias=False).double()
    average = averaged(model, share)
    expected, seen = torch.zeros(1, 2, dtype=torch.float64), []
    for n in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        average.update_parameters(model)
        seen.append(model.weight.detach().clone())
        expected += (seen[-1] - expected) / (1 + n * share)
        torch.testing.assert_close(average.module.weight, expected)
        assert torch.equal(model.weight, seen[-1])
    if share == 1.0:
        torch.testing.assert_close(expected, torch.stack(seen).mean(0))
    x = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(average(x), x @ expected.T)


def test_its_memory_grows_with_the_run():
    """Of a ramp the average lags by about the share: the mean of a window that is a share of the run."""
    model = nn.Linear(1, 1, bias=False).double()
    average = averaged(model, 0.1)
    for n in range(2000):
        with torch.no_grad():
            model.weight.fill_(float(n))
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(2000 * (1 - 0.1 / 1.1), rel=2e-2)


@pytest.mark.parametrize("share", [0.0, -1, 1.5, float("nan")])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match="share="):
        averaged(nn.Linear(1, 1), share)
