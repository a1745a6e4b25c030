"""KFAC as a baseline: SGD with momentum on gradients preconditioned by curvlinops' Kronecker factors.

After Martens & Grosse (ICML 2015): factors from labels drawn from the model, averaged over measurements, inverted with
damping split between the two in proportion to their traces. Their adaptive damping and rescaling are left out; rate
and damping are swept instead, as papers that compare with KFAC do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

LOSSES = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.mse_loss: nn.MSELoss,
}


class KFAC(Optimizer):
    """SGD with momentum, preconditioned.

    Args:
        model: Of linear and convolutional layers alone.
        criterion: The mean loss, one of `LOSSES`.
        lr: The rate.
        damping: Added to the Fisher matrix, split between its factors.
        momentum: Of the preconditioned gradients, as torch's SGD has it.
        weight_decay: Added to the gradient times the weights.
        every: Steps from one measurement of the factors, and inversion, to the next.
        keep: What averaged factors keep of their past in a measurement.

    Raises:
        ValueError: curvlinops knows no factors for the loss or for one of the model's layers.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        lr: float = 0.1,
        damping: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        every: int = 10,
        keep: float = 0.95,
    ):
        if criterion not in LOSSES:
            raise ValueError("kfac: the loss must be cross entropy, binary cross entropy or squared error")
        held = {id(p) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in m.parameters(False)}
        for name, parameter in model.named_parameters():
            if id(parameter) not in held:
                raise ValueError(f"kfac: {name} is of no linear or convolutional layer")
        super().__init__(
            model.parameters(), {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        )
        self.model, self.loss, self.every, self.keep = model, LOSSES[criterion](), every, keep
        self.steps = 0
        self.factors: list[dict[str, Tensor]] = []  # of inputs and of gradients, by layer
        self.inverse: Any = None

    def measure(self, x: Tensor, y: Tensor) -> None:
        """Where it is due, take the factors of a mini-batch into the averages and invert these."""
        if self.steps % self.every:
            return
        from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

        (group,) = self.param_groups
        operator = KFACLinearOperator(
            self.model, self.loss, group["params"], [(x, y)],
            check_deterministic=False, seed=self.steps, separate_weight_and_bias=False,
        )  # fmt: skip
        operator.compute_kronecker_factors()
        state = operator.state_dict()
        new = [state["input_covariances"], state["gradient_covariances"]]
        weight = (1 - self.keep) / (1 - self.keep ** (1 + self.steps // self.every))  # of this one, bias-corrected
        for old, measured in zip(self.factors, new, strict=False):  # none, the first time
            for name, factor in measured.items():  # in place: the operator holds these same tensors
                factor.lerp_(old[name], 1 - weight)
        self.factors = new
        self.inverse = KFACInverseLinearOperator(operator, damping=group["damping"], use_heuristic_damping=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move by the preconditioned gradients; `measure` goes before."""
        (group,) = self.param_groups
        gradients = [p.grad.add(p, alpha=group["weight_decay"]) for p in group["params"]]
        for p, direction in zip(group["params"], self.inverse @ gradients, strict=True):
            state = self.state[p]
            state["momentum"] = state.get("momentum", torch.zeros_like(p)).mul_(group["momentum"]).add_(direction)
            p.sub_(state["momentum"], alpha=group["lr"])
        self.steps += 1
