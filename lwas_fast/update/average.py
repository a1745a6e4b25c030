"""Averages of a run's weights, which are to be evaluated in their place.

Measured rates fit most of a run and are too long for its end: the weights keep moving about the point that they have
come to. A schedule on `lr` would end that, where the run's length is known; the average ends it at any time.

Schedule-free optimizers train on a mixture of average and iterate and so have it at hand: `swap` puts it into the
model and takes it out again. For training with momentum there is `averaged`, beside the optimizer: averages whose
window grows with the run are polynomial-decay averages (Shamir & Zhang, ICML 2013).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lwas_fast.layers import Groups, Layout
from lwas_fast.rule import Rule

State: TypeAlias = "Mapping[Tensor, dict[str, Any]]"


def check_training(groups: Groups) -> None:
    """Refuse to train with the average in the parameters.

    Raises:
        RuntimeError: They hold it; says what to call.
    """
    if not all(group["train_mode"] for group in groups):
        raise RuntimeError(
            "the parameters hold the average of the weights since opt.eval(): call opt.train() before training on"
        )


def check_state(layout: Layout, rule: Rule, group: dict[str, Any], param: Tensor) -> None:
    """Refuse a state that is of the other mode than its group.

    Raises:
        RuntimeError: Somebody changed ``schedule_free`` after the first step.
    """
    state = layout.state.get(param)
    if state and (missing := set(rule.buffers(group)) - set(state)):
        raise RuntimeError(
            f"schedule_free={group['schedule_free']} was set in a parameter group in mid-training: its state lacks "
            f"{sorted(missing)[0]!r}. Make a new {rule.name} instead"
        )


@torch.no_grad()
def swap(groups: Groups, state: State, rule: Rule, training: bool) -> None:
    """Put the weights to train on, or their average, into the parameters of schedule-free groups.

    They hold one of the two already; each group's ``train_mode`` says which.
    """
    for group in groups:
        if group["train_mode"] != training:
            share = rule.share(group) if group["share"] is None else group["share"]
            _shift(group, state, (1 if training else -1) * (1 - share))
        group["train_mode"] = training


@torch.no_grad()
def follow(layout: Layout, rule: Rule, moving: set[int]) -> None:
    """Mix weights anew where the average's share in them, which schedulers may cycle, changed since the last step.

    `moving` has the numbers of the groups that are about to take a step.
    """
    for number in moving:
        group = layout.groups[number]
        share = rule.share(group)
        if group["share"] not in (None, share):
            _shift(group, layout.state, group["share"] - share)
        group["share"] = share


def _shift(group: dict[str, Any], state: State, by: float) -> None:
    """Move parameters by so much of iterate minus average."""
    for param in group["params"]:
        if "offset" in (of_param := state.get(param, {})):
            param.copy_(param.to(of_param["offset"].dtype).add(of_param["offset"], alpha=by))


def averaged(model: nn.Module, share: float = 0.05) -> AveragedModel:
    r"""Make a running average of a model's weights.

    After n updates the next weights enter with 1 / (1 + n · share): about the last `share` of the run counts.
    Call ``average.update_parameters(model)`` every few steps (it waits for the device, so not at each), and evaluate
    ``average``. With BatchNorm let ``torch.optim.swa_utils.update_bn`` gather the average's own statistics first.

    Args:
        model: What is trained.
        share: Of the run, that the average looks back on; greater than 0, at most 1 (all of it alike).

    Returns:
        A copy of the model that holds the average; float32 state is advised, for half precision cannot average long.

    Raises:
        ValueError: `share` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} is not valid: it must be a number greater than 0 and at most 1")

    def update(averages: Any, weights: Any, count: Any) -> None:
        torch._foreach_lerp_(averages, weights, 1 / (1 + share * float(count)))

    return AveragedModel(model, multi_avg_fn=update)
