"""A compiled model: nothing to do but to give the optimizer the model.

    python examples/compiled_model.py

Compiled code has no second derivative, so steps that measure run the module as it is; the others run what was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lwas_fast import AdamWLW


def train(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], compile: Callable[[nn.Module], nn.Module] | None
) -> list[float]:
    """Train; return the loss of each step.

    Args:
        model: Gives logits.
        batches: Inputs and labels.
        compile: ``torch.compile``, or None.
    """
    model = model if compile is None else compile(model)
    opt = AdamWLW(model)
    losses = []
    for x, y in batches:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train a small network both ways and compare."""
    torch.manual_seed(0)
    data = [(x, x[:, :10].argmax(1)) for x in torch.randn(100, 64, 100)]
    for name, compile in (("eager   ", None), ("compiled", torch.compile)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(100, 256), nn.ReLU(), nn.Linear(256, 10))
        print(name, f"last loss {train(model, data, compile)[-1]:.6f}")


if __name__ == "__main__":
    main()
