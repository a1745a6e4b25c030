"""Every learning rate scheduler of torch drives our optimizers as it drives torch's own.

Catches: an lr, momentum or beta that is not where schedulers look for it, or is replaced instead of filled when it is a
tensor; a step that does not follow it; a restored scheduler that goes on from elsewhere; a cycled momentum that makes
the bias correction NaN.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR
from torch_table import INFOS, Problem, assert_equal

from lwas_fast.update.control import gain

SCHEDULERS = {
    "StepLR": lambda opt: schedulers.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [2, 5], 0.5),
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda k: 1 / (k + 1)),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda k: 0.9),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, 0.5, 4),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, 0.25, 1.0, 6),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, 8, 2.0),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 8),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 0.1, 1.0, 3, cycle_momentum=True),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 1.0, 12),
    "OneCycleLR without momentum": lambda opt: schedulers.OneCycleLR(opt, 1.0, 12, cycle_momentum=False),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "SequentialLR": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.LinearLR(opt, 0.1, 1.0, 3), schedulers.CosineAnnealingLR(opt, 6)], [3]
    ),
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.LinearLR(opt, 0.1, 1.0, 3), schedulers.ExponentialLR(opt, 0.9)], opt
    ),
    "SWALR": lambda opt: SWALR(opt, 0.05, anneal_epochs=4),
}
TORCHS = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99)),
}
EACH = pytest.mark.parametrize("kind", TORCHS)
# A tensor is filled in place: schedulers do that in three ways.
WITH_NUMBERS = [(name, False) for name in SCHEDULERS]
WITH_TENSORS = [(name, True) for name in ("LambdaLR", "OneCycleLR", "SWALR")]


def tick(scheduler):
    plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
    scheduler.step(1.0) if plateau else scheduler.step()


def cycled(opt):
    group = opt.param_groups[0]
    return float(group["lr"]), group.get("momentum"), group.get("betas")


@EACH
@pytest.mark.parametrize(("name", "as_tensor"), WITH_NUMBERS + WITH_TENSORS)
def test_schedules_are_torchs_own(name, kind, as_tensor):
    """Same lr and momentum at every step as for torch's SGD and AdamW; every step is that share of the rate."""
    problem = Problem()
    lr = torch.tensor(1.0) if as_tensor else 1.0
    # No cap and no ramp: what is applied is lr times the rate.
    opt = INFOS[kind].optim_cls(problem.named, lr=lr, cap=float("inf"), ramp_steps=0, update_every=4)
    other = TORCHS[kind]([nn.Parameter(torch.zeros(1))], torch.tensor(1.0) if as_tensor else 1.0)
    mine, theirs = SCHEDULERS[name](opt), SCHEDULERS[name](other)
    seen = set()
    for k in range(11):
        problem.run(opt, [k])
        lr, momentum, betas = cycled(opt)
        longer = gain(momentum if betas is None else betas[0], k)
        for row in opt.diagnostics().values():
            assert row["applied"] == pytest.approx(row["rate"] * longer * lr, rel=1e-6)
        other.step()
        tick(mine)
        tick(theirs)
        assert cycled(opt) == cycled(other)
        assert isinstance(opt.param_groups[0]["lr"], torch.Tensor) == as_tensor
        seen.add(cycled(opt))
    assert len(seen) > 1
    assert all(torch.isfinite(p).all() for p in problem.params)


@EACH
@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR", "SequentialLR", "SWALR"])  # the rest is torch's business
def test_schedules_resume(name, kind):
    problem = Problem()
    opt = INFOS[kind].optim_cls(problem.named, update_every=3)
    scheduler = SCHEDULERS[name](opt)
    for k in range(4):
        problem.run(opt, [k])
        tick(scheduler)
    other = copy.deepcopy(problem)
    new = INFOS[kind].optim_cls(other.named, update_every=3)
    resumed = SCHEDULERS[name](new)
    resumed.load_state_dict(scheduler.state_dict())
    new.load_state_dict(opt.state_dict())
    for k in range(4, 9):
        for p, o, s in ((problem, opt, scheduler), (other, new, resumed)):
            p.run(o, [k])
            tick(s)
    assert cycled(opt) == cycled(new)
    assert_equal(problem.params, other.params)


@EACH
def test_groups_have_schedules_of_their_own(kind):
    problem = Problem()
    opt = INFOS[kind].optim_cls([{"params": problem.named[:2]}, {"params": problem.named[2:], "lr": 0.5}])
    scheduler = schedulers.LambdaLR(opt, [lambda k: 1.0, lambda k: 0.5**k])
    frozen = schedulers.LambdaLR(opt, [lambda k: 0.0, lambda k: 1.0])
    before = [p.detach().clone() for p in problem.params]
    problem.run(opt, range(2))
    assert_equal(problem.params[:2], before[:2])
    assert all(not torch.equal(p, q) for p, q in zip(problem.params[2:], before[2:], strict=True))
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [1.0, 0.25]
    frozen.step()
    assert [group["lr"] for group in opt.param_groups] == [0.0, 0.5]


@EACH
def test_the_step_before_the_schedule_is_seen(kind, recwarn):
    """torch warns when a scheduler steps first; it wraps `step` to know, and `backward` must not confuse it."""
    problem = Problem()
    opt = INFOS[kind].optim_cls(problem.named)
    scheduler = schedulers.StepLR(opt, 1)
    problem.run(opt, range(2))
    scheduler.step()
    assert not recwarn.list
    other = INFOS[kind].optim_cls(problem.named)
    scheduler = schedulers.StepLR(other, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before"):
        scheduler.step()
