"""The float64 reference against theorems.

What each test catches:

* closed form: a step too long for its guarantee. Log barriers meet the bound by theorem, and the worst case
  meets it with equality, so a step or a bound that is wrong either way shows.
* convergence: the whole loop on a problem where the theory promises a rate, for one layer and for two.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from reference import ReferenceSGDLW, closed_form, decrease_bound, omega
from reference_cases import PLAIN, close, vec
from torch.nn.functional import softplus

# --- the closed form ----------------------------------------------------------------------


def test_decrease_bound_on_2000_log_barriers():
    """F(x) = c·x − Σ log(b − Ax) is 2-self-concordant; aF is so with M = 2/√a, and with any larger M."""
    gen = torch.Generator().manual_seed(0)
    tight = 0
    for _ in range(2000):
        m, n = (int(torch.randint(low, 9, (1,), generator=gen)) for low in (2, 1))
        A, c, d = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((m, n), (n,), (n,)))
        c *= 10 ** (2 * torch.rand(1, generator=gen).item() - 1)
        d *= 10 ** (4 * torch.rand(1, generator=gen).item() - 2)
        # The point x enters through b − Ax alone, so that is what is drawn; positive is inside.
        slack = 0.01 + 3 * torch.rand(m, generator=gen, dtype=torch.float64).square()
        g, Ad = c + A.T @ (1 / slack), A @ d
        d, Ad = (-d, -Ad) if g @ d > 0 else (d, Ad)
        a, larger = (10 ** (2 * torch.rand(2, generator=gen) - 1)).tolist()
        for M in (2 / math.sqrt(a), 2 / math.sqrt(a) * (1 + larger)):
            rho, delta2 = -a * (g @ d), a * (Ad / slack).square().sum()
            t = closed_form(rho, delta2, M)
            assert (slack > t * Ad).all()  # still in the domain
            decrease = -a * (t * (c @ d) - torch.log1p(-t * Ad / slack).sum())
            bound = decrease_bound(rho, delta2, M)
            # log1p near 1 and the linear term cancel: 1e-12 of the larger of them.
            assert decrease >= bound - 1e-12 * (t * rho).abs()
            assert bound > 0
            tight += int(decrease < 1.2 * bound)
    assert tight > 50  # some problems come close, so a longer promise or a longer step would be caught


@pytest.mark.parametrize("M", [0.5, 2.0, 3.0])
def test_bound_is_met_exactly_by_the_worst_function(M):
    """φ(τ) = (4/M²)(−ln(1 − τδM/2) − τδM/2) − ρτ has φ''' = M φ''^1.5 everywhere: what M allows at most."""
    for rho, delta in itertools.product((0.01, 1.0, 30.0), (0.1, 1.0, 7.0)):
        t = closed_form(rho, delta**2, M)
        x = t * delta * M / 2
        assert 0 < x < 1
        decrease = rho * t - 4 / M**2 * (-math.log1p(-x) - x)
        assert decrease == pytest.approx(decrease_bound(rho, delta**2, M), rel=1e-9)
        for other in (0.99 * t, 1.01 * t):  # and t is where that function is lowest
            x = other * delta * M / 2
            assert x >= 1 or rho * other - 4 / M**2 * (-math.log1p(-x) - x) < decrease


def test_closed_form_facts():
    rho, delta2 = (torch.rand(1000, dtype=torch.float64) * 10 for _ in range(2))
    t = closed_form(rho, delta2)
    for scale in (1e-3, 7.0):
        close(scale * closed_form(scale * rho, scale**2 * delta2), t, 1e-12)  # rescaling d: t·d stays
        # Rescaling the loss: t does change, unless M changes with it (aF has the constant M/√a).
        assert ((closed_form(scale * rho, scale * delta2) / t).log().abs() > 1e-3).all()
        close(closed_form(scale * rho, scale * delta2, 2 / math.sqrt(scale)), t, 1e-12)
    assert (t * delta2.sqrt() < 1).all()
    close(closed_form(1e-9, 4.0), 1e-9 / 4.0, 1e-8)  # ρ ≪ δ: the line search of a quadratic
    close(closed_form(rho, delta2, 0.0), rho / delta2, 1e-12)
    assert closed_form(vec(1.0), vec(0.0)).isinf()
    assert closed_form(vec(0.0), vec(0.0)).isnan()
    close(omega(1.0), 1 - math.log(2))
    close(omega(vec(1.0)), vec(1 - math.log(2)))


# --- convergence --------------------------------------------------------------------------


class Logistic:
    """F(w) = Σ ln(1 + exp(−yᵢ xᵢ·w)) + γ/2 ‖w‖², with |xᵢ| ≤ R = 1 and γ = R²/4.

    It is 2-self-concordant: |ℓ'''| ≤ ℓ'' gives |D³F[u,u,u]| ≤ R‖u‖ D²F[u,u], and ‖u‖ ≤ (D²F[u,u]/γ)^½ then
    |D³F[u,u,u]| ≤ (R/√γ) D²F[u,u]^1.5 with R/√γ = 2.

    The bound for one layer, d = −g. The step gains ω(ρ/δ) or more, ρ = ‖g‖², δ² ≤ Λ‖g‖², so ρ/δ ≥ x = ‖g‖/√Λ.
    ω grows, and ω(x) ≥ x²/(2(1 + x)), so the gain is at least ‖g‖²/(2(Λ + ‖g‖√Λ)).
    Strong convexity, ‖g‖² ≥ 2μ(F − F*), makes that μ/(Λ + ‖g‖√Λ) of the gap. ‖g‖ ≤ Γ on the level set:
        gap(k+1) ≤ (1 − μ/(Λ + Γ√Λ)) gap(k).
    Bounds that hold everywhere: μ = γ, Λ = λ_max(XᵀX)/4 + γ (σ' ≤ ¼), Γ² = 2Λ gap(0) (‖g‖² ≤ 2Λ gap).
    """

    gamma = 0.25

    def __init__(self, seed, samples=60, n=6):
        gen = torch.Generator().manual_seed(seed)
        X, noise = (torch.randn(samples, k, dtype=torch.float64, generator=gen) for k in (n, 1))
        X = X * torch.logspace(0, -0.5, n, dtype=torch.float64)
        self.X = X / X.norm(dim=1).max()
        self.y = torch.sign(X.sum(1) + noise[:, 0])
        w = torch.zeros(n, dtype=torch.float64)
        for _ in range(50):  # Newton's method
            H = torch.func.hessian(self.value)(w)
            w = w - torch.linalg.solve(H, torch.func.grad(self.value)(w))
        self.least = self.value(w).item()
        self.start = torch.zeros_like(w)
        self.mu = self.gamma
        self.Lambda = torch.linalg.eigvalsh(self.X.T @ self.X)[-1].item() / 4 + self.gamma
        self.Gamma = math.sqrt(2 * self.Lambda * self.gap(self.start))

    def data_loss(self, W):
        return softplus(-self.y * (self.X @ torch.cat(W))).sum()

    def value(self, w):
        return self.data_loss([w]) + self.gamma / 2 * w @ w

    def gap(self, w):
        return self.value(w).item() - self.least

    def run(self, parts, lr=1.0, floor=1e-12):
        """Train to `floor` by the exact method. Per step: gap before, gap after, ‖g‖, Σ ω(ρ/δ)."""
        hyper = PLAIN | {"momentum": 0.0, "weight_decay": self.gamma, "lr": lr}
        ref = ReferenceSGDLW(self.start.split(parts), **hyper)
        rows = []
        while (before := self.gap(torch.cat(ref.W))) > floor and len(rows) < 300:
            ref.step(self.data_loss)
            rho = [last["descent"] for last in ref.last]
            delta2 = [last["curvature"] + self.gamma * last["q"] for last in ref.last]
            norm = math.sqrt(sum(rho))  # d = −g: ρ = ‖g‖²
            rows.append((before, self.gap(torch.cat(ref.W)), norm, sum(map(decrease_bound, rho, delta2))))
        return rows


ROUNDING = 1e-13  # of F, which is about 25: gaps end at 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_one_layer_never_exceeds_the_bound(seed):
    problem = Logistic(seed)
    factor = 1 - problem.mu / (problem.Lambda + problem.Gamma * math.sqrt(problem.Lambda))
    rows = problem.run([6])
    assert rows[-1][1] <= 1e-12
    for before, after, norm, gain in rows:
        assert norm <= problem.Gamma
        assert after <= factor * before + ROUNDING
        # Sharper: the step's own ‖g‖ instead of Γ, and ω itself instead of what bounds it.
        own = 1 - problem.mu / (problem.Lambda + norm * math.sqrt(problem.Lambda))
        assert after <= own * before + ROUNDING
        assert before - after >= gain - ROUNDING


@pytest.mark.parametrize("seed", range(3))
def test_two_layers_converge_linearly(seed):
    """For layers that move together at lr = 1 no such bound is known; they converge along a straight line."""
    rows = Logistic(seed).run([3, 3])
    assert rows[-1][1] <= 1e-12
    assert all(after < 0.9 * before + ROUNDING for before, after, _, _ in rows)
    # Where gradients are large steps are shortened and progress is slower: fit what comes after that.
    log_gap = vec(*(before for before, _, _, _ in rows if before < 1)).log()
    line = torch.corrcoef(torch.stack([torch.arange(len(log_gap), dtype=torch.float64), log_gap]))[0, 1]
    assert len(log_gap) >= 10
    assert line < -0.99


@pytest.mark.parametrize("seed", range(3))
def test_two_layers_at_half_rate_meet_half_the_bound(seed):
    """By convexity: F(W + ½(t₁d₁ + t₂d₂)) ≤ ½ Σ F(W + t_λ d_λ), so half of each layer's own gain is sure."""
    problem = Logistic(seed)
    factor = 1 - problem.mu / (problem.Lambda + problem.Gamma * math.sqrt(problem.Lambda)) / 2
    rows = problem.run([3, 3], lr=0.5)
    assert rows[-1][1] <= 1e-12
    for before, after, _, gain in rows:
        assert after <= factor * before + ROUNDING
        assert before - after >= gain / 2 - ROUNDING


@pytest.mark.parametrize(
    ("layers", "options", "settles"),
    [
        (2, {}, True),
        (3, {}, False),
        (3, {"lr": 1 / 3}, True),
    ],
    ids=["two", "three", "three at a third"],
)
def test_layers_that_act_alike(layers, options, settles):
    """F = ½(Σw)² + 0.025 Σw²: as docs/convergence.md says, three layers overshoot together, two do not."""

    def loss(W):
        w = torch.cat(W)
        return w.sum() ** 2 / 2 + 0.025 * w @ w

    ref = ReferenceSGDLW([vec(0.3 + 0.05 * i) for i in range(layers)], **PLAIN | {"momentum": 0.0} | options)
    for _ in range(200):
        ref.step(loss)
    assert (loss(ref.W) < 1e-6) == settles
    assert settles or loss(ref.W) > 0.05
