"""A compiled model: ordinary steps through the compiled module, steps that measure through the plain one.

    python examples/compiled_model.py

Compiled modules have no second derivative. Either the steps that measure go through the module itself, as here (its
parameters are the same), or curvature comes from differences of gradients, `opt.step(closure)` or
`hvp="finite_difference"`, and then everything is compiled.
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
    fast = model if compile is None else compile(model)
    opt = AdamWLW(model.named_parameters())  # names of the plain module: the compiled one's all begin with _orig_mod
    losses = []
    for x, y in batches:
        opt.zero_grad()
        logits = (model if opt.curvature_due else fast)(x)
        loss = F.cross_entropy(logits, y)
        opt.backward(loss)
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
