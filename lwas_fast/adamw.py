"""AdamW with layer-wise adaptive step sizes (AdamW-LW)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lwas_fast.layers import Grouping
from lwas_fast.optimizer import LayerwiseOptimizer
from lwas_fast.options import Common
from lwas_fast.rule import Here, Moving, Rule, bias_correction, each

if TYPE_CHECKING:
    from typing_extensions import Unpack

LEAST_EPS = 1e-30  # less than that has no finite inverse; the least gradient whose square is not 0 is above 1e-23


def _denominators(second: Sequence[Tensor], scales: Tensor | float, group: dict[str, Any]) -> list[Tensor]:
    """The root of the bias-corrected second moments, plus eps; all of that times `scales`, the correction's root."""
    found = list(torch._foreach_sqrt(list(second)))
    eps = max(group["eps"], LEAST_EPS) * scales
    torch._foreach_add_(found, each(eps, second) if isinstance(eps, Tensor) else eps)
    return found


class AdamWRule(Rule):
    """Adam's direction, decoupled weight decay."""

    name = "AdamWLW"
    buffers_with_momentum = ("exp_avg", "exp_avg_sq")
    buffers_schedule_free = ("offset", "exp_avg_sq")
    cap_schedule_free, cap_with_momentum = 0.2, 0.1
    decoupled = normalizes = True
    max_fall = 10.0  # a flat start is made good by a few measurements
    operator = "adamw_step"

    def share(self, group: dict[str, Any]) -> float:
        """See `Rule.share`."""
        return float(group["betas"][0])

    def directions(self, group: dict[str, Any], here: Here) -> tuple[list[Tensor] | None, list[Tensor]]:
        """See `Rule.directions`."""
        gradients, beta2 = here.gradients, group["betas"][1]
        squares = torch._foreach_mul(gradients, gradients)
        second = torch._foreach_lerp([state["exp_avg_sq"] for state in here.states], squares, 1 - beta2)
        del squares
        scales = bias_correction(here.steps, beta2).sqrt()
        directions = list(torch._foreach_div(gradients, _denominators(second, scales, group)))
        del second
        torch._foreach_mul_(directions, each(scales, directions))
        torch._foreach_mul_(directions, here.factors)
        return gradients, directions

    def advance(self, group: dict[str, Any], states: list[dict[str, Any]], moving: Moving) -> list[Tensor]:
        """See `Rule.advance`."""
        beta1, beta2 = group["betas"]
        second = [state["exp_avg_sq"] for state in states]
        changed = moving.to_change(second)
        torch._foreach_mul_(changed, beta2)
        torch._foreach_addcmul_(changed, moving.gradients, moving.gradients, value=1 - beta2)
        moving.settle(second, changed, second)
        scales = bias_correction(moving.steps, beta2) ** 0.5
        denominators = _denominators(second, scales, group)
        ascent, moving.factors = moving.gradients, -scales
        if not group["schedule_free"]:
            moving.factors = -scales / bias_correction(moving.steps, beta1)
            ascent = [state["exp_avg"] for state in states]
            torch._foreach_lerp_(ascent, moving.taking_part(moving.gradients, ascent), 1 - beta1)
        torch._foreach_reciprocal_(denominators)  # in place, for to allocate costs more than to compute
        torch._foreach_mul_(denominators, ascent)
        return denominators

    def numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """See `Rule.numbers`."""
        return (*group["betas"], group["eps"], group["weight_decay"])


class AdamWLW(LayerwiseOptimizer):
    """AdamW whose step size is measured, layer by layer, instead of given.

    By default it is schedule-free. In the k-th step, with g the gradient at W:

        v ← β₂v + (1 − β₂)g²
        d = −g / (√v̂ + ε)
        Z ← Z + r(d − γW)
        X ← X + (Z − X)/k
        W = β₁X + (1 − β₁)Z

    Z takes the steps, W is trained on, and X, the average of all Z, is evaluated (`eval`, `train`). With
    ``schedule_free=False`` it is AdamW:

        m ← β₁m + (1 − β₁)g
        d = −m̂ / (√v̂ + ε)
        W ← (1 − rγ)W + rd

    r is the layer's rate, bounded by ``cap``, and schedule-free times 1/√(1 − β₁ + β₁/k); γ is the decoupled weight
    decay; v̂ and m̂ are corrected for their start at 0.

    Sources: Bahamou & Goldfarb, arXiv 2305.13664 (AdamW-LW); Defazio et al., arXiv 2405.15682 (schedule-free).
    Their combination, cap and growth limit are ours.

    Args:
        params: The model (best: see `follow`), its parameters, ``(name, parameter)`` pairs, or group dictionaries.
        lr: Dimensionless multiplier of every step, for schedulers; 1 means what was measured.
        betas: Share of the average in the weights that are trained on (with momentum: decay of the gradient's average),
            and decay of the average of the gradient's square, shorter than torch's 0.999, so that a burst of gradients
            does not hold a layer's direction down for a thousand steps; each in [0, 1).
        eps: Added to the denominator; greater than 0.
        weight_decay: Decoupled decay; it is no part of the measured curvature.
        ramp_steps: Steps after warm-up over which measured rates grow linearly from 0 to full.
        cap: Most that a rate is to move a layer (schedule-free: its iterate) in a step, before `lr`, ramp and weight
            decay, as a share of the norm of its N weights, which counts as 0.01·√N at least. Default 0.2, with momentum
            0.1.
        warmup_rate: The rate in warm-up and of layers never measured.
        schedule_free: Whether to train schedule-free, or with momentum.
        **common: See `LayerwiseOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter cannot be optimized.
    """

    rule = AdamWRule()

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ramp_steps: int = 0,
        cap: float | None = None,
        warmup_rate: float = 1e-3,
        schedule_free: bool = True,
        layers: Grouping = None,
        **common: Unpack[Common],
    ):
        own: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"ramp_steps": ramp_steps, "cap": cap, "warmup_rate": warmup_rate, "schedule_free": schedule_free}
        super().__init__(params, own, layers, common)
