"""Two later kinds of Schedule-Free AdamW, from the formulas of their papers: ScheduleFree+ and the refined one.

Both keep z, which Adam's steps move, and x, the average of the z's, which is judged; gradients are taken at
y = β x + (1 - β) z. `train` puts y into the model, `eval` puts x there. What either has beyond that is told below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class ScheduleFree(Optimizer):
    """What both share. Their group has `beta`, which is β, and `averages`, how Adam averages g and g²."""

    def __init__(self, params: Iterable[Tensor], **defaults: Any):
        super().__init__(params, defaults)
        (self.group,) = self.param_groups
        self.steps, self.weights = 0, 0.0
        for p in self.group["params"]:
            kept = {key: p.detach().clone() for key in ("x", "z")}
            self.state[p] = kept | {"first": torch.zeros_like(p), "second": torch.zeros_like(p)}

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average into the model."""
        for p in self.group["params"]:
            p.copy_(self.state[p]["x"])

    @torch.no_grad()
    def train(self) -> None:
        """Put the point into the model where gradients are taken."""
        for p in self.group["params"]:
            p.copy_(self.state[p]["z"].lerp(self.state[p]["x"], self.group["beta"]))

    def move(self, rate: float, decay: float, share: float) -> None:
        """Take Adam's step from z and a part of y from it, then average and go to the new y.

        Args:
            rate: Adam's.
            decay: The part of y.
            share: Of the new z in x.
        """
        first, second = self.group["averages"]
        self.steps += 1
        for p in self.group["params"]:
            state = self.state[p]
            state["first"].mul_(first).add_(p.grad, alpha=1 - first)
            state["second"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
            root = (state["second"] / (1 - second**self.steps)).sqrt_().add_(self.group["eps"])
            state["z"].sub_(p, alpha=decay)
            state["z"].addcdiv_(state["first"], root, value=-rate / (1 - first**self.steps))
            state["x"].lerp_(state["z"], share)
        self.train()


class ScheduleFreePlus(ScheduleFree):
    """ScheduleFree+: no rate and no schedule (Defazio, arXiv 2605.19095; the authors' code and its defaults).

    Adam's rate is Polyak's step for a least loss of 0: max(0, f + β <g, z - x>) over the gradient's 1-norm times
    sqrt(π/2). z's count in x by the square of the largest rate so far. Weight decay goes by the rate's square, so
    its authors take values like 20.

    Args:
        params: Of the model.
        lr: A factor of the rate, which a warm-up may lower.
        averages: Adam's β's.
        beta: β.
        beta_max: Where β goes within `anneal_steps`, 1 - β in equal ratios.
        anneal_steps: 0: β stays.
        weight_decay: Times the rate's square.
        power: z's count by this power of the step's number as well.
        norm_average: What the norm's average keeps of its past at a step.
        average_after: Until this step x is z.
        eps: Adam's.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1.0,
        averages: tuple[float, float] = (0.9, 0.95),
        beta: float = 0.9,
        beta_max: float = 0.965,
        anneal_steps: int = 0,
        weight_decay: float = 0.0,
        power: float = 0.0,
        norm_average: float = 0.0,
        average_after: int = 0,
        eps: float = 1e-8,
    ):
        super().__init__(params, lr=lr, averages=averages, beta=beta, weight_decay=weight_decay, eps=eps)
        self.beta, self.beta_max, self.anneal_steps = beta, beta_max, anneal_steps
        self.power, self.norm_average, self.average_after = power, norm_average, average_after
        self.norm, self.largest = 0.0, 0.0

    @torch.no_grad()
    def step(self, loss: float) -> None:
        """Move by the gradients of this loss."""
        group, held = self.group, [self.state[p] for p in self.group["params"]]
        gradients = [p.grad for p in group["params"]]
        if self.anneal_steps:
            done = min(self.steps / self.anneal_steps, 1.0)
            group["beta"] = 1 - (1 - self.beta) ** (1 - done) * (1 - self.beta_max) ** done
        ahead = sum((g * (s["z"] - s["x"])).sum() for g, s in zip(gradients, held, strict=True))
        norm = math.sqrt(math.pi / 2) * float(sum(g.abs().sum() for g in gradients))
        self.norm = self.norm_average * self.norm + (1 - self.norm_average) * norm
        unbiased = self.norm / (1 - self.norm_average ** (self.steps + 1))
        rate = group["lr"] * max(0.0, loss + group["beta"] * float(ahead)) / max(unbiased, group["eps"])
        self.largest, share = max(rate, self.largest), 1.0
        if self.steps >= self.average_after:
            weight = (self.steps + 1) ** self.power * max(self.largest, group["eps"]) ** 2
            self.weights += weight
            share = weight / self.weights
        self.move(rate, rate**2 * group["weight_decay"], share)


class RefinedScheduleFree(ScheduleFree):
    """Refined Schedule-Free AdamW: how far x averages does not hang on β (Song et al., arXiv 2507.09846, section 5).

    The newest z has min(1, (1 - β) C γ² / Σ γ²) of x, of rates γ; C = 1 / (1 - β) is Schedule-Free AdamW. The defaults
    are the best of the paper's main sweep (its table 1), which had a warm-up of 5 % as well.

    Args:
        params: Of the model.
        lr: γ.
        betas: β, and Adam's average of g².
        C: As above.
        weight_decay: Times the rate, of y.
        eps: Adam's.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        C: float = 200.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ):
        averages = 0.0, betas[1]
        super().__init__(params, lr=lr, averages=averages, beta=betas[0], C=C, weight_decay=weight_decay, eps=eps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move by the gradients."""
        group, rate = self.group, self.group["lr"]
        self.weights += rate**2
        share = (1 - group["beta"]) * group["C"] * rate**2 / self.weights if rate else 0.0
        self.move(rate, rate * group["weight_decay"], min(1.0, share))
