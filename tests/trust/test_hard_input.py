"""Training that meets what models and losses bring: NaN, zeros, extremes, parameters that come, go and change.

Catches: a NaN that stays in the weights or in the state of others, a layer that is never measured again, an exception
or a silent standstill where torch's own optimizers go on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS
from torch import Tensor, nn
from torch.nn import functional as F
from trust.whole import CASES, EACH_CASE, Run, warned

BAD = (math.nan, math.inf, -math.inf)


class _TimesOnTheWayBack(torch.autograd.Function):
    """Leaves values as they are; gradients are multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


class BadCurvature(_TimesOnTheWayBack):
    """Leaves values and gradients as they are; what is differentiated through the gradient is multiplied."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _TimesOnTheWayBack.apply(gradient, ctx.factor), None


def first_element(gradient: Tensor, value: float) -> Tensor:
    found = gradient.clone()
    found.view(-1)[0] = value
    return found


# How a number that is none comes into a step: what the loss becomes, and a hook on a gradient.
FAULTS: dict[str, Callable[[Run, float], Any]] = {
    "loss": lambda run, bad: (lambda loss: loss * bad, None),
    "gradient": lambda run, bad: (None, lambda g: g * bad),
    "element of a gradient": lambda run, bad: (None, lambda g: first_element(g, bad)),
    "curvature": lambda run, bad: (lambda loss: BadCurvature.apply(loss, bad), None),
}


def all_finite(run: Run) -> bool:
    tensors = [*run.model.parameters(), *(t for entry in run.opt.state.values() for t in entry.values())]
    return all(bool(torch.isfinite(t).all()) for t in tensors) and all(map(math.isfinite, run.opt.rates().values()))


@EACH_CASE
def test_numbers_that_are_none(tally, case):
    with tally("NaN and infinities in loss, gradient, curvature: weights and state finite, training goes on") as row:
        for (name, fault), bad, due in itertools.product(FAULTS.items(), BAD, (True, False)):
            run = Run(*CASES[case]).due(due)
            change, hook = fault(run, bad)
            handle = run.model[0].weight.register_hook(hook) if hook is not None else None
            with warned():
                loss = run.loss()
                run.opt.zero_grad()
                loss = loss if change is None else change(loss)
                loss.backward() if run.followed else run.opt.backward(loss)
                run.opt.step()
                if handle is not None:
                    handle.remove()
                here = f"{case}, {bad} in the {name}, {'due' if due else 'not due'}"
                row.held(all_finite(run), f"{here}: not finite")
                before = run.snapshot()["weights"]
                seen = {layer: counts["refreshes"] for layer, counts in run.opt.diagnostics().items()}
                for _ in range(6):
                    run.step()
            row.held(all_finite(run), f"{here}: not finite later")
            moved = [not torch.equal(a, b) for a, b in zip(before, run.snapshot()["weights"], strict=True)]
            row.held(all(moved), f"{here}: parameters stand still")
            now = {layer: counts["refreshes"] for layer, counts in run.opt.diagnostics().items()}
            row.held(all(now[layer] > seen[layer] for layer in seen), f"{here}: not measured again")


# --- what happens to models ---


class Task:
    """A network without normalisation, an optimizer, and steps on any loss."""

    def __init__(self, case: str):
        kind, options, self.followed = CASES[case]
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.opt = OPTIMIZERS[kind](self.model if self.followed else self.model.parameters(), **options)
        made = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(32, 4, generator=made), torch.randint(3, (32,), generator=made)

    def steps(self, count: int = 8, factor: float = 1.0, rows: int = 32, closure: bool = False) -> None:
        def evaluate(measures: bool) -> Tensor:
            self.opt.zero_grad()
            x = self.x[:rows].to(self.model[0].weight.dtype)
            loss = factor * F.cross_entropy(self.model(x).float(), self.y[:rows])
            self.opt.backward(loss) if measures else loss.backward()
            return loss

        for _ in range(count):
            if closure:
                self.opt.step(lambda: evaluate(False))
            else:
                evaluate(not self.followed)
                self.opt.step()


def freeze_and_thaw(task: Task) -> None:
    task.steps()
    task.model[0].requires_grad_(False)
    before = task.model[0].weight.clone()
    task.steps()
    assert torch.equal(before, task.model[0].weight)
    task.model[0].requires_grad_(True)
    task.steps()
    assert not torch.equal(before, task.model[0].weight)
    assert all(row["refreshes"] > 0 for row in task.opt.diagnostics().values())


def replace_parameter(task: Task) -> None:
    task.steps()
    (group,) = task.opt.param_groups
    new = nn.Parameter(task.model[0].weight.detach().clone())
    group["params"] = [new if p is task.model[0].weight else p for p in group["params"]]
    task.model[0].weight = new
    before = new.detach().clone()
    task.steps()
    assert not torch.equal(before, task.model[0].weight)


def cast(task: Task, dtype: torch.dtype) -> None:
    task.steps()
    task.model.to(dtype)
    task.steps()
    task.steps(closure=True)


def no_gradient_for_a_layer(task: Task) -> None:
    for k in range(8):
        task.opt.zero_grad()
        loss = F.cross_entropy(task.model(task.x).detach() if k % 2 else task.model(task.x), task.y)
        if loss.requires_grad:
            loss.backward() if task.followed else task.opt.backward(loss)
        task.opt.step()


def other_state(task: Task, change: Callable[[dict[str, Any]], object]) -> None:
    task.steps()
    change(task.opt.state[task.model[0].weight])
    task.steps()


EVENTS: dict[str, Callable[[Task], object]] = {
    "gradients of 0": lambda task: (task.steps(factor=0.0), task.steps()),
    "loss times 1e20": lambda task: task.steps(factor=1e20),
    "loss times 1e-20": lambda task: task.steps(factor=1e-20),
    "batch of one": lambda task: task.steps(rows=1),
    "closures": lambda task: task.steps(closure=True),
    "freeze and thaw": freeze_and_thaw,
    "parameter replaced": replace_parameter,
    "data replaced": lambda task: (task.steps(), task.model[0].weight.data.copy_(torch.randn(6, 4)), task.steps()),
    "cast to float64": lambda task: cast(task, torch.float64),
    "cast to bfloat16": lambda task: cast(task, torch.bfloat16),
    "no gradient at all, now and then": no_gradient_for_a_layer,
    "one gradient taken away": lambda task: (task.steps(), setattr(task.model[0].weight, "grad", None), task.steps()),
    "state thrown away": lambda task: (task.steps(), task.opt.state.clear(), task.steps()),
    "state of one thrown away": lambda task: (task.steps(), task.opt.state.pop(task.model[0].bias), task.steps()),
}


@EACH_CASE
def test_events_in_training(tally, case):
    with tally("zeros, extremes, batches of one, freezing, replacing, casting, lost state: training goes on") as row:
        for name, event in EVENTS.items():
            task = Task(case)
            with warned() as said:
                event(task)
            finite = all(bool(torch.isfinite(p).all()) for p in task.model.parameters())
            row.held(finite and len(said) <= 2, f"{case}, {name}: {[str(w.message)[:60] for w in said]}")


@EACH_CASE
def test_another_shape_is_refused_by_name(case):
    task = Task(case)
    task.steps()
    for layer, shapes in ((0, ((8, 4), (8,))), (2, ((3, 8), (3,)))):
        for param, shape in zip(task.model[layer].parameters(), shapes, strict=True):
            param.data = torch.randn(shape)
    before = [p.clone() for p in task.model.parameters()]
    with pytest.raises(ValueError, match="had shape .6, 4. when it took its last step, and now has .8, 4."):
        task.steps()
    assert all(map(torch.equal, before, task.model.parameters()))


# --- unusual parameters ---

SHAPES: dict[str, Callable[[], Tensor]] = {
    "without dimension": lambda: torch.tensor(0.5),
    "empty": lambda: torch.zeros(0, 3),
    "channels last": lambda: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 5).t(),
    "every second element": lambda: torch.randn(12)[::2],
    "float64 beside float32": lambda: torch.randn(5, dtype=torch.float64),
}


class Odd(nn.Module):
    """One of these beside an ordinary one, and the distance of both from 1."""

    def __init__(self, odd: Tensor):
        super().__init__()
        self.odd, self.plain = nn.Parameter(odd), nn.Parameter(torch.randn(4))

    def forward(self) -> Tensor:
        return sum((p.float() - 1).square().sum() for p in self.parameters())


@EACH_CASE
def test_unusual_parameters(tally, case):
    kind, options, followed = CASES[case]
    with tally("parameters without dimension, empty, strided, twice in a list, inputs of inference mode") as row:
        for name, make in SHAPES.items():
            torch.manual_seed(0)
            model = Odd(make())
            opt = OPTIMIZERS[kind](model if followed else model.parameters(), **options)
            with warned():
                first = model().item()
                for _ in range(12):
                    opt.zero_grad()
                    loss = model()
                    loss.backward() if followed else opt.backward(loss)
                    opt.step()
            row.held(model().item() < first and all(p.isfinite().all() for p in model.parameters()), f"{case}, {name}")
            row.held(model.odd.stride() == make().stride(), f"{case}, {name}: other strides")
        task = Task(case)
        with torch.inference_mode():
            made = task.x + 1
        task.x = made.clone()
        task.steps()
        with warned():
            twice = OPTIMIZERS[kind]([task.model[0].weight, task.model[0].weight], **options)
        row.held(len(twice.param_groups[0]["params"]) == 1, f"{case}: twice in a list")
