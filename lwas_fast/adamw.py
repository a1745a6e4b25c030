"""AdamW with layer-wise adaptive step sizes (AdamW-LW)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lwas_fast import fused
from lwas_fast.curvature import Here
from lwas_fast.layers import LayerRule
from lwas_fast.optimizer import LayerwiseOptimizer
from lwas_fast.options import Common
from lwas_fast.update import Moving, bias_correction, each


class AdamWLW(LayerwiseOptimizer):
    r"""AdamW whose step size is measured, layer by layer, instead of given.

    By default it is schedule-free: with :math:`v \leftarrow \beta_2 v + (1-\beta_2) g^2` and g the gradient at W,

    .. math::
        d = -g / (\sqrt{\hat v} + \epsilon), \quad Z \leftarrow Z + r (d - \gamma W), \quad
        X \leftarrow X + \tfrac1k (Z - X), \quad W = \beta_1 X + (1 - \beta_1) Z

    in the k-th step: Z moves, W is trained on, and X, the average of all Z, is evaluated (`eval`, `train`). With
    ``schedule_free=False`` it is AdamW:

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad d = -\hat m / (\sqrt{\hat v} + \epsilon), \quad
        W \leftarrow (1 - r\gamma) W + r\, d

    r is the layer's rate, in the first case times :math:`1/\sqrt{1-\beta_1+\beta_1/k}`, bounded by ``cap``; γ is the
    decoupled weight decay.

    Sources: Bahamou & Goldfarb, arXiv 2305.13664 (AdamW-LW); Defazio et al., arXiv 2405.15682 (schedule-free).
    Their combination, cap, growth limit and noise factor are ours.

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: they make the layers), or group dictionaries.
        lr: Dimensionless multiplier of every step, for schedulers; 1 means what was measured.
        betas: Share of the average in the weights that are trained on (with momentum: decay of the gradient's average),
            and decay of the average of the gradient's square, shorter than torch's 0.999, so that a burst of gradients
            does not hold a layer's direction down for a thousand steps; each in [0, 1).
        eps: Added to the denominator; greater than 0.
        weight_decay: Decoupled decay; it enters the measured curvature too.
        ramp_steps: Steps after warm-up over which measured rates grow linearly from 0 to full.
        cap: Most that a rate may move a layer (schedule-free: its iterate) in a step, before `lr`, ramp and weight
            decay, as a share of the norm of its N weights, which counts as 0.01·√N at least. Default 0.2, with momentum
            0.1.
        noise_exponent: Power of the share of signal in the gradient that scales rates; 0: off. Needs momentum.
        warmup_rate: The rate in warm-up and of layers never measured.
        schedule_free: Whether to train schedule-free, or with momentum.
        **common: See :class:`lwas_fast.optimizer.LayerwiseOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter cannot be optimized.
    """

    _buffers = ("exp_avg", "exp_avg_sq")
    _free_buffers = ("offset", "exp_avg_sq")
    _by_mode = {"cap": (0.2, 0.1)}
    _fused = staticmethod(fused.adamw)
    _decoupled = True
    _average = "exp_avg"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ramp_steps: int = 0,
        cap: float | None = None,
        noise_exponent: float = 0.0,
        warmup_rate: float = 1e-3,
        schedule_free: bool = True,
        layers: LayerRule = None,
        **common: Unpack[Common],
    ):
        own: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"ramp_steps": ramp_steps, "cap": cap, "noise_exponent": noise_exponent, "warmup_rate": warmup_rate}
        own["schedule_free"] = schedule_free
        super().__init__(params, own, layers, common)

    def _decay(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def _directions(self, group: dict[str, Any], here: Here) -> tuple[list[Tensor] | None, list[Tensor]]:
        states, _, gradients, steps, factors = here
        beta1, beta2 = group["betas"]
        squares = torch._foreach_mul(gradients, gradients)
        denominators = list(torch._foreach_lerp([state["exp_avg_sq"] for state in states], squares, 1 - beta2))
        del squares
        torch._foreach_div_(denominators, each(bias_correction(steps, beta2), gradients))
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        if group["probe"] == "gradient":
            directions = list(torch._foreach_div(gradients, denominators))
        else:
            directions = list(torch._foreach_lerp([state["exp_avg"] for state in states], gradients, 1 - beta1))
            torch._foreach_div_(directions, each(bias_correction(steps, beta1), gradients))
            torch._foreach_div_(directions, denominators)
        torch._foreach_mul_(directions, factors)
        return gradients, directions

    def _advance(self, group: dict[str, Any], states: list[dict[str, Any]], moving: Moving) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        second = [state["exp_avg_sq"] for state in states]
        squares = torch._foreach_mul(moving.gradients, moving.gradients)
        torch._foreach_lerp_(second, moving.taking_part(squares, second), 1 - beta2)
        steps = moving.count(states)
        denominators = list(torch._foreach_div(second, each(bias_correction(steps, beta2), moving.weights)))
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        if group["schedule_free"]:
            return list(torch._foreach_div(moving.gradients, torch._foreach_neg(denominators)))
        first = [state["exp_avg"] for state in states]
        torch._foreach_lerp_(first, moving.taking_part(moving.gradients, first), 1 - beta1)
        directions = list(torch._foreach_div(first, each(-bias_correction(steps, beta1), moving.weights)))
        torch._foreach_div_(directions, denominators)
        return directions
