"""Muon with layer-wise adaptive step sizes (Muon-LW)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lwas_fast.layers import Grouping
from lwas_fast.optimizer import LayerwiseOptimizer
from lwas_fast.options import Common
from lwas_fast.orthogonal import orthogonalized
from lwas_fast.rule import Here, Moving, Rule, bias_correction, each

if TYPE_CHECKING:
    from typing_extensions import Unpack

MEMORY = 0.99  # of a gradient's size, as AdamWLW's of its elements
LEAST = 2e-18  # above it, 0.01 of its square is normal in float32


class MuonRule(Rule):
    """Muon's direction for every tensor, decoupled weight decay.

    A direction that is measured along has singular values of one size. That of a step is longer or shorter, as the
    gradient is beside those of the last hundred steps: so is Newton's step along it, and averaged rates know it late.
    """

    name = "MuonLW"
    buffers_with_momentum = ("momentum_buffer",)
    buffers_schedule_free = ("offset", "momentum_buffer")
    cap_schedule_free, cap_with_momentum = 0.2, 0.1
    scalars = ("mean_square",)
    decoupled = whole = True
    max_fall = 10.0

    def share(self, group: dict[str, Any]) -> float:
        """See `Rule.share`."""
        return float(group["betas"][0])

    def persistence(self, group: dict[str, Any]) -> float:
        """See `Rule.persistence`: the norm of the weights that a direction gives the present and past gradients.

        Averaging shortens what gradients do not have in common by that factor, and orthogonalizing lengthens it again.
        So random steps, which the average makes alike, would add up to more than the measured ones.
        """
        beta = float(group["betas"][1])
        return math.sqrt((1 - beta**2) ** 2 + beta**4 * (1 - beta) / (1 + beta))

    def directions(self, group: dict[str, Any], here: Here) -> tuple[list[Tensor] | None, list[Tensor]]:
        """See `Rule.directions`."""
        momenta = [state["momentum_buffer"] for state in here.states]
        momenta = list(torch._foreach_lerp(momenta, here.gradients, 1 - group["betas"][1]))
        directions, _ = _ahead(group, here.gradients, momenta)
        torch._foreach_mul_(directions, here.factors)
        return here.gradients, directions

    def advance(self, group: dict[str, Any], states: list[dict[str, Any]], moving: Moving) -> list[Tensor]:
        """See `Rule.advance`."""
        momenta, known = ([state[name] for state in states] for name in ("momentum_buffer", "mean_square"))
        gradients = moving.taking_part(moving.gradients, momenta)
        changed = list(torch._foreach_lerp(momenta, gradients, 1 - group["betas"][1]))
        directions, sizes = _ahead(group, gradients, changed)
        squares = list(torch._foreach_lerp(known, torch._foreach_mul(sizes, sizes), 1 - MEMORY))
        roots = torch._foreach_sqrt(squares)
        torch._foreach_clamp_min_(roots, LEAST)
        torch._foreach_div_(sizes, roots)
        torch._foreach_mul_(sizes, each(bias_correction(moving.steps, MEMORY) ** 0.5, sizes))
        torch._foreach_mul_(directions, sizes)
        if moving.alive is not None:
            squares = [torch.where(n > 0, new, old) for n, new, old in zip(moving.alive, squares, known, strict=True)]
        # Last: what is above may run out of memory.
        torch._foreach_copy_(momenta, changed)
        torch._foreach_copy_(known, squares)
        moving.factors = -1.0
        return directions


def _ahead(
    group: dict[str, Any], gradients: Sequence[Tensor], momenta: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Nesterov's look ahead, orthogonalized, and the root mean square that it had."""
    return orthogonalized(torch._foreach_lerp(list(gradients), list(momenta), group["betas"][1]))


class MuonLW(LayerwiseOptimizer):
    """Muon whose step size is measured, layer by layer, instead of given.

    By default it is schedule-free. In the k-th step, with g the gradient at W:

        m ← β₂m + (1 − β₂)g
        u = β₂m + (1 − β₂)g
        q ← 0.99q + 0.01 mean(u²)
        d = −√(mean(u²) / q̂) orth(u)
        Z ← Z + r(d − γW)
        X ← X + (Z − X)/k
        W = β₁X + (1 − β₁)Z

    Z takes the steps, W is trained on, and X, the average of all Z, is evaluated (`eval`, `train`). With
    ``schedule_free=False`` d is the same, and:

        W ← (1 − rγ)W + rd

    orth makes all singular values of a matrix equal (`lwas_fast.orthogonal`). Every tensor goes through it: of a
    convolution's kernel the first dimension makes the rows, a vector is scaled to length √n, so there is no second
    optimizer for embeddings, biases and norms. q, a number a tensor, remembers the size of gradients; q̂ is corrected
    for its start at 0. r is the layer's rate, schedule-free times 1/√(1 − β₁ + β₁/k), bounded by ``cap``, and then
    times the norm of the weights that u gives to the gradients (0.76 with β₂ = 0.5), for successive directions are
    alike; γ is the decoupled weight decay.

    A step takes about 15 products of each matrix besides the update, which runs in plain torch: docs/costs.md. Tensors
    must be whole: with `fully_shard` take `AdamWLW`.

    Sources: Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon; Bahamou & Goldfarb, arXiv 2305.13664
    (rates); Defazio et al., arXiv 2405.15682 (schedule-free). Their combination, cap and growth limit are ours.

    Args:
        params: The model (best: see `follow`), its parameters, ``(name, parameter)`` pairs, or group dictionaries.
        lr: Dimensionless multiplier of every step, for schedulers; 1 means what was measured.
        betas: Share of the average in the weights that are trained on (with momentum: no effect), and decay of the
            gradient's average (Nesterov's momentum; Muon's usual 0.95 is far too long here), each in [0, 1).
        weight_decay: Decoupled decay; it is no part of the measured curvature.
        ramp_steps: Steps after warm-up over which measured rates grow linearly from 0 to full.
        cap: Most that a rate is to move a layer (schedule-free: its iterate) in a step, before `lr`, ramp and weight
            decay, as a share of the norm of its N weights, which counts as 0.01·√N at least. Default 0.2, with momentum
            0.1.
        warmup_rate: The rate in warm-up, and of layers never measured (there times the factor above).
        schedule_free: Whether to train schedule-free, or with momentum alone.
        **common: See `LayerwiseOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter cannot be optimized. In `step` and `backward`: a
            parameter is sharded.
    """

    rule = MuonRule()

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.5),
        weight_decay: float = 1e-2,
        *,
        ramp_steps: int = 0,
        cap: float | None = None,
        warmup_rate: float = 1e-3,
        schedule_free: bool = True,
        layers: Grouping = None,
        **common: Unpack[Common],
    ):
        own: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        own |= {"ramp_steps": ramp_steps, "cap": cap, "warmup_rate": warmup_rate, "schedule_free": schedule_free}
        super().__init__(params, own, layers, common)
