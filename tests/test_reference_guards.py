"""The float64 reference around the closed form.

What each test catches:

* torch's AdamW: bias corrections and decoupled decay, over many steps.
* guards, warm-up, ramp, maximize, gradient=: one test each, with the number or counter that must come out.
"""

from __future__ import annotations

import math

import pytest
import torch
from reference import EVENTS, ReferenceAdamWLW, ReferenceMuonLW, ReferenceSGDLW
from reference_cases import METHODS, PLAIN, close, tiny_net, vec

# --- everything around the closed form ----------------------------------------------------


def test_a_warm_up_without_end_is_torchs_adamw():
    loss, W, _ = tiny_net((3, 4, 2), 0)
    params = [w.clone().requires_grad_() for w in W]
    shared = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    ref = ReferenceAdamWLW(W, **shared, cap=math.inf, warmup_steps=99, warmup_rate=0.02, schedule_free=False)
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
    ref = ReferenceSGDLW([vec(5)], **hyper, cap=math.inf, warmup_steps=99, warmup_rate=0.1, schedule_free=False)
    w, seen = 5.0, []
    for k in range(10):
        given = math.sin(k)
        ref.step(lambda W: W[0].sum(), gradient=[vec(given)])
        seen.append(given + 0.5 * w)
        shares = [0.8 ** (k - i) for i in range(k + 1)]
        w -= 0.1 * sum(s * g for s, g in zip(shares, seen, strict=True)) / sum(shares)
        assert ref.W[0].item() == pytest.approx(w, rel=1e-13)


def test_three_schedule_free_steps_by_hand():
    # Gradients 1, 2, 4 at rate 0.1, momentum 1/2: Z = 4.9, 4.7, 4.3; X = 4.9, 4.8, 13.9/3; W = (X + Z)/2.
    ref = ReferenceSGDLW([vec(5)], momentum=0.5, cap=math.inf, warmup_steps=99, warmup_rate=0.1)
    found = []
    for given in (1, 2, 4):
        ref.step(lambda W: W[0].sum(), gradient=[vec(given)])
        found.append((ref.Z[0].item(), ref.X[0].item(), ref.W[0].item()))
    expected = [(4.9, 4.9, 4.9), (4.7, 4.8, 4.75), (4.3, 13.9 / 3, (13.9 / 3 + 4.3) / 2)]
    assert [x for row in found for x in row] == pytest.approx([x for row in expected for x in row], rel=1e-14)


def test_a_schedule_free_step_is_longer_than_the_measured_one():
    # F = ½w² at w = 1 (gradients of 0 keep it there): t = ½. With momentum ¾ the weights make ¼ + ¾/k of a step in the
    # k-th, and the step is the measured one divided by that root: 1, then √1.6, then √2.
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"schedule_free": True, "momentum": 0.75})
    applied = []
    for gradient in ([vec(0)], [vec(0)], None):
        ref.step(lambda W: W[0] @ W[0] / 2, gradient=gradient)
        applied += ref.applied
    assert ref.rate == pytest.approx([0.5])
    assert applied == pytest.approx([0.5, 0.5 * math.sqrt(1.6), 0.5 * math.sqrt(2)])
    close(ref.Z[0], vec(1 - 0.5 * math.sqrt(2)))
    # A cap holds the whole step; decoupled decay acts along with it, at most by the cap: d = -1, Z = 1 + 0.05 (-1 - 2).
    hyper = PLAIN | {"schedule_free": True, "betas": (0.75, 0.9), "cap": 0.1, "weight_decay": 2.0}
    ref = ReferenceAdamWLW([vec(1)], **hyper, eps=0.0)
    ref.step(lambda W: W[0] @ W[0] / 2)
    assert ref.applied == pytest.approx([0.05])  # cap / weight_decay
    close(ref.Z[0], vec(1 + 0.05 * (-1 - 2)))


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
def test_maximize_is_minimising_the_negative(method):
    loss, W, _ = tiny_net((3, 4, 2), 4)
    up, down = (method(W, maximize=m, update_every=2) for m in (True, False))
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
    raw, clipped = (ReferenceAdamWLW(W, schedule_free=False, cap=math.inf) for _ in range(2))
    raw.step(loss, [1.0, -1.0])
    clipped.step(loss, [1.0, -1.0], [torch.zeros_like(w) for w in W])
    assert raw.rate == clipped.rate
    for w, before, moved, r in zip(clipped.W, W, raw.W, clipped.rate, strict=True):
        close(w, (1 - 0.01 * r) * before)  # d = 0: the decay, γ = 0.01, is left, and nothing caps it
        assert (moved - before).norm() > 1e-3 * before.norm()


# --- guards: each fires when it should, and nothing else does -----------------------------


def fired(ref, layer=0):
    return {name: n for name, n in ref.events[layer].items() if n}


@pytest.mark.parametrize("method", METHODS)
def test_nan_gradient_leaves_its_elements_alone(method):
    def loss(W):
        return (W[0] @ W[0] + W[1] @ W[1]) / 2

    ref = method([vec(1, 2), vec(3, 4)], weight_decay=0.1, update_every=1, curvature="blocks", schedule_free=False)
    ref.step(loss)
    frozen = [x[0] for x in (ref.m, ref.v, ref.n, ref.E, ref.w, ref.last)]
    before = [w.clone() for w in ref.W]
    # A gradient spoilt by the clipping's own overflow: that element stops, the measurement was fine.
    ref.step(loss, gradient=[vec(math.nan, 1), vec(1, 1)])
    assert (ref.W[0][0], ref.m[0][0]) == (before[0][0], frozen[0][0])
    assert (ref.v[0][0] == frozen[1][0]) == (method is not ReferenceMuonLW)  # whose v is the tensor's
    assert ref.W[0][1] != before[0][1]
    new, g = 0.5 if method is ReferenceMuonLW else 0.1, 1 + (0 if ref.decoupled else 0.1 * before[0][1])
    assert ref.m[0][1] == pytest.approx((1 - new) * frozen[0][1] + new * g)
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
    # A loss that is NaN: nothing is measured, though the other layer, whose gradient is not, takes its step.
    frozen = [x[0] for x in (ref.E, ref.w, ref.last)]
    ref.step(lambda W: loss(W) + (W[0] * math.inf * 0).sum())
    assert [x[0] for x in (ref.E, ref.w, ref.last)] == frozen
    assert torch.equal(ref.W[0], before[0])
    assert (ref.events[0]["nonfinite"], ref.events[0]["skipped"], ref.events[0]["refreshes"]) == (1, 3, 3)
    assert (ref.events[1]["nonfinite"], ref.events[1]["skipped"], ref.events[1]["refreshes"]) == (1, 0, 3)
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


def test_no_curvature_and_no_gradient():
    ref = ReferenceSGDLW([vec(1)], **PLAIN)
    ref.step(lambda W: W[0].sum())  # δ = 0: t = 1/0
    assert fired(ref) == {"nonfinite": 1}
    ref.step(lambda W: 0 * W[0] @ W[0])  # ρ = 0: 0/0, but what is missing is descent
    assert fired(ref) == {"nonfinite": 1, "nondescent": 1}
    ref = ReferenceAdamWLW([vec(1)], **PLAIN | {"weight_decay": 1.0})
    ref.step(lambda W: W[0].sum())  # decoupled decay is no part of the loss
    assert fired(ref) == {"nonfinite": 1}
    ref = ReferenceSGDLW([vec(1)], **PLAIN | {"weight_decay": 1.0})
    ref.step(lambda W: W[0].sum())  # L2 is: g = 1 + 1·1, ρ = q = 4, c = 0, δ² = 0 + 1·4: t = 4/(2·(2 + 4))
    assert ref.rate == pytest.approx([1 / 3])
    assert fired(ref) == {"refreshes": 1}


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
    # AdamW, γ = 4, W = 100: d = −1, t = ρ/(δ(δ + ρ)) with δ² = c; cap 1: a = min(1·100/1, 1/4).
    ref = ReferenceAdamWLW([vec(100)], **PLAIN | {"cap": 1.0, "weight_decay": 4.0, "eps": 0.0})
    ref.step(lambda W: W[0].sum() * 600 + 2 * W[0] @ W[0])  # ρ = 1000, δ² = 4: t = 1000/(2·1002) ≈ 0.499
    assert ref.applied == [0.25]
    assert fired(ref) == {"refreshes": 1, "capped": 1}
    close(ref.W[0], vec(-0.25))  # (1 − 0.25·4)·100 − 0.25
    ref = ReferenceSGDLW([vec(100)], **PLAIN | {"cap": 1.0, "weight_decay": 4.0})  # in SGD it is in d already
    ref.step(lambda W: W[0].sum() * 1e3)
    assert ref.applied == ref.rate


def test_warm_up_is_capped_too_and_all_events_are_named():
    ref = ReferenceSGDLW([vec(1)], warmup_steps=1, warmup_rate=0.5, momentum=0.0)
    ref.step(lambda W: W[0].sum())
    assert ref.applied == pytest.approx([0.15])
    assert fired(ref) == {"capped": 1}
    assert set(ref.events[0]) == set(EVENTS)
