"""What a training run's mean step costs against a model's width and depth, and against torch's fused optimizers.

The check that the method asks for: one layer of more and more columns, and the same number of parameters in more
and more layers. Time should grow with the parameters as torch's does, and hardly with the number of layers. Ours is the
mean over the default schedule's first 500 steps, from steps with and without a measurement (see test_step.py).

    pytest bench/test_scaling.py --benchmark-json=out.json && python bench/draw.py out.json
"""

from __future__ import annotations

import pytest
import torch
from models import Problem
from test_step import CUDA, compare
from torch import nn

WIDTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DEPTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
BATCH, ROWS, PARAMETERS = 32, 64, 2_000_000


def wide(columns: int, device: str) -> Problem:
    """One layer of 64 x columns."""
    model, x = nn.Linear(columns, ROWS).to(device), torch.randn(BATCH, columns, device=device)
    return Problem(model, lambda: model(x).square().mean())


def deep(layers: int, device: str) -> Problem:
    """Square layers of two million parameters together, with a nonlinearity between."""
    width = round((PARAMETERS / layers) ** 0.5)
    blocks = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.Tanh())]
    model, x = nn.Sequential(*blocks).to(device), torch.randn(BATCH, width, device=device)
    return Problem(model, lambda: model(x).square().mean())


CASES = [("width", wide, n) for n in WIDTHS] + [("depth", deep, n) for n in DEPTHS]


@pytest.mark.parametrize("rule", ("AdamW", "SGD-m"))
@pytest.mark.parametrize(("axis", "make", "size"), CASES, ids=[f"{axis}-{n}" for axis, _, n in CASES])
def test_scaling(benchmark, device, monkeypatch, axis, make, size, rule):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so many layers are too small for two
    torch.set_flush_denormal(True)  # gradients vanish over hundreds of them, and tiny numbers are slow
    try:
        compare(benchmark, monkeypatch, lambda: make(size, device), rule, "autograd", pairs=60 if CUDA else 40)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    benchmark.extra_info.update(axis=axis, size=size, workload=f"{axis} {size}")
