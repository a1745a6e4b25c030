"""Muon for the hidden weights, AdamW for the rest, as one optimizer with one rate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.quality.models import CharTransformer

STACKED = {"qkv.weight": 3, "weight_ih_l0": 4, "weight_hh_l0": 4}  # matrices in one parameter, of attention and LSTM


def output_layer(model: nn.Module) -> nn.Module | None:
    """The last linear layer; a CharTransformer's output is its embedding."""
    if isinstance(model, CharTransformer):
        return None
    return next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)


def hidden_matrices(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Weights of linear, convolutional and LSTM layers but the output's, each with how many matrices it holds."""
    last = output_layer(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LSTM) and module is not last:
            for name, parameter in module.named_parameters(path, recurse=False):
                if parameter.ndim > 1:
                    counts = (count for end, count in STACKED.items() if name.endswith(end))
                    yield parameter, next(counts, 1)


def pieces(tensor: Tensor, count: int) -> list[Tensor]:
    """A weight, or its gradient, as matrices that share its memory; a kernel has a row for each channel it makes."""
    return list(tensor.view(len(tensor), -1).chunk(count))


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon for hidden weights, torch.optim.AdamW for embeddings, the output layer, biases and norms.

    Muon takes matrices only: convolution kernels go to it flattened, and queries, keys and values, and an LSTM's
    gates, each by itself. The first layer counts as hidden unless it is an embedding. Muon's updates are scaled to the
    size of AdamW's (`match_rms_adamw`), so both have one rate and one weight decay, decoupled.

    Args:
        model: What it trains.
        lr: Of both.
        weight_decay: Of both.
        momentum: Muon's.
        betas: AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self.hidden = list(hidden_matrices(model))
        held = {id(parameter) for parameter, _ in self.hidden}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in held]
        groups = [{"params": some} for some in ([parameter for parameter, _ in self.hidden], rest) if some]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.matrices = [pieces(p.detach(), count) for p, count in self.hidden]
        self.inner: list[Optimizer] = []
        if self.hidden:
            views = [view for of_one in self.matrices for view in of_one]
            scaled = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            self.inner.append(torch.optim.Muon(views, lr, weight_decay, **scaled))
        if rest:
            self.inner.append(torch.optim.AdamW(rest, lr, betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move all weights at their groups' rates, which a scheduler may have set."""
        for (parameter, count), views in zip(self.hidden, self.matrices, strict=True):
            for view, gradient in zip(views, pieces(parameter.grad, count), strict=True):
                view.grad = gradient
        for group, optimizer in zip(self.param_groups, self.inner, strict=True):
            optimizer.param_groups[0]["lr"] = group["lr"]
            optimizer.step()
