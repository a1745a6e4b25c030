"""The float64 reference against what does not come from it: hand arithmetic and `torch.func`.

What each test catches:

* worked by hand: a wrong formula anywhere between gradient and weights, first step and second: signs, weight
  decay, M, the closed form, the average of the rates, momentum and its bias correction.
* curvature: a layer's slice off by one, a sign that does not cancel, an estimator with a bias.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from reference import ReferenceAdamWLW, ReferenceMuonLW, ReferenceSGDLW, curvature
from reference_cases import METHODS, NETS, PLAIN, close, tiny_net, vec

# --- worked by hand -----------------------------------------------------------------------


def four_numbers(W):
    """F = ½(w₁² + w₂²) + w₂w₃ + ½(4w₃² + 3w₄²), layers (w₁, w₂) and (w₃, w₄)."""
    (w1, w2), (w3, w4) = W
    return (w1**2 + w2**2) / 2 + w2 * w3 + (4 * w3**2 + 3 * w4**2) / 2


@pytest.mark.parametrize(
    ("options", "z", "c", "t"),
    [
        # z₁z₂ = −1, so c = δ² = (2, 7) − (−1) = (3, 8), whatever γ; F = 5/2 − 2 + 7/2 = 4, so t = ρ/(δ² + ρ²/2F) =
        # 2/(3 + 4/8), 5/(8 + 25/8); these promise tρ/F = 2/7 + 50/89 < 1.
        ({"curvature": "signs"}, [1, -1], (3, 8), (4 / 7, 40 / 89)),
        ({"curvature": "signs"}, [-1, 1], (3, 8), (4 / 7, 40 / 89)),
        # z₁z₂ = +1: c = (2, 7) + (−1) = (1, 6): t = 2/(1 + 1/2), 5/(6 + 25/8), which promise 2/3 + 50/73 = 296/219,
        # more than 1, so both are divided by that.
        ({"curvature": "signs"}, [1, 1], (1, 6), (4 / 3 * 219 / 296, 40 / 73 * 219 / 296)),
        # Likewise, but M = 0 leaves ρ/δ² = 2/1 and 5/6.
        ({"curvature": "signs", "self_concordance": 0.0}, [1, 1], (1, 6), (2.0, 5 / 6)),
        # Blocks: c = (2, 7), δ = (√2, √7); M = 4 gives t = 2/(√2(√2 + 2·2)) and 5/(√7(√7 + 2·5)).
        (
            {"curvature": "blocks", "weight_decay": 1.0, "self_concordance": 4.0},
            None,
            (2, 7),
            (2 / (2 + 4 * 2**0.5), 5 / (7 + 10 * 7**0.5)),
        ),
    ],
    ids=["signs", "signs flipped", "signs equal", "given M", "blocks"],
)
def test_four_numbers_by_hand(options, z, c, t):
    # W = (1, −2 | 1, 1).  g₁ = w₁ = 1, g₂ = w₂ + w₃ = −1, g₃ = w₂ + 4w₃ = 2, g₄ = 3w₄ = 3.
    # First step of AdamW, ε = 0: v̂ = g², D = 1/|g|, m̂ = g, so d = −sign g = (−1, 1 | −1, −1).
    # ρ = Σ|g| = (2, 5).  q = (2, 2).  Blocks: ⟨d₁, H₁₁d₁⟩ = 1 + 1 = 2 and ⟨d₂, H₂₂d₂⟩ = 4 + 3 = 7.
    # Between the layers H has w₂w₃ only: d₂·1·d₃ = 1·(−1) = −1, times z₁z₂.
    W = [vec(1, -2), vec(1, 1)]
    hyper = {"eps": 0.0, "weight_decay": 0.5, "cap": math.inf, "schedule_free": False} | options
    ref = ReferenceAdamWLW(W, **hyper)
    ref.step(four_numbers, z)
    assert [last["descent"] for last in ref.last] == pytest.approx([2, 5], rel=1e-15)
    assert [last["curvature"] for last in ref.last] == pytest.approx(c, rel=1e-14)
    assert [last["q"] for last in ref.last] == pytest.approx([2, 2], rel=1e-15)
    assert ref.rate == pytest.approx(t, rel=1e-14)
    assert ref.applied == pytest.approx(t, rel=1e-14)
    # W ← (1 − γt) W + t d.
    keep = [1 - hyper["weight_decay"] * t_i for t_i in t]
    close(ref.W[0], vec(keep[0] - t[0], -2 * keep[0] + t[0]))
    close(ref.W[1], vec(keep[1] - t[1], keep[1] - t[1]))
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
    # F = ½w², momentum ½, β = exp(−1/horizon) = ½. The first update is given 2/9 as gradient.
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"momentum": 0.5, "rate_horizon": 1 / math.log(2)})
    # k = 0: g = 1, ρ = δ = 1, t = 1/(1·2) = ½. E = ¼, w = ½, rate ½.
    # Update: m = ½·2/9 = 1/9, m̂ = (1/9)/(1 − ½) = 2/9; w ← 1 − ½·2/9 = 8/9.
    ref.step(lambda W: W[0] @ W[0] / 2, gradient=[vec(2 / 9)])
    assert ref.rate == pytest.approx([1 / 2])
    close(ref.W[0], vec(8 / 9))
    # k = 1: g = 8/9, ρ = 64/81, δ = 8/9. t = (64/81)/((8/9)(72/81 + 64/81)) = (8/9)/(136/81) = 9/17.
    # E = ½·¼ + ½·9/17 = 17/136 + 36/136 = 53/136, w = ¾, rate = 53/102.
    # m = ½·1/9 + ½·8/9 = ½, m̂ = ½/(1 − ¼) = 2/3; w ← 8/9 − (53/102)(2/3) = 136/153 − 53/153 = 83/153.
    ref.step(lambda W: W[0] @ W[0] / 2)
    assert ref.rate == pytest.approx([53 / 102])
    close(ref.W[0], vec(83 / 153))


def test_muon_by_hand():
    # A layer of a matrix of 2 rows and 3 columns and a vector, rate r = 1/10, γ = 2, W = 1 everywhere; two steps.
    # The gradient G = (3 0 0; 0 4 0) has norm 5 and singular values 3/5 and 4/5 of that: p five times, times √3. Of the
    # vector (0, 2) it is √2 (0, 1). The first step looks ahead to ½·½g + ½g, of g's direction.
    def p(x, times=5):
        return x if times == 0 else p(3.4445 * x - 4.775 * x**3 + 2.0315 * x**5, times - 1)

    hyper = {"betas": (0.75, 0.5), "weight_decay": 2.0, "cap": math.inf, "warmup_steps": 9, "warmup_rate": 0.1}
    for schedule_free in (True, False):
        ref = ReferenceMuonLW([torch.ones(8, dtype=torch.float64)], **hyper, schedule_free=schedule_free)
        ref.shapes = [[torch.Size((2, 3)), torch.Size((2,))]]
        first, second = vec(3, 0, 0, 0, 4, 0, 0, 2), vec(0, 0, 0, 0, 8, 0, 0, -1)
        d = -vec(*[p(x) * 3**0.5 for x in (0.6, 0, 0, 0, 0.8, 0)], 0, 2**0.5)
        ref.step(lambda W: W[0].sum(), gradient=[first])
        one = 0.8 + d / 10
        close(ref.W[0], one)
        # Then m = ¼g₁ + ½g₂, and ½m + ½g₂ = ⅛g₁ + ¾g₂ = (3/8 0 0; 0 13/2 0) and (0, −1/2).
        # Mean squares u of that, and before of ¾g₁: d is longer by the root of u₂/((99/100 u₁ + u₂)/(199/100)).
        norm = math.hypot(3 / 8, 13 / 2)
        squares = [(9 / 16 * 25 / 6, norm**2 / 6)] * 6 + [(9 / 16 * 4 / 2, 1 / 4 / 2)] * 2
        d = -vec(*[p(x) * 3**0.5 for x in (3 / 8 / norm, 0, 0, 0, 13 / 2 / norm, 0)], 0, -(2**0.5))
        d = d * vec(*[math.sqrt(1.99 * after / (0.99 * before + after)) for before, after in squares])
        ref.step(lambda W: W[0].sum(), gradient=[second])
        two = one + (d - 2 * one) / 10
        close(ref.W[0], 0.75 * (one + two) / 2 + 0.25 * two if schedule_free else two)
    # Measured rates are multiplied by the norm of the weights of gradients: ¾ and ⅛, 1/16, ... of those before.
    weights = [3 / 4] + [0.5**k for k in range(3, 60)]
    ref = ReferenceMuonLW([vec(2)], **PLAIN | {"betas": (0.75, 0.5)})
    ref.step(lambda W: W[0] @ W[0] / 2)  # g = 2, d = −1, ρ = 2, δ² = 1: t = 2/(1·(1 + 2))
    assert ref.rate == pytest.approx([2 / 3])
    assert ref.applied == pytest.approx([2 / 3 * math.hypot(*weights)])


def test_horizon_is_in_steps_and_not_in_refreshes():
    # w = 1 throughout. T = 3 and a horizon of 3/ln 2 make β = ½. h = 4: t = 1/12; h = 1: t = ½ (F = ½hw²).
    # E = ½·½·1/12 + ½·½, w = ½·½ + ½: rate = (1/12 + 2·½)/3 = 13/36.
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"update_every": 3, "rate_horizon": 3 / math.log(2)})
    for k in range(4):
        ref.step(lambda W, h=4 if k == 0 else 1: h * W[0] @ W[0] / 2, gradient=[vec(0)])
    assert ref.rate == pytest.approx([13 / 36])


# --- curvature ----------------------------------------------------------------------------


def own_blocks(loss, W):
    """Each layer's Hessian block, the other layers held: by `torch.func.hessian`, with no slicing at all."""

    def alone(i):
        return torch.func.hessian(lambda w: loss([*W[:i], w, *W[i + 1 :]]))(W[i])

    return [alone(i) for i in range(len(W))]


def dense(loss, W):
    return torch.func.hessian(lambda x: loss(list(x.split([w.numel() for w in W]))))(torch.cat(W))


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
    close(curvature(H, d, layers, "signs", [-1.0] * len(W)), torch.stack([d[i] @ (H @ d)[i] for i in layers]), 1e-12)


def test_signs_are_unbiased_over_4000_draws():
    loss, W, layers = tiny_net((2, 3, 2, 3, 1), 1)
    H, d = dense(loss, W), torch.randn(sum(w.numel() for w in W), dtype=torch.float64)
    draws = torch.randint(0, 2, (4000, len(W))) * 2.0 - 1
    found = torch.stack([curvature(H, d, layers, "signs", z.tolist()) for z in draws])
    assert (found.std(0) > 1e-3).all()  # the draws differ, or this test would prove nothing
    error = (found.mean(0) - curvature(H, d, layers, "blocks")).abs() / (found.std(0) / math.sqrt(4000))
    assert (error < 4).all(), error


@pytest.mark.parametrize("method", METHODS)
def test_step_measures_the_blocks_along_its_own_direction(method):
    loss, W, _ = tiny_net((3, 4, 2), 3)
    ref = method(W, curvature="blocks", update_every=2, ramp_steps=0)
    for _ in range(3):
        before, m, v = [w.clone() for w in ref.W], list(ref.m), list(ref.v)
        ref.step(loss)
    # The third step refreshed. Its direction again, from the moments it found and the gradient at `before`.
    for i, block in enumerate(own_blocks(loss, before)):
        g = torch.func.grad(lambda w, i=i: loss([*before[:i], w, *before[i + 1 :]]))(before[i])
        D = 1 / (((0.99 * v[i] + 0.01 * g * g) / (1 - 0.99**3)).sqrt() + 1e-8)
        ahead = 0.25 * m[i] + 0.75 * g
        along = {ReferenceSGDLW: g, ReferenceAdamWLW: g * D, ReferenceMuonLW: ahead / ahead.norm() * len(g) ** 0.5}
        d = -along[method]
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
