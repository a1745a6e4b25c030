"""SGD with momentum and layer-wise adaptive step sizes (SGD-m-LW)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lwas_fast.layers import Grouping
from lwas_fast.optimizer import LayerwiseOptimizer
from lwas_fast.options import Common
from lwas_fast.rule import Here, Moving, Rule, bias_correction, with_decay

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGDRule(Rule):
    """Momentum as an average of the gradient, L2 weight decay."""

    name = "SGDLW"
    buffers_with_momentum = ("momentum_buffer",)
    buffers_schedule_free = ("offset",)
    cap_schedule_free, cap_with_momentum = 0.15, 0.03
    decoupled = False
    operator = "sgd_step"

    def share(self, group: dict[str, Any]) -> float:
        """See `Rule.share`."""
        return float(group["momentum"])

    def directions(self, group: dict[str, Any], here: Here) -> tuple[list[Tensor] | None, list[Tensor]]:
        """See `Rule.directions`."""
        gradients = with_decay(here.gradients, here.weights, here.decays, group["weight_decay"])
        return None, list(torch._foreach_mul(gradients, here.factors))

    def advance(self, group: dict[str, Any], states: list[dict[str, Any]], moving: Moving) -> list[Tensor]:
        """See `Rule.advance`."""
        beta = group["momentum"]
        moving.gradients = with_decay(moving.gradients, moving.weights, moving.decays, group["weight_decay"])
        if group["schedule_free"]:
            moving.factors = -1.0
            return moving.gradients
        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, moving.taking_part(moving.gradients, momenta), 1 - beta)
        moving.factors = -1 / bias_correction(moving.steps, beta)
        return momenta

    def numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """See `Rule.numbers`."""
        return (group["momentum"], group["weight_decay"])


class SGDLW(LayerwiseOptimizer):
    """SGD with momentum whose step size is measured, layer by layer, instead of given.

    By default it is schedule-free. In the k-th step, with g the gradient at W plus ``weight_decay`` times W (L2):

        Z ← Z − rg
        X ← X + (Z − X)/k
        W = βX + (1 − β)Z

    Z takes the steps, W is trained on, and X, the average of all Z, is evaluated (`eval`, `train`). With
    ``schedule_free=False`` it has momentum:

        m ← βm + (1 − β)g
        W ← W − rm̂

    m̂ is m corrected for its start at 0. Momentum is an average, so a gradient moves the weights by r times itself in
    total, and the rate measured on it fits. r is the layer's rate, bounded by ``cap``, and schedule-free times
    1/√(1 − β + β/k).

    Sources: Bahamou & Goldfarb, arXiv 2305.13664 (SGD-m-LW); Defazio et al., arXiv 2405.15682 (schedule-free). Their
    combination, ramp, cap and growth limit are ours.

    Args:
        params: The model (best: see `follow`), its parameters, ``(name, parameter)`` pairs, or group dictionaries.
        lr: Dimensionless multiplier of every step, for schedulers; 1 means what was measured.
        momentum: Share of the average in the weights that are trained on (with momentum: decay of the gradient's
            average), in [0, 1).
        weight_decay: L2 coefficient; it enters the measured curvature too.
        ramp_steps: Steps after warm-up over which measured rates grow linearly from 0 to full.
        cap: Most that a rate is to move a layer (schedule-free: its iterate) in a step, before `lr` and ramp, as a
            share of the norm of its N weights, which counts as 0.01·√N at least. Default 0.15, with momentum 0.03.
        warmup_rate: The rate in warm-up and of layers never measured.
        schedule_free: Whether to train schedule-free, or with momentum.
        **common: See `LayerwiseOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter cannot be optimized.
    """

    rule = SGDRule()

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        ramp_steps: int = 50,
        cap: float | None = None,
        warmup_rate: float = 1e-2,
        schedule_free: bool = True,
        layers: Grouping = None,
        **common: Unpack[Common],
    ):
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        own |= {"ramp_steps": ramp_steps, "cap": cap, "warmup_rate": warmup_rate, "schedule_free": schedule_free}
        super().__init__(params, own, layers, common)
