"""Random small models, their optimizers and losses, and the list of errors that a program may meet.

What `test_call_orders.py` draws its programs from.
"""

from __future__ import annotations

import io
import traceback
from typing import Any

import hypothesis
import hypothesis.stateful
import torch
from cases import OPTIMIZERS
from torch import Tensor, nn
from torch.nn import functional as F

from lwas_fast import CurvatureError

WIDTH, CLASSES, ROWS = 4, 7, 6

# Errors that calls in any order may raise: name -> (type, what docs/troubleshooting.md has as a heading).
DOCUMENTED: dict[str, tuple[type[Exception], str]] = {
    "average": (RuntimeError, "the parameters hold the average of the weights since opt.eval()"),
    "evaluated": (RuntimeError, "because the model was last called in evaluation mode"),
    "twice": (RuntimeError, "was called twice without opt.step() or opt.zero_grad() between"),
    "differences": (TypeError, "evaluates the loss twice: call opt.backward(closure)"),
    "no tensor": (TypeError, "must be the loss as a tensor"),
    "no scalar": (ValueError, "must be a scalar, not of shape"),
    "no graph": (ValueError, "has no graph: compute it from the parameters, with gradients enabled"),
    "graph gone": (CurvatureError, "the graph of this loss is gone"),
    "closure": (TypeError, "the closure of opt.step() must return the loss as a tensor"),
    "fused": (RuntimeError, "fused=True, but"),
    "both": (ValueError, "fused=True and foreach=True"),
    "mode": (RuntimeError, "in mid-training: its state lacks"),
    "range": (ValueError, "is not valid: it must be"),
    "whole": (ValueError, "it holds for the whole optimizer; pass it there"),
    "removed": (TypeError, "any more: "),
    "no dict": (TypeError, "param_group must be a dict"),
    "set": (TypeError, "must be in an ordered collection"),
    "no parameter": (TypeError, "parameters must be tensors"),
    "integers": (ValueError, "is not floating-point"),
    "not ours": (ValueError, "this optimizer has none of the module's parameters"),
    "other state": (ValueError, "the saved state is not of"),
    "lacks": (ValueError, "the saved state of parameter"),
    # torch's own
    "in two groups": (ValueError, "some parameters appear in more than one parameter group"),
    "other groups": (ValueError, "loaded state dict has a different number of parameter groups"),
    "other sizes": (ValueError, "loaded state dict contains a parameter group that doesn't match the size"),
    "names": (ValueError, "all optimizer params should be with/without names"),
    "no grad": (RuntimeError, "does not require grad and does not have a grad_fn"),
}
# Warnings likewise; torch's own are not counted.
WARNED = (
    "since a measurement of the curvature was due",
    "could not measure the curvature, and goes on at present rates",
    "could not use three measurements in a row of",
    "the model's weights are not those that the loaded state",
    "but the running statistics of its BatchNorm layers are those of the weights trained on",
    "here lr multiplies step sizes that are measured",
)


def name_of(error: Exception) -> str | None:
    """The documented error that this is, if it is one."""
    return next((n for n, (kind, text) in DOCUMENTED.items() if type(error) is kind and text in str(error)), None)


class Apart(nn.Module):
    """Calls a part in its own dtype, with or without the input added, once or twice."""

    def __init__(self, *parts: nn.Module, times: int = 1, adds: bool = False):
        super().__init__()
        self.inside, self.times, self.adds = nn.Sequential(*parts), times, adds

    def forward(self, x: Tensor) -> Tensor:
        own = next(self.parameters()).dtype
        for _ in range(self.times):
            x = x.to(own) + self.inside(x.to(own)) if self.adds else self.inside(x.to(own))
        return x


def _linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


PARTS: dict[str, Any] = {
    "tanh": lambda: Apart(_linear(), nn.Tanh()),
    "relu": lambda: Apart(_linear(), nn.ReLU()),
    "batchnorm": lambda: Apart(_linear(), nn.BatchNorm1d(WIDTH), nn.GELU()),
    "layernorm": lambda: Apart(nn.LayerNorm(WIDTH), _linear(), adds=True),
    "dropout": lambda: Apart(_linear(), nn.Dropout(0.3), nn.Softplus()),
    "nested": lambda: Apart(nn.Sequential(_linear(), nn.Sequential(nn.Tanh(), _linear())), adds=True),
    "shared": lambda: Apart(_linear(), nn.Tanh(), times=2),
    "frozen": lambda: Apart(_linear(), nn.Tanh()).requires_grad_(False),
}
DTYPES = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "float64": [torch.float64],
    "mixed": [torch.float32, torch.bfloat16, torch.float64],
    "half mixed": [torch.bfloat16, torch.float32],
}


class Net(nn.Module):
    """A small tree of modules, with a tensor without dimension, an empty one, and one that no loss reaches."""

    def __init__(self, parts: tuple[str, ...], embedding: bool, tied: bool, dtype: str):
        super().__init__()
        self.embedding = embedding
        self.entry = nn.Embedding(CLASSES, WIDTH) if embedding else nn.Linear(3, WIDTH)
        self.body = nn.ModuleList(PARTS[part]() for part in parts)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.gain, self.nothing = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Linear(2, 1)
        dtypes = DTYPES[dtype]
        for i, part in enumerate([self.entry, *self.body, self.head]):
            part.to(dtypes[i % len(dtypes)])
        for own in (self.gain, self.nothing, *self.unused.parameters()):
            own.data = own.data.to(dtypes[0])
        if tied and embedding:
            self.head.weight, self.head.bias.data = self.entry.weight, self.head.bias.data.to(self.entry.weight.dtype)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x = self.entry(batch[1] if self.embedding else batch[0].to(self.entry.weight.dtype))
        for part in self.body:
            x = part(x)
        x = self.head(x.to(self.head.weight.dtype))
        return x * self.gain + self.nothing.sum()


def batch_of(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, indices and classes."""
    made = torch.Generator().manual_seed(number)
    x = torch.randn(ROWS, 3, generator=made, dtype=torch.float64)
    return x, *torch.randint(CLASSES, (2, ROWS), generator=made).unbind()


LOSSES = ("entropy", "entropy", "entropy", "square", "huge", "tiny", "constant", "linear", "nan", "inf")


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], kind: str = "entropy") -> Tensor:
    """A loss that is bounded below and whose gradients do not drive weights to infinity; or one that is not finite."""
    out = model(batch)
    out = out if out.dtype == torch.float64 else out.float()
    if kind == "square":
        return (out.tanh() - 0.5).square().mean()
    if kind == "linear":
        return out.mean()
    factor = {"huge": 1e12, "tiny": 1e-12, "constant": 0.0, "nan": torch.nan, "inf": torch.inf}.get(kind, 1.0)
    return F.cross_entropy(out, batch[2]) * factor


def groups_of(model: nn.Module, style: str) -> Any:
    """What the optimizer is given."""
    named = list(model.named_parameters())
    if style == "model":
        return model
    if style == "named":
        return named
    if style == "bare":
        return [param for _, param in named]
    matrices = [(name, param) for name, param in named if param.ndim > 1]
    rest = [(name, param) for name, param in named if param.ndim <= 1]
    other = {"lr": 0.5, "weight_decay": 0.0, "update_every": 3}
    if style == "groups":
        return [{"params": matrices}, {"params": rest, **other}]
    return [{"params": [p for _, p in matrices], "ramp_steps": 2}, {"params": [p for _, p in rest], **other}]


def optimizer_of(kind: str, model: nn.Module, style: str, options: dict[str, Any]) -> Any:
    """The optimizer of a drawn program."""
    return OPTIMIZERS[kind](groups_of(model, style), **options)


def bits(model: nn.Module) -> list[Tensor]:
    """Copies of the weights."""
    return [param.detach().clone() for param in model.parameters()]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether they are equal to the last bit (NaN among them, or not)."""
    return len(ones) == len(others) and all(
        a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        for a, b in zip(ones, others, strict=True)
    )


def through_a_file(value: Any) -> Any:
    """Saved, and loaded with ``weights_only``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COUNTS = ("refreshes", "negative", "nonfinite", "no_descent", "growth", "capped", "skipped")


def counters(opt: Any) -> dict[str, dict[str, int]]:
    """What each layer has counted."""
    return {name: {key: int(row[key]) for key in COUNTS} for name, row in opt.diagnostics().items()}


def run_programs(machine: Any, row: Any, seed: int, count: int, calls: int) -> Any:
    """Run so many programs from one seed, and count them in a row of `make trust`; a failing one is made shorter.

    Returns the machine that ran, with what it counted.
    """
    found = hypothesis.settings(
        max_examples=count,
        stateful_step_count=calls,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    ran = type(machine.__name__, (machine,), {})
    hypothesis.seed(seed)(ran)
    try:
        hypothesis.stateful.run_state_machine_as_test(ran, settings=found)
    except Exception as error:
        row.missed.append("".join(traceback.format_exception(error)))
    row.tried = ran.sequences
    return ran
