"""The tables that the generic tests run over: optimizers and their options, small problems, helpers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from reference import ReferenceAdamWLW, ReferenceMuonLW, ReferenceSGDLW
from torch import Tensor, nn
from torch.nn import functional as F

from lwas_fast import SGDLW, AdamWLW, MuonLW

OPTIMIZERS = {"sgd": SGDLW, "adamw": AdamWLW}
ALL = {**OPTIMIZERS, "muon": MuonLW}  # for tests that look at directions, states or the plain update
COMPILED = {kind: cls for kind, cls in OPTIMIZERS.items() if cls.rule.operator is not None}
REFERENCES = {"sgd": ReferenceSGDLW, "adamw": ReferenceAdamWLW, "muon": ReferenceMuonLW}

# With momentum the package's defaults differ between the optimizers, and the reference's do not.
MOMENTUM: dict[str, Any] = {"schedule_free": False, "cap": 0.1, "ramp_steps": 0}

# Options under which behaviour must agree. Every option has a row in which it acts. Against the reference all rows run;
# elsewhere those that can differ in what the test looks at, by the names below.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "every_step": {"update_every": 1},
    "blocks": {"curvature": "blocks", "update_every": 3},
    "momentum": {**MOMENTUM, "ramp_steps": 9},
    "momentum_decay": {**MOMENTUM, "weight_decay": 0.3, "update_every": 2},
    "momentum_cap": {**MOMENTUM, "cap": 0.005, "update_every": 2},
    "momentum_maximize": {**MOMENTUM, "maximize": True, "update_every": 2, "cap": 0.02},
    "weight_decay": {"weight_decay": 0.3, "update_every": 2},
    "decay_of_matrices": {"weight_decay": 0.3, "weight_decay_on": "matrices", "update_every": 2},
    "momentum_decay_of_matrices": {**MOMENTUM, "weight_decay": 0.3, "weight_decay_on": "matrices", "update_every": 2},
    "warmup": {"warmup_steps": 5, "warmup_rate": 0.02, "update_every": 4},
    "ramp": {"ramp_steps": 12, "update_every": 4},
    "warmup_and_ramp": {"warmup_steps": 3, "ramp_steps": 6, "update_every": 3},
    "tight_cap": {"cap": 0.005, "update_every": 2},
    "no_cap": {"cap": math.inf, "update_every": 2, "ramp_steps": 0, "lr": 0.1},  # in full, rounding grows to anything
    "blocks_every_step": {"curvature": "blocks", "update_every": 1},
    "half_rate": {"lr": 0.5, "update_every": 2},
    "maximize": {"maximize": True, "update_every": 2, "cap": 0.02},
}
OWN_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sgd": {"no_momentum": {"momentum": 0.0, "update_every": 2}, "heavy_momentum": {"momentum": 0.99}},
    "adamw": {
        "betas": {"betas": (0.5, 0.8), "update_every": 2},
        "no_betas": {"betas": (0.0, 0.0), "update_every": 2},
        "large_eps": {"eps": 1e-1, "update_every": 2},
    },
    "muon": {
        "betas": {"betas": (0.8, 0.9), "update_every": 2},
        "no_betas": {"betas": (0.0, 0.0), "update_every": 2},
    },
}
MODES = ("defaults", "momentum")  # what state is kept
FEW = (*MODES, "blocks")  # and one product or one a layer
# Dynamo of torch 2.11 cannot trace an object of ours that a step makes; 2.12 was not tried.
NO_COMPILED_STEP = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="torch.compile(opt.step) needs torch 2.13"
)
DECAY = ("momentum_decay", "weight_decay", "decay_of_matrices", "momentum_decay_of_matrices")
STEP = (*MODES, *DECAY, "momentum_cap", "tight_cap", "maximize")  # what the update computes
BETWEEN = ("every_step", "blocks_every_step", "warmup", "ramp")  # no branch that other rows do not take


def rows_of(kind: str, *only: str, but: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """An optimizer's rows: these, or where none is named all, but for some."""
    rows = {**OPTIONS, **OWN_OPTIONS[kind]}
    return {name: rows[name] for name in only or rows if name not in but}


def each_case(*only: str, but: tuple[str, ...] = (), kinds: Iterable[str] = OPTIMIZERS) -> pytest.MarkDecorator:
    """Parametrize `kind` and `options` over these optimizers and rows."""
    cases = [(kind, name, row) for kind in kinds for name, row in rows_of(kind, *only, but=but).items()]
    ids = [f"{kind}-{name}" for kind, name, _ in cases]
    return pytest.mark.parametrize(("kind", "options"), [(kind, row) for kind, _, row in cases], ids=ids)


def small_net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Three layers of odd sizes, smooth, with negative curvature here and there."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Noisy batches of a small classification task."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, 3, generator=made, dtype=torch.float64)
    y = (x.sum(-1) + 0.5 * torch.randn(count, 16, generator=made, dtype=torch.float64) > 0).long()
    return [(a.to(dtype), b) for a, b in zip(x, y, strict=True)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy, computed in float32 at least."""
    x, y = batch
    out = model(x)
    return F.cross_entropy(out if out.dtype == torch.float64 else out.float(), y)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers: modules with parameters of their own."""
    return [m for m in model.modules() if list(m.parameters(recurse=False))]


def layer_vectors(model: nn.Module) -> list[Tensor]:
    """The layers as flat float64 vectors."""
    return [torch.cat([p.detach().double().flatten() for p in m.parameters(recurse=False)]) for m in layers_of(model)]


def reference_of(kind: str, model: nn.Module, **options: Any) -> Any:
    """The reference optimizer of a model's layers, from where the model stands."""
    only_matrices = options.pop("weight_decay_on", "all") == "matrices"
    reference = REFERENCES[kind](layer_vectors(model), **options)
    if kind == "muon":
        reference.shapes = [[p.shape for p in m.parameters(recurse=False)] for m in layers_of(model)]
    if only_matrices:
        kept = [p.clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(p.ndim > 1)
            reference.decays = layer_vectors(model)
            for p, value in zip(model.parameters(), kept, strict=True):
                p.copy_(value)
    return reference


def loss_of_vectors(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """The same loss as a function of such vectors."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(vectors: list[Tensor]) -> Tensor:
        flat, start, params = torch.cat(list(vectors)), 0, {}
        for name, shape in zip(names, shapes, strict=True):
            params[name] = flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
        x, y = batch
        return F.cross_entropy(torch.func.functional_call(model, params, (x.double(),)), y)

    return loss


def closing(opt: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """PyTorch's usual closure, of any loss."""

    def closure() -> Tensor:
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def rates_of(opt: torch.optim.Optimizer) -> Tensor:
    """The rates of an optimizer's layers, (L,)."""
    return torch.tensor(list(opt.rates().values()), dtype=torch.float64)


def usual(opt: torch.optim.Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """The same, of `loss_of`."""
    return closing(opt, lambda: loss_of(model, batch))


def take_step(opt: torch.optim.Optimizer, loss: Callable[[], Tensor], route: str = "closure") -> None:
    """A step by PyTorch's usual closure, or by `backward`."""
    if route == "closure":
        opt.step(closing(opt, loss))
    else:
        opt.zero_grad()
        opt.backward(loss())
        opt.step()


def train(
    opt: torch.optim.Optimizer, model: nn.Module, data: list[tuple[Tensor, Tensor]], how: str = "autograd"
) -> list[float]:
    """Train over the batches in one of the ways a user may write it; return the losses."""
    losses = []
    for batch in data:
        if how == "closure":
            loss = opt.step(usual(opt, model, batch))
        else:
            opt.zero_grad()
            loss = loss_of(model, batch)
            opt.backward(loss) if how == "autograd" else loss.backward()
            opt.step()
        losses.append(loss.item())
    return losses
