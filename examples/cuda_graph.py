"""Ordinary steps as one CUDA graph: forward, backward and update in a single launch, measurements in between as usual.

    python examples/cuda_graph.py

Between two measurements nothing of a step depends on the host, so it can be captured once and replayed. What has to be
kept in mind: batches are copied into the tensor that was captured, a replay does not count as a step by itself, and
`lr`, if a scheduler is to act on it, must be a tensor on the device. Other hyperparameters are captured as they are,
and so is the gain of a schedule-free step over the measured one: after a hundred steps it changes by less than a
hundredth from one measurement, and so one capture, to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lwas_fast import AdamWLW

SETTLED = 100  # steps before the first capture


def train(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], captured: bool = True, **options: Any
) -> list[Tensor]:
    """Train on the model's device; batches are all of one size.

    Args:
        model: On a CUDA device.
        batches: Inputs and labels, there too.
        captured: Whether ordinary steps are replayed from a graph.
        **options: AdamWLW's.

    Returns:
        The loss of each step, on the device.
    """
    opt = AdamWLW(model.named_parameters(), **options)
    graph: torch.cuda.CUDAGraph | None = None
    losses, inputs, labels, static_loss = [], torch.empty(0), torch.empty(0), torch.empty(0)
    for x, y in batches:
        early = opt.param_groups[0]["steps"] < SETTLED
        if opt.curvature_due or early or not captured:
            opt.zero_grad()
            loss = opt.backward(F.cross_entropy(model(x), y))
            opt.step()
            losses.append(loss.clone())
            graph = None  # the next is captured anew
            continue
        if graph is None:  # after a step or more, so that all state exists and cuDNN has chosen
            inputs, labels = x.clone(), y.clone()
            graph = torch.cuda.CUDAGraph()
            opt.zero_grad()  # so that the graph makes gradients of its own
            with torch.cuda.graph(graph):
                static_loss = F.cross_entropy(model(inputs), labels)
                static_loss.backward()
                opt.step()
            for group in opt.param_groups:
                group["steps"] -= 1  # capturing took no step
        inputs.copy_(x)
        labels.copy_(y)
        graph.replay()
        for group in opt.param_groups:
            group["steps"] += 1
        losses.append(static_loss.detach().clone())
    return losses


def main() -> None:
    """Train a small network both ways and compare."""
    device = torch.device("cuda")
    inputs = torch.randn(300, 64, 100, device=device)
    data = [(x, x[:, :10].argmax(1)) for x in inputs]
    for captured in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(100, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
        losses = train(model, data, captured)
        print("captured" if captured else "eager   ", f"last loss {losses[-1].item():.6f}")


if __name__ == "__main__":
    main()
