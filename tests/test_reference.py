"""The float64 reference against what does not come from it: hand arithmetic, `torch.func`, theorems.

What each test catches:

* worked by hand: a wrong formula anywhere between gradient and weights, first step and second: signs, weight
  decay, M, the closed form, the average of the rates, the noise factor, momentum and its bias correction.
* curvature: a layer's slice off by one, a sign that does not cancel, an estimator with a bias.
* closed form: a step too long for its guarantee. Log barriers meet the bound by theorem, and the worst case
  meets it with equality, so a step or a bound that is wrong either way shows.
* convergence: the whole loop on a problem where the theory promises a rate, for one layer and for two.
* torch's AdamW: bias corrections and decoupled decay, over many steps.
* guards, warm-up, ramp, maximize, gradient=: one test each, with the number or counter that must come out.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import softplus

from lwas_fast.reference import (
    EVENTS,
    ReferenceAdamWLW,
    ReferenceSGDLW,
    closed_form,
    curvature,
    decrease_bound,
    omega,
)

METHODS = [ReferenceSGDLW, ReferenceAdamWLW]
# Nothing but the closed form: the rate is t, and nothing bounds it.
PLAIN = {
    "noise_exponent": 0.0,
    "rate_horizon": 0.0,
    "cap": math.inf,
    "max_growth": math.inf,
    "ramp_steps": 0,
    "update_every": 1,
    "curvature": "blocks",
    "weight_decay": 0.0,
}


def vec(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual, expected, tolerance=1e-14):
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- worked by hand -----------------------------------------------------------------------


def four_numbers(W):
    """F = ½(w₁² + w₂²) + w₂w₃ + ½(4w₃² + 3w₄²), layers (w₁, w₂) and (w₃, w₄)."""
    (w1, w2), (w3, w4) = W
    return (w1**2 + w2**2) / 2 + w2 * w3 + (4 * w3**2 + 3 * w4**2) / 2


@pytest.mark.parametrize(
    ("options", "z", "c", "t"),
    [
        # z₁z₂ = −1, so c = (2, 7) − (−1) = (3, 8); γq = ½·2 = 1, so δ² = (4, 9), δ = (2, 3);
        # t = 2/(2·(2 + 2)) = 1/4 and 5/(3·(3 + 5)) = 5/24.
        ({"curvature": "signs"}, [1, -1], (3, 8), (1 / 4, 5 / 24)),
        ({"curvature": "signs"}, [-1, 1], (3, 8), (1 / 4, 5 / 24)),
        # z₁z₂ = +1 is joint: c = (2, 7) + (−1) = (1, 6), δ² = (2, 7); M = 0 leaves ρ/δ² = 2/2 and 5/7.
        ({"curvature": "signs", "self_concordance": 0.0}, [1, 1], (1, 6), (1.0, 5 / 7)),
        ({"curvature": "joint", "self_concordance": 0.0}, None, (1, 6), (1.0, 5 / 7)),
        # Blocks: c = (2, 7); damping ½ adds another ½·2, so δ² = (4, 9) again; M = 4 gives
        # t = 2/(2·(2 + 2·2)) = 1/6 and 5/(3·(3 + 2·5)) = 5/39.
        ({"curvature": "blocks", "damping": 0.5, "self_concordance": 4.0}, None, (2, 7), (1 / 6, 5 / 39)),
    ],
    ids=["signs", "signs flipped", "signs equal", "joint", "blocks"],
)
def test_four_numbers_by_hand(options, z, c, t):
    # W = (1, −2 | 1, 1).  g₁ = w₁ = 1, g₂ = w₂ + w₃ = −1, g₃ = w₂ + 4w₃ = 2, g₄ = 3w₄ = 3.
    # First step of AdamW, ε = 0: v̂ = g², D = 1/|g|, m̂ = g, so d = −sign g = (−1, 1 | −1, −1).
    # ρ = Σ|g| = (2, 5).  q = (2, 2).  Blocks: ⟨d₁, H₁₁d₁⟩ = 1 + 1 = 2 and ⟨d₂, H₂₂d₂⟩ = 4 + 3 = 7.
    # Between the layers H has w₂w₃ only: d₂·1·d₃ = 1·(−1) = −1, times z₁z₂.
    W = [vec(1, -2), vec(1, 1)]
    hyper = {"eps": 0.0, "weight_decay": 0.5, "cap": math.inf} | options
    ref = ReferenceAdamWLW(W, **hyper)
    ref.step(four_numbers, z)
    assert [last["descent"] for last in ref.last] == pytest.approx([2, 5], rel=1e-15)
    assert [last["curvature"] for last in ref.last] == pytest.approx(c, rel=1e-14)
    assert [last["q"] for last in ref.last] == pytest.approx([2, 2], rel=1e-15)
    assert ref.rate == pytest.approx(t, rel=1e-14)
    assert ref.applied == pytest.approx(t, rel=1e-14)
    # W ← (1 − t/2) W + t d.
    close(ref.W[0], vec(1 - t[0] / 2 - t[0], -2 + t[0] + t[0]))
    close(ref.W[1], vec(1 - t[1] / 2 - t[1], 1 - t[1] / 2 - t[1]))
    if options == {"curvature": "signs"}:
        # (1 − 1/8)(1, −2) + ¼(−1, 1) = (5/8, −3/2);  (1 − 5/48) − 10/48 = 33/48 = 11/16.
        close(ref.W[0], vec(5 / 8, -3 / 2))
        close(ref.W[1], vec(11 / 16, 11 / 16))
    close(W[0], vec(1, -2))  # the caller's own vector stays


def test_l2_decay_by_hand():
    # F = ½(½w₁² + ½w₂²), γ = ½, W = (3, 4): g = ½W + ½W = (3, 4), d = −g, ρ = q = 25, c = ½·25,
    # δ² = 12.5 + ½·25 = 25, δ = 5, t = 25/(5·30) = 1/6; W ← W − W/6 = (5/2, 10/3): no second decay.
    ref = ReferenceSGDLW([vec(3, 4)], **PLAIN | {"weight_decay": 0.5})
    ref.step(lambda W: (W[0] @ W[0]) / 4)
    assert ref.last[0] == pytest.approx({"descent": 25, "curvature": 12.5, "q": 25})
    assert ref.applied == pytest.approx([1 / 6])
    close(ref.W[0], vec(5 / 2, 10 / 3))


def test_second_refresh_by_hand():
    # F = ½w², momentum ½, exponent p = ½, β = exp(−1/horizon) = ½. The first update is given 2/9 as gradient.
    hyper = PLAIN | {"momentum": 0.5, "noise_exponent": 0.5, "rate_horizon": 1 / math.log(2)}
    ref = ReferenceSGDLW([vec(1)], **hyper)
    # k = 0: g = 1, ρ = δ = 1, t = 1/(1·2) = ½. No momentum yet: no noise factor. E = ¼, w = ½, rate ½.
    # Update: m = ½·2/9 = 1/9, m̂ = (1/9)/(1 − ½) = 2/9; w ← 1 − ½·2/9 = 8/9.
    ref.step(lambda W: W[0] @ W[0] / 2, gradient=[vec(2 / 9)])
    assert ref.rate == pytest.approx([1 / 2])
    close(ref.W[0], vec(8 / 9))
    # k = 1: g = 8/9, ρ = 64/81, δ = 8/9. t = (64/81)/((8/9)(72/81 + 64/81)) = (8/9)/(136/81) = 9/17.
    # m̂⁻ = 2/9: s = (8/9)(2/9) = 16/81. S = ½·16/81, R = ½·64/81, α = ¼, α^½ = ½: t = 9/34.
    # E = ½·¼ + ½·9/34 = 17/136 + 18/136 = 35/136, w = ¾, rate = 35/102.
    # m = ½·1/9 + ½·8/9 = ½, m̂ = ½/(1 − ¼) = 2/3; w ← 8/9 − (35/102)(2/3) = 136/153 − 35/153 = 101/153.
    ref.step(lambda W: W[0] @ W[0] / 2)
    assert (ref.S[0], ref.R[0]) == pytest.approx((8 / 81, 32 / 81))
    assert ref.rate == pytest.approx([35 / 102])
    close(ref.W[0], vec(101 / 153))


def test_noise_factor_is_clipped():
    # The step before, with 2/9 replaced by g′: g = 1 − g′/2, s/ρ = g′/g, and R = ½ρ once.
    for before, alpha in ((-1.0, 1e-3), (1e-9, 1e-3), (2 / 9, 1 / 4), (1.0, 1.0)):
        ref = ReferenceSGDLW([vec(1)], **PLAIN | {"momentum": 0.5, "noise_exponent": 1.0})
        ref.step(lambda W: W[0] @ W[0] / 2, gradient=[vec(before)])
        g = 1 - before / 2
        ref.step(lambda W: W[0] @ W[0] / 2)
        assert ref.rate == pytest.approx([alpha * closed_form(g * g, g * g)]), before


def test_noise_factor_in_adams_metric():
    # β₁ = ½, β₂ = 0, ε = 0: D = 1/|g|. Damping 1 and a linear loss: δ² = q. First g = 2 by hand: m̂⁻ = 2.
    # Then g = 8: d = −1, ρ = 8, q = 1, t = 8/(1·(1 + 8)) = 8/9; s = 2, α = 2/8, α^½ = ½: rate 4/9.
    hyper = PLAIN | {"betas": (0.5, 0.0), "eps": 0.0, "damping": 1.0, "noise_exponent": 0.5}
    ref = ReferenceAdamWLW([vec(1)], **hyper)
    ref.step(lambda W: W[0].sum(), gradient=[vec(2)])
    ref.step(lambda W: 8 * W[0].sum())
    assert ref.rate == pytest.approx([4 / 9])


def test_horizon_is_in_steps_and_not_in_refreshes():
    # w = 1 throughout. T = 3 and a horizon of 3/ln 2 make β = ½. h = 4: t = 1/12; h = 1: t = ½ (F = ½hw²).
    # E = ½·½·1/12 + ½·½, w = ½·½ + ½: rate = (1/12 + 2·½)/3 = 13/36.
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"update_every": 3, "rate_horizon": 3 / math.log(2)})
    for k in range(4):
        ref.step(lambda W, h=4 if k == 0 else 1: h * W[0] @ W[0] / 2, gradient=[vec(0)])
    assert ref.rate == pytest.approx([13 / 36])


# --- curvature ----------------------------------------------------------------------------


def tiny_net(widths, seed):
    """A tanh net with softplus loss: loss(W), the layers (weight and bias in one vector), where they lie."""
    gen = torch.Generator().manual_seed(seed)
    X, y = (torch.randn(7, n, generator=gen, dtype=torch.float64) for n in (widths[0], widths[-1]))
    shapes = list(itertools.pairwise(widths))
    W = [torch.randn((i + 1) * o, generator=gen, dtype=torch.float64) for i, o in shapes]

    def loss(W):
        h = X
        for (i, o), w in zip(shapes, W, strict=True):
            h = torch.tanh(h @ w[: i * o].view(i, o) + w[i * o :])
        return softplus(h - y).square().mean()

    ends = list(itertools.accumulate(w.numel() for w in W))
    return loss, W, [slice(end - w.numel(), end) for end, w in zip(ends, W, strict=True)]


def own_blocks(loss, W):
    """Each layer's Hessian block, the other layers held: by `torch.func.hessian`, with no slicing at all."""

    def alone(i):
        return torch.func.hessian(lambda w: loss([*W[:i], w, *W[i + 1 :]]))(W[i])

    return [alone(i) for i in range(len(W))]


def dense(loss, W):
    return torch.func.hessian(lambda x: loss(list(x.split([w.numel() for w in W]))))(torch.cat(W))


NETS = [(3, 4, 2), (2, 3, 2, 3, 1)]


@pytest.mark.parametrize("widths", NETS, ids=str)
def test_blocks_are_the_hessians_own(widths):
    for seed in range(5):
        loss, W, layers = tiny_net(widths, seed)
        d = [torch.randn_like(w) for w in W]
        found = curvature(dense(loss, W), torch.cat(d), layers, "blocks")
        expected = torch.stack([d_ @ B @ d_ for d_, B in zip(d, own_blocks(loss, W), strict=True)])
        close(found, expected, 1e-12)


@pytest.mark.parametrize("widths", NETS, ids=str)
def test_signs_average_to_the_blocks_over_all_sign_vectors(widths):
    loss, W, layers = tiny_net(widths, 0)
    H, d = dense(loss, W), torch.randn(sum(w.numel() for w in W), dtype=torch.float64)
    all_signs = list(itertools.product([1.0, -1.0], repeat=len(W)))
    mean = sum(curvature(H, d, layers, "signs", z) for z in all_signs) / len(all_signs)
    close(mean, curvature(H, d, layers, "blocks"), 1e-12)
    close(curvature(H, d, layers, "signs", [-1.0] * len(W)), curvature(H, d, layers, "joint"), 1e-12)


def test_signs_are_unbiased_over_4000_draws():
    loss, W, layers = tiny_net((2, 3, 2, 3, 1), 1)
    H, d = dense(loss, W), torch.randn(sum(w.numel() for w in W), dtype=torch.float64)
    draws = torch.randint(0, 2, (4000, len(W))) * 2.0 - 1
    found = torch.stack([curvature(H, d, layers, "signs", z.tolist()) for z in draws])
    assert (found.std(0) > 1e-3).all()  # the draws differ, or this test would prove nothing
    error = (found.mean(0) - curvature(H, d, layers, "blocks")).abs() / (found.std(0) / math.sqrt(4000))
    assert (error < 4).all(), error


@pytest.mark.parametrize("widths", NETS, ids=str)
def test_joint_sums_a_row_of_blocks(widths):
    loss, W, layers = tiny_net(widths, 2)
    H, d = dense(loss, W), torch.randn(sum(w.numel() for w in W), dtype=torch.float64)
    found = curvature(H, d, layers, "joint")
    for i, c in zip(layers, found, strict=True):
        close(c, sum(d[i] @ H[i, j] @ d[j] for j in layers), 1e-12)
    close(found.sum(), d @ H @ d, 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("probe", ["gradient", "update"])
def test_step_measures_the_blocks_along_its_own_probe(method, probe):
    loss, W, _ = tiny_net((3, 4, 2), 3)
    ref = method(W, curvature="blocks", probe=probe, update_every=2, ramp_steps=0)
    for _ in range(3):
        before, m, v = [w.clone() for w in ref.W], list(ref.m), list(ref.v)
        ref.step(loss)
    # The third step refreshed. Its direction again, from the moments it found and the gradient at `before`.
    for i, block in enumerate(own_blocks(loss, before)):
        g = torch.func.grad(lambda w, i=i: loss([*before[:i], w, *before[i + 1 :]]))(before[i])
        D = 1 / (((0.999 * v[i] + 0.001 * g * g) / (1 - 0.999**3)).sqrt() + 1e-8)
        d = -g if probe == "gradient" else -(0.9 * m[i] + 0.1 * g) / (1 - 0.9**3)
        d = d * D if method is ReferenceAdamWLW else d
        expected = {"descent": -g @ d, "curvature": d @ block @ d, "q": d @ d}
        expected = {name: value.item() for name, value in expected.items()}
        assert ref.last[i] == pytest.approx(expected, rel=1e-10)


def test_curvature_refuses_what_it_cannot_use():
    H, d, layers = torch.eye(2, dtype=torch.float64), vec(1, 1), [slice(0, 1), slice(1, 2)]
    for estimator, z in (("sings", [1, 1]), ("signs", None), ("signs", [1])):
        with pytest.raises(ValueError, match="'signs' and a z per layer"):
            curvature(H, d, layers, estimator, z)
    with pytest.raises(TypeError, match="momentun"):
        ReferenceSGDLW([vec(1)], momentun=0.5)


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
        (3, {"curvature": "joint"}, True),
    ],
    ids=["two", "three", "three at a third", "three, joint"],
)
def test_layers_that_act_alike(layers, options, settles):
    """F = ½(Σw)² + 0.025 Σw²: as docs/convergence.md says, three layers overshoot together, two do not."""

    def loss(W):
        w = torch.cat(W)
        return w.sum() ** 2 / 2 + 0.025 * w @ w

    ref = ReferenceSGDLW([vec(0.3 + 0.05 * i) for i in range(layers)], **PLAIN | {"momentum": 0.0} | options)
    for _ in range(400):
        ref.step(loss)
    assert (loss(ref.W) < 1e-6) == settles
    assert settles or loss(ref.W) > 0.05


# --- everything around the closed form ----------------------------------------------------


def test_a_warm_up_without_end_is_torchs_adamw():
    loss, W, _ = tiny_net((3, 4, 2), 0)
    params = [w.clone().requires_grad_() for w in W]
    shared = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    ref = ReferenceAdamWLW(W, **shared, cap=math.inf, warmup_steps=99, warmup_rate=0.02, ramp_steps=7)
    adamw = torch.optim.AdamW(params, lr=0.02, **shared)
    for _ in range(30):
        adamw.zero_grad()
        loss(params).backward()
        adamw.step()
        ref.step(loss)
    assert ref.rate == [0.02, 0.02]  # nothing measured
    for mine, theirs in zip(ref.W, params, strict=True):
        close(mine, theirs.detach(), 1e-12)


def test_momentum_is_the_weighted_mean_of_the_gradients():
    hyper = {"momentum": 0.8, "weight_decay": 0.5}
    ref = ReferenceSGDLW([vec(5)], **hyper, cap=math.inf, warmup_steps=99, warmup_rate=0.1)
    w, seen = 5.0, []
    for k in range(10):
        given = math.sin(k)
        ref.step(lambda W: W[0].sum(), gradient=[vec(given)])
        seen.append(given + 0.5 * w)
        shares = [0.8 ** (k - i) for i in range(k + 1)]
        w -= 0.1 * sum(s * g for s, g in zip(shares, seen, strict=True)) / sum(shares)
        assert ref.W[0].item() == pytest.approx(w, rel=1e-13)


def test_warm_up_ramp_schedule_and_lr():
    # F = ½w² at w = 1 whatever happens (the update's gradient is 0): t = 1/(1·2) = ½ at every refresh.
    hyper = {"warmup_steps": 2, "warmup_rate": 0.01, "ramp_steps": 4, "update_every": 3, "lr": 3.0}
    ref = ReferenceSGDLW([vec(1)], **PLAIN | hyper)
    applied, refreshes = [], []
    for _ in range(9):
        ref.step(lambda W: W[0] @ W[0] / 2, gradient=[vec(0)])
        applied += ref.applied
        refreshes.append(ref.events[0]["refreshes"])
    assert refreshes == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert applied == pytest.approx([0.03] * 2 + [1.5 * share for share in (0.25, 0.5, 0.75, 1, 1, 1, 1)])
    ref.hyper.lr = 1.0
    ref.step(lambda W: W[0] @ W[0] / 2, gradient=[vec(0)])
    assert ref.applied == [0.5]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("probe", ["gradient", "update"])
def test_maximize_is_minimising_the_negative(method, probe):
    loss, W, _ = tiny_net((3, 4, 2), 4)
    up, down = (method(W, maximize=m, update_every=2, probe=probe) for m in (True, False))
    for k in range(6):
        z, clipped = [1.0, (-1.0) ** k], [0.5 * torch.ones_like(w) for w in W]
        up.step(loss, z, clipped if k == 3 else None)
        down.step(lambda W: -loss(W), z, [-c for c in clipped] if k == 3 else None)
    assert up.events == down.events
    assert up.rate == down.rate
    for a, b in zip(up.W, down.W, strict=True):
        assert torch.equal(a, b)


def test_clipping_changes_the_update_and_not_the_measurement():
    loss, W, _ = tiny_net((3, 4, 2), 5)
    raw, clipped = (ReferenceAdamWLW(W) for _ in range(2))
    raw.step(loss, [1.0, -1.0])
    clipped.step(loss, [1.0, -1.0], [torch.zeros_like(w) for w in W])
    assert raw.rate == clipped.rate
    for w, before, moved, r in zip(clipped.W, W, raw.W, clipped.rate, strict=True):
        close(w, (1 - 0.01 * r) * before)  # d = 0: the decay, γ = 0.01, is left, and nothing caps it
        assert (moved - before).norm() > 0.05 * before.norm()


# --- guards: each fires when it should, and nothing else does -----------------------------


def fired(ref, layer=0):
    return {name: n for name, n in ref.events[layer].items() if n}


@pytest.mark.parametrize("method", METHODS)
def test_nan_gradient_leaves_its_elements_alone(method):
    def loss(W):
        return (W[0] @ W[0] + W[1] @ W[1]) / 2

    ref = method([vec(1, 2), vec(3, 4)], weight_decay=0.1, update_every=1, curvature="blocks")
    ref.step(loss)
    frozen = [x[0] for x in (ref.m, ref.v, ref.n, ref.S, ref.R, ref.E, ref.w, ref.last)]
    before = [w.clone() for w in ref.W]
    # A gradient spoilt by the clipping's own overflow: that element stops, the measurement was fine.
    ref.step(loss, gradient=[vec(math.nan, 1), vec(1, 1)])
    for now, then in ((ref.W[0], before[0]), (ref.m[0], frozen[0]), (ref.v[0], frozen[1])):
        assert now[0] == then[0]
    assert ref.W[0][1] != before[0][1]
    assert ref.m[0][1] == pytest.approx(0.9 * frozen[0][1] + 0.1 * (1 + (0 if ref.adam else 0.1 * before[0][1])))
    assert ref.n == [2, 2]
    assert fired(ref)["skipped"] == 1
    # All of a layer: it is left alone whole, and the update does not count.
    before = [w.clone() for w in ref.W]
    frozen = [x[0] for x in (ref.m, ref.v)]
    ref.step(loss, gradient=[vec(math.nan, math.inf), vec(1, 1)])
    assert torch.equal(ref.W[0], before[0])
    assert ref.applied[0] == 0
    assert not torch.equal(ref.W[1], before[1])
    assert torch.equal(ref.m[0], frozen[0])
    assert torch.equal(ref.v[0], frozen[1])
    assert ref.n == [2, 3]
    assert fired(ref)["skipped"] == 2
    assert ref.events[0]["refreshes"] == 3
    # A loss that is NaN in one layer: nothing measured there either, the other layer goes on.
    frozen = [x[0] for x in (ref.S, ref.R, ref.E, ref.w, ref.last)]
    ref.step(lambda W: loss(W) + (W[0] * math.inf * 0).sum())
    assert [x[0] for x in (ref.S, ref.R, ref.E, ref.w, ref.last)] == frozen
    assert torch.equal(ref.W[0], before[0])
    assert (ref.events[0]["nonfinite"], ref.events[0]["skipped"], ref.events[0]["refreshes"]) == (1, 3, 3)
    assert (ref.events[1]["nonfinite"], ref.events[1]["skipped"], ref.events[1]["refreshes"]) == (0, 0, 4)
    assert ref.k == 4


def test_negative_curvature():
    # F = −w², w = 1: g = −2, d = 2, ρ = 4, c = −8; |c| = 8, t = 4/(√8(√8 + 4)).
    ref = ReferenceSGDLW([vec(1)], **PLAIN)
    ref.step(lambda W: -(W[0] @ W[0]))
    assert ref.last[0]["curvature"] == -8
    assert ref.rate == pytest.approx([4 / (math.sqrt(8) * (math.sqrt(8) + 4))])
    assert fired(ref) == {"negative": 1, "refreshes": 1}
    # F = −½w², γ = 2: g = −1 + 2 = 1, c = −1, and decay comes on top of its size: δ² = 1 + 2 = 3.
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"weight_decay": 2.0})
    ref.step(lambda W: -(W[0] @ W[0]) / 2)
    assert ref.rate == pytest.approx([1 / (math.sqrt(3) * (math.sqrt(3) + 1))])
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"negative_curvature": "skip", "damping": 100.0})
    ref.step(lambda W: -(W[0] @ W[0]))
    assert ref.rate == [0.01]
    assert math.isnan(ref.last[0]["descent"])
    assert fired(ref) == {"negative": 1}
    ref.step(lambda W: -W[0].sum())  # c = 0 is skipped too, and is not negative
    assert fired(ref) == {"negative": 1}
    ref.step(lambda W: W[0] @ W[0])
    assert fired(ref) == {"negative": 1, "refreshes": 1}


def test_no_curvature_and_no_gradient():
    ref = ReferenceSGDLW([vec(1)], **PLAIN)
    ref.step(lambda W: W[0].sum())  # δ = 0: t = 1/0
    assert fired(ref) == {"nonfinite": 1}
    ref.step(lambda W: 0 * W[0] @ W[0])  # ρ = 0: 0/0, but what is missing is descent
    assert fired(ref) == {"nonfinite": 1, "nondescent": 1}
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"damping": 1.0})
    ref.step(lambda W: W[0].sum())  # g = 1, c = 0, δ² = 0 + 1·1: t = ½
    assert ref.rate == [0.5]
    assert fired(ref) == {"refreshes": 1}


def test_update_probe_that_does_not_descend():
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"probe": "update", "cap": 1e-9})
    ref.step(lambda W: W[0].sum() + W[0] @ W[0])
    rate = ref.rate
    ref.step(lambda W: -0.1 * W[0].sum())  # the momentum still says the other way
    assert fired(ref) == {"nondescent": 1, "refreshes": 1, "capped": 2}
    assert ref.rate == rate
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"cap": 1e-9})  # minus the gradient always does
    ref.step(lambda W: W[0].sum() + W[0] @ W[0])
    ref.step(lambda W: -0.1 * W[0].sum() + 1e-3 * W[0] @ W[0])
    assert fired(ref) == {"refreshes": 2, "capped": 2}


def test_growth_is_limited_to_a_multiple_of_the_rate():
    # w = 1 throughout (gradient 0). F = ½hw²: g = h, ρ = h², δ² = h³. h = 4: t = 16/(8·24) = 1/12.
    # h = 1: t = ½ > 2/12, so 1/6. The first is never limited.
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"max_growth": 2.0})
    ref.step(lambda W: 2 * W[0] @ W[0], gradient=[vec(0)])
    assert ref.rate == pytest.approx([1 / 12])
    assert fired(ref) == {"refreshes": 1}
    ref.step(lambda W: W[0] @ W[0] / 2, gradient=[vec(0)])
    assert ref.rate == pytest.approx([1 / 6])
    assert fired(ref) == {"refreshes": 2, "growth": 1}
    ref.step(lambda W: 2 * W[0] @ W[0], gradient=[vec(0)])  # falling is free
    assert ref.rate == pytest.approx([1 / 12])
    assert fired(ref) == {"refreshes": 3, "growth": 1}


def test_cap_holds_the_step_to_a_share_of_the_weights():
    # W = (3, 4), F = ½‖W‖²: d = −W, t = 25/(5·30) = 1/6. cap 0.1: a = 0.1·5/5.
    ref = ReferenceSGDLW([vec(3, 4)], **PLAIN | {"cap": 0.1, "lr": 0.5})
    ref.step(lambda W: W[0] @ W[0] / 2)
    assert ref.applied == pytest.approx([0.05])  # lr comes after
    assert ref.rate == pytest.approx([1 / 6])
    assert fired(ref) == {"refreshes": 1, "capped": 1}
    ref = ReferenceSGDLW([vec(3, 4)], **PLAIN | {"cap": 0.2})
    ref.step(lambda W: W[0] @ W[0] / 2)
    assert ref.applied == pytest.approx([1 / 6])
    assert fired(ref) == {"refreshes": 1}


def test_cap_of_a_layer_of_zeros():
    # N = 4 zeros: their norm counts as 0.01·√4 = 0.02; g = (1, 1, 1, 1), ‖d‖ = 2; a = 0.5·0.02/2.
    ref = ReferenceSGDLW([vec(0, 0, 0, 0)], **PLAIN | {"cap": 0.5})
    ref.step(lambda W: W[0].sum() + W[0] @ W[0])
    assert ref.applied == pytest.approx([0.005])
    assert fired(ref) == {"refreshes": 1, "capped": 1}


def test_cap_of_the_decay():
    # AdamW, γ = 4, W = 100: d = −1, t = ρ/(δ(δ + ρ)) with δ² = c + γ; cap 1: a = min(1·100/1, 1/4).
    ref = ReferenceAdamWLW([vec(100)], **PLAIN | {"cap": 1.0, "weight_decay": 4.0, "eps": 0.0})
    ref.step(lambda W: W[0].sum() * 1e3)  # ρ = 1000, δ² = 4: t = 1000/(2·1002) ≈ 0.499
    assert ref.applied == [0.25]
    assert fired(ref) == {"refreshes": 1, "capped": 1}
    close(ref.W[0], vec(-0.25))  # (1 − 0.25·4)·100 − 0.25
    ref = ReferenceSGDLW([vec(100)], **PLAIN | {"cap": 1.0, "weight_decay": 4.0})  # in SGD it is in d already
    ref.step(lambda W: W[0].sum() * 1e3)
    assert ref.applied == ref.rate


def test_warm_up_is_capped_too_and_all_events_are_named():
    ref = ReferenceSGDLW([vec(1)], warmup_steps=1, warmup_rate=0.5, momentum=0.0)
    ref.step(lambda W: W[0].sum())
    assert ref.applied == pytest.approx([0.03])
    assert fired(ref) == {"capped": 1}
    assert set(ref.events[0]) == set(EVENTS)
