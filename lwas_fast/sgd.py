"""SGD with momentum and layer-wise adaptive step sizes (SGD-m-LW)."""

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


class SGDLW(LayerwiseOptimizer):
    r"""SGD with momentum whose step size is measured, layer by layer, instead of given.

    With g the gradient at W plus ``weight_decay`` times W (L2), it is by default schedule-free:

    .. math::
        Z \leftarrow Z - r\, g, \qquad X \leftarrow X + \tfrac1k (Z - X), \qquad W = \beta X + (1 - \beta) Z

    in the k-th step: Z moves, W is trained on, and X, the average of all Z, is evaluated (`eval`, `train`). With
    ``schedule_free=False`` it has momentum:

    .. math::
        m \leftarrow \beta m + (1 - \beta) g, \qquad d = -\hat m, \qquad W \leftarrow W + r\, d

    where :math:`\hat m` is bias-corrected. Momentum is an average, so a gradient moves the weights by r times itself in
    total, and the rate measured on it fits. r is the layer's rate, in the first case times
    :math:`1/\sqrt{1-\beta+\beta/k}`, bounded by ``cap``.

    Sources: Bahamou & Goldfarb, arXiv 2305.13664 (SGD-m-LW); Defazio et al., arXiv 2405.15682 (schedule-free). Their
    combination, ramp, cap, growth limit and noise factor are ours.

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: they make the layers), or group dictionaries.
        lr: Dimensionless multiplier of every step, for schedulers; 1 means what was measured.
        momentum: Share of the average in the weights that are trained on (with momentum: decay of the gradient's
            average), in [0, 1).
        weight_decay: L2 coefficient; it enters the measured curvature too.
        ramp_steps: Steps after warm-up over which measured rates grow linearly from 0 to full.
        cap: Most that a rate may move a layer (schedule-free: its iterate) in a step, before `lr` and ramp, as a share
            of the norm of its N weights, which counts as 0.01·√N at least. Default 0.15, with momentum 0.03.
        noise_exponent: Power of the share of signal in the gradient that scales rates; 0: off. Needs momentum, and is
            1/8 with it by default.
        warmup_rate: The rate in warm-up and of layers never measured.
        schedule_free: Whether to train schedule-free, or with momentum.
        **common: See :class:`lwas_fast.optimizer.LayerwiseOptimizer`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter cannot be optimized.
    """

    _buffers = ("momentum_buffer",)
    _free_buffers = ("offset",)
    _by_mode = {"cap": (0.15, 0.03), "noise_exponent": (0.0, 0.125)}
    _fused = staticmethod(fused.sgd)
    _decoupled = False
    _average = "momentum_buffer"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        ramp_steps: int = 50,
        cap: float | None = None,
        noise_exponent: float | None = None,
        warmup_rate: float = 1e-2,
        schedule_free: bool = True,
        layers: LayerRule = None,
        **common: Unpack[Common],
    ):
        own: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule_free": schedule_free,
        }
        own |= {"ramp_steps": ramp_steps, "cap": cap, "noise_exponent": noise_exponent, "warmup_rate": warmup_rate}
        super().__init__(params, own, layers, common)

    def _decay(self, group: dict[str, Any]) -> float:
        return float(group["momentum"])

    def _directions(self, group: dict[str, Any], here: Here) -> tuple[list[Tensor] | None, list[Tensor]]:
        states, weights, gradients, steps, factors = here
        if group["weight_decay"] != 0:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        if group["probe"] == "gradient":
            return None, list(torch._foreach_mul(gradients, factors))
        beta = group["momentum"]
        directions = list(torch._foreach_lerp([state["momentum_buffer"] for state in states], gradients, 1 - beta))
        torch._foreach_div_(directions, each(bias_correction(steps, beta), gradients))
        torch._foreach_mul_(directions, factors)
        return gradients, directions

    def _advance(self, group: dict[str, Any], states: list[dict[str, Any]], moving: Moving) -> list[Tensor]:
        beta, decay = group["momentum"], group["weight_decay"]
        if decay != 0:
            torch._foreach_add_(moving.gradients, moving.weights, alpha=decay)
        if group["schedule_free"]:
            moving.count(states)
            return list(torch._foreach_neg(moving.gradients))
        momenta = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(momenta, moving.taking_part(moving.gradients, momenta), 1 - beta)
        correction = bias_correction(moving.count(states), beta)
        return list(torch._foreach_div(momenta, each(-correction, moving.weights)))
