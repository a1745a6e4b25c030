"""What the tests of faults share: an optimizer in mid-training, all that must not be half changed, faults on demand."""

from __future__ import annotations

import copy
import dis
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from cases import MODES, OPTIMIZERS, rows_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# (optimizer, options, whether a model is followed)
CASES = {
    f"{kind}-{mode}{'-plain' if plain else ''}{'-followed' if followed else ''}": (
        kind,
        {**rows_of(kind)[mode], "update_every": 2, **({"foreach": True} if plain else {})},
        followed,
    )
    for kind in OPTIMIZERS
    for mode in MODES
    for plain in (False, True)
    for followed in (False, True)
}

QUICK = ("sgd-momentum-plain", "sgd-defaults-followed", "adamw-defaults")
# The rest takes minutes.
EACH_CASE = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)


class Run:
    """A small network, its optimizer after a few steps, and a batch for the step that something happens in."""

    def __init__(self, kind: str, options: dict[str, Any], followed: bool, steps: int = 3):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.opt = OPTIMIZERS[kind](self.model if followed else self.model.parameters(), **options)
        self.followed = followed
        made = torch.Generator().manual_seed(1)
        self.x = torch.randn(64, 8, 4, generator=made)
        self.y = torch.randint(3, (64, 8), generator=made)
        self.at = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(steps):
                self.step()

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x[self.at]), self.y[self.at])

    def closure(self) -> Tensor:
        self.opt.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def backward(self) -> None:
        self.opt.zero_grad()
        loss = self.loss()
        loss.backward() if self.followed else self.opt.backward(loss)

    def step(self) -> None:
        self.backward()
        self.opt.step()
        self.at += 1

    def due(self, whether: bool) -> Run:
        """Take steps until a measurement is due at the next, or is not."""
        while self.opt.curvature_due is not whether:
            self.step()
        return self

    def snapshot(self) -> dict[str, Any]:
        """Weights, state, groups; not gradients, nor running statistics, which any forward pass moves."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.opt.param_groups]
        state = {i: dict(self.opt.state.get(p, {})) for i, p in enumerate(self.model.parameters())}
        weights = [p.detach() for p in self.model.parameters()]
        return copy.deepcopy({"weights": weights, "state": state, "groups": groups})


def equal(one: Any, two: Any) -> bool:
    """Whether two snapshots are, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def points_of(call: Callable[[], object]) -> int:
    """At how many points of `call` Python may handle a signal, in whatever files but this folder's."""
    count = 0

    def at_point(_: FrameType) -> None:
        nonlocal count
        count += 1

    _traced(call, at_point)
    return count


def interrupted(call: Callable[[], object], point: int) -> tuple[bool, str]:
    """Send this process SIGINT at the n-th of these points; whether KeyboardInterrupt came of it, and where that was.

    After it, gradients are recorded as ever, whatever was left.
    """
    left, where = point, ""

    def at_point(frame: FrameType) -> None:
        nonlocal left, where
        left -= 1
        if left == -1:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            signal.raise_signal(signal.SIGINT)

    try:
        _traced(call, at_point)
    except KeyboardInterrupt:
        return True, where
    return False, where


_HERE = str(Path(__file__).parent)


@cache
def _handler(code: CodeType, instruction: int) -> object:
    """Where an exception of an instruction goes to."""
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        if entry.start <= instruction < entry.end:
            return entry.target, entry.depth
    return None


def _may_interrupt(code: CodeType, last: int, now: int) -> bool:
    """Whether Python looks for signals after one instruction: at a function's start, at a loop's end, after a call.

    An exception is raised before the next instruction here; where that is not in the same block, not at all.
    """
    name = dis.opname[code.co_code[last]]
    checks = name.startswith(("CALL", "RESUME", "JUMP_BACKWARD"))
    return checks and _handler(code, last) == _handler(code, now)


def _traced(call: Callable[[], object], at_point: Callable[[FrameType], None]) -> None:
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename.startswith(_HERE):
            return trace  # for what it calls
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            before, last[frame] = last.get(frame), frame.f_lasti
            if before is not None and _may_interrupt(frame.f_code, before, frame.f_lasti):
                at_point(frame)
        elif event == "return":
            last.pop(frame, None)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


class FailAt(TorchDispatchMode):
    """Raise at the n-th operation of torch inside, once."""

    def __init__(self, operation: int, error: type[Exception] = torch.OutOfMemoryError):
        super().__init__()
        self.left, self.error = operation, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:  # into memory that is there: what all restoring comes down to
            return func(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == -1:
            raise self.error(f"out of memory, planted at {func}" if self.failed_for_memory else f"planted at {func}")
        return func(*args, **(kwargs or {}))

    @property
    def failed_for_memory(self) -> bool:
        return issubclass(self.error, (torch.OutOfMemoryError, MemoryError))

    @property
    def hit(self) -> bool:
        return self.left < 0


@contextmanager
def warned() -> Iterator[list[warnings.WarningMessage]]:
    """Note what is warned of inside."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found
