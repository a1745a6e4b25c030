"""Draw how fast the exact method converges where theory promises a rate, beside that rate.

Full-batch logistic regression with L2, scaled so that the loss is self-concordant; every guard and average is off, so
that a step is exactly what the closed form says. Only the tests' float64 reference can do that. See
docs/convergence.md.

    python -m bench.convergence --out docs/images/convergence.png
"""

from __future__ import annotations

import argparse
import math

import matplotlib
import torch
from torch.nn.functional import softplus

from tests.reference import ReferenceSGDLW

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GAMMA = 0.25  # weight decay; where |x| <= 1 the loss is self-concordant with M = 1/sqrt(GAMMA) = 2


def make_data(samples: int = 60, features: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points (samples, features) of norm <= 1, and noisy labels (samples,) of +1 and -1."""
    gen = torch.Generator().manual_seed(seed)
    X, noise = (torch.randn(samples, n, generator=gen, dtype=torch.float64) for n in (features, 1))
    X = X * torch.logspace(0, -0.5, features, dtype=torch.float64)
    return X / X.norm(dim=1).max(), torch.sign(X.sum(1) + noise[:, 0])


def objective(X: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return the sum of ln(1 + exp(-y x.w)) plus GAMMA/2 |w|^2."""
    return softplus(-y * (X @ w)).sum() + GAMMA / 2 * w @ w


def minimum(X: torch.Tensor, y: torch.Tensor) -> float:
    """Return the least value of the objective, by Newton's method."""
    w = X.new_zeros(X.shape[1])
    for _ in range(50):
        gradient, hessian = torch.func.grad(objective, 2)(X, y, w), torch.func.hessian(objective, 2)(X, y, w)
        w = w - torch.linalg.solve(hessian, gradient)
    return objective(X, y, w).item()


def train(X: torch.Tensor, y: torch.Tensor, parts: list[int], least: float) -> tuple[list[float], ...]:
    """Train with the weights cut into layers of these sizes, until the gap is 1e-12.

    Returns:
        The gap before the first step and after each, and the gradient's norm before each step.
    """
    ref = ReferenceSGDLW(
        [X.new_zeros(n) for n in parts],
        weight_decay=GAMMA,
        momentum=0.0,
        schedule_free=False,  # plain gradient descent
        curvature="blocks",
        self_concordance=2.0,
        update_every=1,
        rate_horizon=0.0,
        cap=math.inf,
        max_growth=math.inf,
        ramp_steps=0,
    )

    def gap() -> float:
        return objective(X, y, torch.cat(ref.W)).item() - least

    gaps, norms = [gap()], []
    while gaps[-1] > 1e-12 and len(gaps) < 200:
        ref.step(lambda W: softplus(-y * (X @ torch.cat(W))).sum())  # the L2 term is the optimizer's, as weight_decay
        norms.append(math.sqrt(sum(layer["descent"] for layer in ref.last)))  # d = -g here
        gaps.append(gap())
    return gaps, norms


def main() -> None:
    """Train, check the bound, draw."""
    parser = argparse.ArgumentParser(description="Draw measured convergence beside the bound.")
    parser.add_argument("--out", default="convergence.png", help="where the picture goes")
    out = parser.parse_args().out

    X, y = make_data()
    least = minimum(X, y)
    (one, norms), (two, _) = train(X, y, [6], least), train(X, y, [3, 3], least)

    # Valid everywhere: the logistic function's slope is at most 1/4, and |gradient|^2 <= 2 Lambda gap.
    mu, Lambda = GAMMA, torch.linalg.eigvalsh(X.T @ X)[-1].item() / 4 + GAMMA
    Gamma = math.sqrt(2 * Lambda * one[0])
    worst, own = [one[0]], [one[0]]
    for norm in norms:
        worst.append(worst[-1] * (1 - mu / (Lambda + Gamma * math.sqrt(Lambda))))
        own.append(own[-1] * (1 - mu / (Lambda + norm * math.sqrt(Lambda))))
    kept = all(gap <= line + 1e-13 for gap, line in zip(one, own, strict=True))
    print(f"mu {mu:.3g}, Lambda {Lambda:.3g}, Gamma {Gamma:.3g}: factor {worst[1] / worst[0]:.4f} a step")
    print(f"one layer: {len(one) - 1} steps to 1e-12, bound kept: {kept}; two layers: {len(two) - 1} steps")

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.semilogy(worst, "--", color="0.35", label="bound, one layer")
    axes.semilogy(own, ":", color="0.35", label=r"bound with each step's $\|g\|$")
    axes.semilogy(one, "o-", ms=3.5, color="C0", label="one layer")
    axes.semilogy(two, "s-", ms=3.5, color="C1", label="two layers")
    axes.set(xlabel="step", ylabel=r"$F(W_k)-F^*$", xlim=(0, None), ylim=(3e-13, 1e2))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
