"""The method itself, in float64, plain and slow: the oracle that the package is tested against.

After Bahamou & Goldfarb, arXiv 2305.13664 (its published summary). Of a layer λ = 1..L: W weights, g
gradient, m, v moments, H_λλ block of the Hessian, n updates with this one; k steps before; γ weight decay. β₁ is SGD's
momentum. Muon is like AdamW but for its direction; P_β is its alone:

    d  = −orth(β₂m⁺ + (1−β₂)g), m⁺ = β₂m + (1−β₂)g, wherever g's direction or m̂'s stands below; of each tensor
    orth of (a, b), both > 1: X ← M/‖M‖; five times X ← 3.4445X − 4.775Y + 2.0315XXᵀY, Y = XXᵀX; √max(a, b) X
    orth of n numbers in a row: √n M/‖M‖; 0 of 0. In a step elements of g that are not finite count as m's
    in a step each times √(u/q̂), u the mean of (β₂m⁺ + (1−β₂)g)² over the tensor, q⁺ = .99q + .01u, q̂ = q⁺/(1−.99ⁿ)
    P_β = √((1−β₂²)² + β₂⁴(1−β₂)/(1+β₂)), by which r is multiplied after warm-up

    ρ = −⟨g, d⟩   δ² = ⟨d, H_λλ d⟩ (+ γ‖d‖², SGD)   t = ρ / (δ (δ + (M/2) ρ)) / P,  M = ρ/(δ⟨F⟩); P below, 1 for given M
    F(W) − F(W + t d) ≥ (4/M²) ω((M/2) ρ/δ),  ω(z) = z − ln(1 + z),  if F is M-self-concordant along d and P = 1

Refresh at k = warmup_steps and then every T steps, T = update_every or, without one, (k − warmup_steps)/10 rounded
down, from 10 to 100, on the raw gradient, before any state changes (SGD: g ← g + γW, D = 1):

    v⁺ = β₂v + (1−β₂)g²    v̂ = v⁺/(1−β₂ⁿ)     D = 1/(√v̂ + ε)
    d  = −Dg
    c  = z_λ⟨d_λ, (Hv)_λ⟩/s_λ, v = (z_μ s_μ d_μ)_μ (signs), or ⟨d_λ, H_λλ d_λ⟩ (blocks)
    s  = 1, but h/√|c| rounded down to a power of two, at most 1, where √|c| > 100 times its median over layers, h²
         the sum of |c| where it is not; c of the last refresh
    ρ  = −⟨g, d⟩           q = ‖d‖²           δ² = |c| (AdamW), |c| + γq (SGD)
    β  = exp(−T/rate_horizon), 0 for a horizon of 0; it is max(100, 5T), T the steps since the last refresh
    ⟨F⟩ = mean of |F| over refreshes, this one too: (βD + (1−β)|F|)/(βw + (1−β)), D kept as E is; x = ρ²/(δ²⟨F⟩) ≤ 100,
    so t = ρ/δ²/(1 + x/2)/P, P = max(1, Σ x/(1 + x/2)) over all layers: unless x is cut, the tρ add up to ⟨F⟩ at most
    t ← min(t, max_growth · rate), max_growth = 100; AdamW, Muon: then E ← min(E, 10tw)
    E ← βE + (1−β)t        w ← βw + (1−β)     rate = E/w      (E, w start at 0, rate at warmup_rate)

Every step, with the gradient as it then stands (clipped, accumulated):

    v ← v⁺                      a = cap · max(‖W‖, 0.01√N)/‖d‖    (decoupled γ > 0: at most cap/γ)
    s = min(G rate, b), b being a of the step before with ℓ for ‖d‖, but a in the first; s ← a if s > 1.25a
    ℓ ← min(ℓ, 4‖d‖), then ℓ² ← .8 ℓ² + .2 min(‖d‖, 2ℓ)²; in the first ℓ ← ‖d‖
    r = s · lr · min(1, (k − warmup_steps + 1)/ramp_steps)             (warm-up: warmup_rate for G rate, no ramp)

    schedule-free (Defazio et al., arXiv 2405.15682; Z = X = W at the start):    d = −Dg
    G = 1/√(1−β₁+β₁/(k+1)), but 1 where nothing was measured yet
    Z ← Z + rd (SGD)            Z ← Z + r(d − γW) (AdamW, Muon)
    X ← X + (Z − X)/n           W ← β₁X + (1−β₁)Z

    with momentum:              m ← β₁m + (1−β₁)g    m̂ = m/(1−β₁ⁿ)    d = −Dm̂    G = 1
    W ← W + rd (SGD)            W ← (1 − rγ)W + rd (AdamW, Muon)

NaN, Inf and ρ ≤ 0 leave a layer's statistics alone. An element whose squared gradient is not
finite is left alone and no part of ‖d‖; n counts updates that leave any element alive. From the summary: ρ, δ²,
t, its bound, T, γ, warm-up, EMA. Ours: all else, from probes to guards, M and G.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

Loss = Callable[[list[Tensor]], Tensor]
Signs = Sequence[float] | None
EVENTS = ("negative", "nonfinite", "nondescent", "growth", "capped", "skipped", "refreshes")


def closed_form(rho: Any, delta2: Any, M: float = 2.0) -> Any:
    """Step size ρ / (δ (δ + (M/2) ρ)), for floats (δ² > 0) or tensors of one shape (there 1/0 is Inf)."""
    return rho / (delta2**0.5 * (delta2**0.5 + (M / 2) * rho))


def omega(z: Any) -> Any:
    """Return z − ln(1 + z), for a float z > −1 or a tensor of any shape."""
    return z - (torch.log1p(z) if isinstance(z, Tensor) else math.log1p(z))


def decrease_bound(rho: Any, delta2: Any, M: float = 2.0) -> Any:
    """What that step gains at least if F is M-self-concordant (M > 0): (4/M²) ω((M/2) ρ/δ)."""
    return (4 / M**2) * omega((M / 2) * rho / delta2**0.5)


def curvature(H: Tensor, d: Tensor, layers: Sequence[slice], estimator: str, z: Signs = None) -> Tensor:
    """Each layer's curvature c along d, before |·| and weight decay: a tensor (L,).

    Args:
        H: (n, n) Hessian of the loss without weight decay.
        d: (n,) the directions of the L layers, one after another; same dtype.
        layers: Where in d each layer lies.
        estimator: "blocks" (exact) or "signs" (unbiased for blocks).
        z: One +1 or −1 per layer, for "signs" only, where not to have it is a ValueError.
    """
    if estimator == "blocks":
        return torch.stack([d[i] @ H[i, i] @ d[i] for i in layers])
    if estimator != "signs" or z is None or len(z) != len(layers):
        raise ValueError(f"need 'blocks', or 'signs' and a z per layer, not {estimator!r}, z={z}")
    Hv = H @ torch.cat([s * d[i] for s, i in zip(z, layers, strict=True)])
    return torch.stack([s * (d[i] @ Hv[i]) for s, i in zip(z, layers, strict=True)])


@dataclasses.dataclass
class Hyper:
    """Hyperparameters of all layers. They may be changed between steps: `ref.hyper.lr = 0.5`."""

    lr: float = 1.0
    momentum: float = 0.9  # SGD only
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW and Muon
    eps: float = 1e-8  # AdamW only
    weight_decay: float = 0.0
    update_every: int | None = None
    curvature: str = "signs"
    schedule_free: bool = True
    cap: float = 0.2
    warmup_steps: int = 0
    warmup_rate: float = 1e-2
    ramp_steps: int = 0
    maximize: bool = False
    # Constants of the package; the tests of the theory vary them.
    rate_horizon: float | None = None
    max_growth: float = 100.0
    self_concordance: float | None = None  # M; None: ρ/(δ⟨F⟩)


class Reference:
    """What the two methods share.

    Args:
        W: One (N,) tensor per layer; copied, in float64.
        **hyper: The fields of `Hyper` that differ from the defaults; TypeError for one that does not exist.

    Attributes:
        W: The layers, (N,) float64 tensors, replaced at every step.
        Z, X: Likewise the iterates and their averages, if schedule-free.
        applied: r of the last step per layer; 0 where the layer was left alone.
        last: Per layer descent (ρ), curvature (c, raw) and q of the last usable refresh; NaN before it.
        events: Per layer, how often each of `EVENTS` happened.
    """

    adam: ClassVar[bool]  # whether Adam's formulas of the docstring above hold
    decoupled: ClassVar[bool]  # weight decay; and betas, not momentum, are the hyperparameters
    resized: ClassVar[bool] = False  # whether a step's direction is another than a refresh's
    max_fall: ClassVar[float]  # of a rate to a measured one
    defaults: ClassVar[Hyper]

    def __init__(self, W: Sequence[Tensor], **hyper: Any) -> None:
        self.hyper = dataclasses.replace(self.defaults, **hyper)
        self.W = [w.detach().to(torch.float64, copy=True) for w in W]
        self.Z, self.X = list(self.W), list(self.W)
        self.decays = [torch.ones_like(w) for w in self.W]  # 0 where weight decay does not act
        self.share = math.nan  # of X in W
        self.m, self.v = ([torch.zeros_like(w) for w in self.W] for _ in range(2))
        self.E, self.w, self.D, self.applied, self.size, self.length = ([0.0] * len(W) for _ in range(6))
        self.k, self.n = 0, [0] * len(W)  # steps and updates done so far
        self.last_k: int | None = None
        self.due = self.hyper.warmup_steps
        self.last = [dict.fromkeys(("descent", "curvature", "q"), math.nan) for _ in W]
        self.events = [dict.fromkeys(EVENTS, 0) for _ in W]

    @property
    def rate(self) -> list[float]:
        """The rate of each layer, before cap, lr and ramp."""
        return [E / w if w > 0 else self.hyper.warmup_rate for E, w in zip(self.E, self.w, strict=True)]

    @property
    def interval(self) -> int:
        """T of a refresh at this step."""
        return self.hyper.update_every or min(max(10, (self.k - self.hyper.warmup_steps) // 10), 100)

    def step(self, loss: Loss, z: Signs = None, gradient: Sequence[Tensor] | None = None) -> None:
        """Refresh if that is due, then update.

        Args:
            loss: Scalar, twice differentiable function of the list of layers (of each), without weight decay.
            z: One +1 or −1 per layer, for a refresh with "signs".
            gradient: Stands for the gradient in the update: what clipping made of it. In a refresh it has no part, but
                that the rate is one for its direction (AdamW).
        """
        h, sign, sizes = self.hyper, -1 if self.hyper.maximize else 1, [w.numel() for w in self.W]
        l2 = 0.0 if self.decoupled else h.weight_decay
        W = [w.clone().requires_grad_() for w in self.W]
        pulls = [l2 * e * w for e, w in zip(self.decays, self.W, strict=True)]
        g = [g_i + pull for g_i, pull in zip(torch.autograd.grad(sign * loss(W), W), pulls, strict=True)]
        clipped = None
        if gradient is not None:
            clipped = [sign * g_i + pull for g_i, pull in zip(gradient, pulls, strict=True)]
        if self.k == self.due:
            H = torch.func.hessian(lambda x: sign * loss(list(x.split(sizes))))(torch.cat(self.W))
            self._refresh(g, H, z, loss(self.W).abs().item(), clipped)
            self.last_k, self.due = self.k, self.k + self.interval
        g = g if clipped is None else clipped
        for i, g_i in enumerate(g):
            self._update(i, g_i)
        self.k, self.share = self.k + 1, h.betas[0] if self.decoupled else h.momentum

    def _moments(self, i: int, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """m⁺, v⁺, the direction of this gradient alone, and that of the momentum; another method has others."""
        h, n = self.hyper, self.n[i] + 1
        beta1, beta2 = h.betas if self.adam else (h.momentum, 0.0)
        m, v = beta1 * self.m[i] + (1 - beta1) * g, beta2 * self.v[i] + (1 - beta2) * g**2
        D = 1 / ((v / (1 - beta2**n)).sqrt() + h.eps) if self.adam else torch.ones_like(g)
        return m, v, -D * g, -D * (m / (1 - beta1**n))

    def _keep(self, i: int, m: Tensor, v: Tensor, alive: Tensor) -> None:
        self.m[i], self.v[i] = torch.where(alive, m, self.m[i]), torch.where(alive, v, self.v[i])

    def _persistence(self) -> float:
        return 1.0

    def _refresh(
        self, g: list[Tensor], H: Tensor, z: Signs, F: float = 1.0, clipped: list[Tensor] | None = None
    ) -> None:
        h, d, layers, start = self.hyper, [], [], 0
        for i, g_i in enumerate(g):
            d.append(self._moments(i, g_i)[2])
            layers.append(slice(start, start := start + g_i.numel()))
        T = self.interval if self.last_k is None else self.k - self.last_k
        horizon = max(100, 5 * T) if h.rate_horizon is None else h.rate_horizon
        beta = math.exp(-T / horizon) if horizon > 0 else 0.0
        s = self._shares() if h.curvature == "signs" else [1.0] * len(g)
        d_s = torch.cat([s_i * d_i for s_i, d_i in zip(s, d, strict=True)])
        found = []
        for i, c in enumerate(curvature(H, d_s, layers, h.curvature, z)):
            ratio = torch.tensor(1.0)
            if clipped is not None and self.adam:
                ratio = self._moments(i, clipped[i])[2].norm() / d[i].norm()
                ratio = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
            c = c / s[i] ** 2 * ratio**2
            count, rho, q = self.events[i], -g[i] @ d[i] * ratio, d[i] @ d[i]
            delta2 = c.abs() + (0.0 if self.decoupled or not self.decays[i].any() else h.weight_decay) * q
            w, D = (beta * old + (1 - beta) * new for old, new in ((self.w[i], 1.0), (self.D[i], F)))
            x = (rho * (rho / delta2) / (D / w)).clamp(max=100.0)
            M = x * delta2**0.5 / rho if h.self_concordance is None else h.self_concordance
            t = closed_form(rho, delta2, M).item()
            count["negative"] += int(c < 0)
            finite = rho.isfinite() and delta2.isfinite() and (math.isfinite(t) or rho <= 0)
            if not finite or rho <= 0:
                count["nondescent" if finite else "nonfinite"] += 1
                continue
            self.last[i] = {"descent": rho.item(), "curvature": c.item(), "q": q.item()}
            found.append((i, t, w, D, (x / (1 + x / 2)).item()))
        P = max(1.0, sum(promise for *_, promise in found)) if h.self_concordance is None else 1.0
        for i, t, w, D, _ in found:
            limit = h.max_growth * self.rate[i] if self.w[i] > 0 else math.inf
            self.events[i]["growth"] += int(t / P > limit)
            t = min(t / P, limit)
            self.E[i] = beta * min(self.E[i], self.max_fall * t * self.w[i] if self.w[i] > 0 else 0.0) + (1 - beta) * t
            self.w[i], self.D[i] = w, D
            self.events[i]["refreshes"] += 1

    def _shares(self) -> list[float]:
        size = [abs(last["curvature"]) ** 0.5 for last in self.last]
        known = sorted(x for x in size if x > 0)
        most = 100 * known[(len(known) - 1) // 2] if known else math.inf
        rest = math.hypot(*(x for x in known if x <= most))
        return [min(1.0, 2.0 ** math.floor(math.log2(rest / x))) if x > most else 1.0 for x in size]

    def _update(self, i: int, g: Tensor) -> None:
        h, self.applied[i], alive = self.hyper, 0.0, (g * g).isfinite()
        beta1 = h.betas[0] if self.decoupled else h.momentum
        if h.schedule_free and beta1 != self.share:  # changed by a scheduler: mix anew
            self.W[i] = beta1 * self.X[i] + (1 - beta1) * self.Z[i]
        W = self.W[i]
        self.events[i]["skipped"] += int(not alive.all())
        if not (alive.any() or alive.all()):
            return
        m, v, alone, averaged = self._moments(i, torch.where(alive, g, self.m[i]))
        self._keep(i, m, v, alive)
        self.n[i] += 1
        d, since = alone if h.schedule_free and not self.resized else averaged, self.k - h.warmup_steps
        d = torch.where(alive, d, 0.0)
        decay = h.weight_decay if self.decoupled else 0.0
        G = 1 / math.sqrt(1 - beta1 + beta1 / (self.k + 1)) if h.schedule_free and self.w[i] > 0 else 1.0
        P = self._persistence() if since >= 0 else 1.0
        rate = G * self.rate[i] if since >= 0 else h.warmup_rate
        ramp = min(1.0, (since + 1) / h.ramp_steps) if since >= 0 and h.ramp_steps > 0 else 1.0
        size, length = max(W.norm().item(), 0.01 * math.sqrt(W.numel())), d.norm().item()
        step = self._bounded(i, rate, size, length, decay)
        self.events[i]["capped"] += int(step < rate)
        r = self.applied[i] = step * h.lr * ramp * P
        if h.schedule_free:
            self.Z[i] = torch.where(alive, self.Z[i] + r * (d - decay * self.decays[i] * W), self.Z[i])
            self.X[i] = torch.where(alive, self.X[i] + (self.Z[i] - self.X[i]) / self.n[i], self.X[i])
            self.W[i] = beta1 * self.X[i] + (1 - beta1) * self.Z[i]
        else:
            self.W[i] = torch.where(alive, (1 - r * decay * self.decays[i]) * W + r * d, W)

    def _bounded(self, i: int, rate: float, size: float, length: float, decay: float) -> float:
        def largest(size: float, length: float) -> float:
            bound = self.hyper.cap * size / length if length > 0 else math.inf
            return min(bound, self.hyper.cap / decay) if decay > 0 else bound  # to decay by more is a runaway as well

        expected = self.length[i]
        step, bound = min(rate, largest(self.size[i], expected)), largest(size, length)
        if 0 < length < math.inf:
            average = min(expected, 4 * length)
            self.length[i] = math.hypot(0.8**0.5 * average, 0.2**0.5 * min(length, 2 * average)) or length
        known, self.size[i] = self.size[i] > 0, size
        return step if known and step <= 1.25 * bound else min(rate, bound)


class ReferenceSGDLW(Reference):
    """SGD-m-LW: momentum as an average, L2 weight decay."""

    adam, decoupled, max_fall, defaults = False, False, math.inf, Hyper(cap=0.15, ramp_steps=50)


class ReferenceAdamWLW(Reference):
    """AdamW-LW: Adam's direction, decoupled weight decay."""

    adam, decoupled, max_fall, defaults = True, True, 10.0, Hyper(weight_decay=0.01, warmup_rate=1e-3)


def orthogonal(M: Tensor) -> Tensor:
    """Make a tensor's singular values about equal, as a matrix of its first dimension by the others."""
    if not M.any():
        return torch.zeros_like(M)
    X = M.reshape(M.shape[0], -1) if M.ndim > 1 else M.reshape(1, -1)
    X = X / X.norm()
    if min(X.shape) > 1:
        for _ in range(5):
            Y = X @ X.T @ X
            X = 3.4445 * X - 4.775 * Y + 2.0315 * X @ X.T @ Y
    return (math.sqrt(max(X.shape)) * X).reshape(M.shape)


class ReferenceMuonLW(Reference):
    """Muon-LW: the same direction in both modes, decoupled weight decay.

    Attributes:
        shapes: Of each layer's tensors, one after another in its vector. To be set before a step; without them each
            layer is one vector.
    """

    adam, decoupled, resized, max_fall = False, True, True, 10.0
    defaults = Hyper(betas=(0.9, 0.5), weight_decay=0.01, warmup_rate=1e-3)
    shapes: Sequence[Sequence[torch.Size]] | None = None

    def _moments(self, i: int, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        beta = self.hyper.betas[1]
        m = beta * self.m[i] + (1 - beta) * g
        ahead = beta * m + (1 - beta) * g
        shapes = [g.shape] if self.shapes is None else self.shapes[i]
        q, d = [], []
        for part, old, shape in zip(*(self._split(i, x) for x in (ahead, self.v[i])), shapes, strict=True):
            q.append(torch.full_like(part, 0.01 * part.square().mean()) + 0.99 * old)
            size = (part.square() / (q[-1] / (1 - 0.99 ** (self.n[i] + 1)))).mean().sqrt() if part.any() else 0.0
            d.append(-size * orthogonal(part.view(shape)).flatten())
        unit = -torch.cat([orthogonal(p.view(s)).flatten() for p, s in zip(self._split(i, ahead), shapes, strict=True)])
        return m, torch.cat(q), unit, torch.cat(d)

    def _split(self, i: int, x: Tensor) -> Sequence[Tensor]:
        return [x] if self.shapes is None else x.split([shape.numel() for shape in self.shapes[i]])

    def _keep(self, i: int, m: Tensor, v: Tensor, alive: Tensor) -> None:
        any_of = torch.cat([part.any().expand_as(part) for part in self._split(i, alive)])
        self.m[i], self.v[i] = torch.where(alive, m, self.m[i]), torch.where(any_of, v, self.v[i])

    def _persistence(self) -> float:
        beta = self.hyper.betas[1]
        return math.sqrt((1 - beta**2) ** 2 + beta**4 * (1 - beta) / (1 + beta))
