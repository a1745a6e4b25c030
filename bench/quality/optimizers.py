"""The optimizers by name, all driven alike: ours, torch's, and those of other packages where they are installed.

A name may carry options: `adamwlw:update_every=5`, `adamw:lr=1e-3,schedule=cosine`, `adamwlw:average=0.05`;
with the last, the average is judged (lwas_fast.averaged); with `times=1e4` the loss is multiplied by that. Ours may
have `layers=tensor` or `layers=whole`, one rate each. What is not given has the package's default, but for the weight
decay, which is the task's. AdaHessian, Sophia-H, Shampoo and both Schedule-Free AdamW have a rate, `lr`, whose default
was made for other tasks; DoG is judged by its last weights, not by its authors' average. Schedules: `constant`,
`cosine` to 0 at the end, `warmup` over the first tenth of the run, and `warmup_cosine`, both.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from bench.quality.kfac import KFAC
from bench.quality.muon import MuonWithAdamW
from bench.quality.problem import Problem
from bench.quality.schedule_free_plus import RefinedScheduleFree, ScheduleFreePlus
from bench.quality.schedules import RECIPES, SCHEDULES, scheduler
from lwas_fast import SGDLW, AdamWLW, MuonLW, averaged
from lwas_fast.optimizer import LayerwiseOptimizer

Factory = Callable[..., Optimizer]
OURS = ("muonlw", "adamwlw", "sgdlw")
SWEPT = {  # two a decade; where a task had its best rate at an end, rates beyond were run on it by name
    "adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
    "muon": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "sf_adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "sf_refined": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "shampoo": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "adahessian": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "sophia_h": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "kfac": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}
SWEPT_WITH = {"lr", "schedule", "damping"}  # options that are the sweep's, not a variant


@dataclass(frozen=True)
class Rule:
    """How an optimizer is made and driven.

    Attributes:
        make: From the problem and options to the optimizer.
        module: The package that has it, as one imports it; empty for ours and torch's.
        package: The same, as one installs it.
        modes: Whether it has a train and an eval mode (ours, Schedule-Free), unless told not to be schedule-free.
        graph: Whether its `step` differentiates the gradient once more (AdaHessian, Sophia-H).
        data: Whether it has a `measure`, which is to see the mini-batch (KFAC).
        value: Whether its `step` is to be told the loss (Schedule-Free+).
    """

    make: Factory
    module: str = ""
    package: str = ""
    modes: bool = False
    graph: bool = False
    data: bool = False
    value: bool = False


def _parameters(problem: Problem) -> list[Any]:
    """What is trained, in two groups where weight decay is for matrices alone (ours always does so)."""
    params = list(problem.model.parameters())
    if problem.only_matrices:
        matrices, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
        return [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return params


def _of(module: str, name: str, **fixed: Any) -> Factory:
    def make(problem: Problem, **options: Any) -> Optimizer:
        kind = getattr(__import__(module), name)
        return kind(_parameters(problem), **{**fixed, **options})

    return make


def _torch(kind: type[Optimizer], **fixed: Any) -> Factory:
    return lambda problem, **options: kind(_parameters(problem), **{**fixed, **options})


LAYERS: dict[str, Callable[[str], str]] = {"tensor": lambda name: name, "whole": lambda name: "model"}


def _ours(kind: type[LayerwiseOptimizer]) -> Factory:
    def make(problem: Problem, layers: str | None = None, **options: Any) -> Optimizer:
        return kind(problem.model, layers=LAYERS[layers] if layers else None, **options)

    return make


_MANY, _FREE = "pytorch_optimizer", "schedulefree"
RULES = {
    "muonlw": Rule(_ours(MuonLW), modes=True),
    "adamwlw": Rule(_ours(AdamWLW), modes=True),
    "sgdlw": Rule(_ours(SGDLW), modes=True),
    "adamw": Rule(_torch(torch.optim.AdamW)),
    "sgd": Rule(_torch(torch.optim.SGD, momentum=0.9, lr=1e-2)),
    "muon": Rule(lambda problem, **options: MuonWithAdamW(problem.model, **options)),
    "prodigy": Rule(_of("prodigyopt", "Prodigy"), "prodigyopt", "prodigyopt"),
    "sf_adamw": Rule(_of(_FREE, "AdamWScheduleFree"), _FREE, _FREE, modes=True),
    "sf_sgd": Rule(_of(_FREE, "SGDScheduleFree"), _FREE, _FREE, modes=True),
    "sf_refined": Rule(_torch(RefinedScheduleFree), modes=True),
    "sf_plus": Rule(_torch(ScheduleFreePlus), modes=True, value=True),
    "dadapt_adam": Rule(_of(_MANY, "DAdaptAdam", weight_decouple=True), _MANY, "pytorch-optimizer"),
    "dog": Rule(_of("dog", "DoG"), "dog", "dog-optimizer"),
    "shampoo": Rule(_of(_MANY, "ScalableShampoo", decoupled_weight_decay=True), _MANY, "pytorch-optimizer"),
    "adahessian": Rule(_of(_MANY, "AdaHessian"), _MANY, "pytorch-optimizer", graph=True),
    "sophia_h": Rule(_of(_MANY, "SophiaH"), _MANY, "pytorch-optimizer", graph=True),
    "kfac": Rule(
        lambda problem, **options: KFAC(problem.model, problem.criterion, **options),
        "curvlinops", "curvlinops-for-pytorch", data=True,
    ),
}  # fmt: skip
PARAMETER_FREE = ("prodigy", "sf_plus", "sf_adamw", "sf_refined", "sf_sgd", "dadapt_adam", "dog")
EVERY_SCHEDULE = ("adamw", "sgd", "muon")  # are swept with all of SCHEDULES


def parts(text: str) -> list[str]:
    """Split at the commas that are not inside brackets."""
    return re.split(r",(?![^(]*\))", text)


@dataclass(frozen=True)
class Name:
    """An optimizer with its options, and its one spelling: options sorted, numbers short (1e-3 is 0.001, 3.0 is 3)."""

    base: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Name:
        """Read `base` or `base:option=value,...`.

        Raises:
            ValueError: Unknown optimizer, or options that cannot be read.
        """
        base, _, rest = text.partition(":")
        if base not in RULES:
            raise ValueError(f"unknown optimizer {base!r}: choose from {', '.join(RULES)}")
        options: dict[str, Any] = {}
        for item in filter(None, parts(rest)):
            key, equals, value = item.partition("=")
            if not (key and equals and value) or key in options:
                raise ValueError(f"{text!r}: {item!r} is not option=value, or comes twice")
            try:
                options[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                options[key] = value  # a word
        if options.get("schedule", "constant") not in (*SCHEDULES, *RECIPES):
            raise ValueError(f"{text!r}: schedule must be one of {', '.join((*SCHEDULES, *RECIPES))}")
        return cls(base).having(**options)

    def having(self, **options: Any) -> Name:
        """The same with further options."""
        options = {**dict(self.options), **options}
        if options.get("schedule") == "constant":  # what is meant without: a run has one name
            del options["schedule"]
        return Name(self.base, tuple(sorted(options.items())))

    def __str__(self) -> str:
        short = ((key, f"{value:.15g}" if isinstance(value, float) else str(value)) for key, value in self.options)
        text = ",".join(f"{key}={value}".replace(" ", "") for key, value in short)
        return f"{self.base}:{text}" if text else self.base

    @property
    def file(self) -> str:
        """For a file's name."""
        return str(self).replace(":", "_").replace(",", "_").replace("/", "-")


def sweep(name: Name, schedules: Sequence[str] = ()) -> list[Name]:
    """Every rate of a sweep, with each schedule and the name's further options.

    Without schedules: all of AdamW's, SGD's and Muon's, none of Schedule-Free's, constant and cosine of the others'.
    """
    if not schedules:
        kinds = 4 if name.base in EVERY_SCHEDULE else 1 if name.base in PARAMETER_FREE else 2
        schedules = SCHEDULES[:kinds]
    return [name.having(lr=lr, schedule=schedule) for schedule in schedules for lr in SWEPT[name.base]]


AVERAGE_EVERY = 10  # steps from one update of the average to the next
BATCHES_FOR_NORM = 20  # that BatchNorm gathers its statistics from, of the weights that are judged


class Trainer:
    """An optimizer, its schedule, and how one step goes.

    Args:
        name: Which, with options.
        problem: What it trains.
        steps: In all, for the schedule.
        weight_decay: The task's; an option of the name has priority.

    Raises:
        ModuleNotFoundError: The package that has the optimizer is missing.
        TypeError: The optimizer has no such option.
        ValueError: The optimizer cannot train this model, or not with this option.
    """

    def __init__(self, name: Name, problem: Problem, steps: int, weight_decay: float):
        self.rule = RULES[name.base]
        options = {"weight_decay": weight_decay, **dict(name.options)}
        schedule, share = options.pop("schedule", "constant"), options.pop("average", None)
        self.times = options.pop("times", 1.0)
        self.problem, self.model, self.steps = problem, problem.model, 0
        self.average = None if share is None else averaged(self.model, share)
        self.modes = self.rule.modes and options.get("schedule_free", True)
        self.differences = options.get("hvp") == "finite_difference"
        self.optimizer = self.rule.make(problem, **options)
        self.scheduler = scheduler(schedule, self.optimizer, steps)
        if self.modes:
            self.optimizer.train()

    def step(self) -> Tensor:
        """Evaluate the loss, differentiate, update; returns the loss from before the update."""
        self.optimizer.zero_grad()
        if self.rule.data:
            self.optimizer.measure(*self.problem.batch(self.steps))

        def loss() -> Tensor:
            return self.times * self.problem.loss(self.model, self.steps)

        if self.differences:
            value = self.optimizer.backward(loss)
        else:
            value = loss()
            value.backward(create_graph=self.rule.graph)
        if self.problem.clip is not None:
            clip_grad_norm_(self.model.parameters(), self.problem.clip)
        self.optimizer.step(*[value.item()] * self.rule.value)
        self.steps += 1
        if self.average is not None and self.steps % AVERAGE_EVERY == 0:
            self.average.update_parameters(self.model)
        if self.scheduler is not None:
            self.scheduler.step()
        if self.rule.graph:  # gradients with a graph keep their parameters alive in a cycle
            self.optimizer.zero_grad(set_to_none=True)
        return value.detach() / self.times

    def rates(self) -> dict[str, float]:
        """Each layer's rate, of ours."""
        return self.optimizer.rates() if isinstance(self.optimizer, LayerwiseOptimizer) else {}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The weights that are to be judged: schedule-free and with `average` the average, others' as they are.

        BatchNorm gathers its statistics anew, for every optimizer alike: an average has none, and running ones lag
        behind weights that move fast. Afterwards all is as it was.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        kept = [tensor.detach().clone() for tensor in tensors]
        averages = self.average is not None and self.steps >= AVERAGE_EVERY
        if averages:
            self.model.load_state_dict(self.average.module.state_dict())
        elif self.modes:
            self.optimizer.eval()
        update_bn((self.problem.batch(step)[0] for step in range(BATCHES_FOR_NORM)), self.model)
        yield
        if self.modes and not averages:
            self.optimizer.train()
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
