"""Averages of a run's weights, which are to be evaluated in their place.

Measured rates fit most of a run and are too long for its end: the weights keep moving about the point that they have
come to. A schedule on `lr` would end that, where the run's length is known; the average ends it at any time.

Schedule-free optimizers train on a mixture of average and iterate and so have it at hand: `swap` puts it into the
model and takes it out again. For training with momentum there is `averaged`, beside the optimizer: averages whose
window grows with the run are polynomial-decay averages (Shamir & Zhang, ICML 2013).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lwas_fast.layers import Groups, Layout
from lwas_fast.rule import Rule
from lwas_fast.shards import local, local_state, mesh_of

State: TypeAlias = "Mapping[Tensor, dict[str, Any]]"


def check_training(groups: Groups, followed: bool) -> None:
    """Refuse to train with the average in the parameters.

    Raises:
        RuntimeError: They hold it; says what to call.
    """
    if not all(group["train_mode"] for group in groups):
        if followed:
            raise RuntimeError(
                "the parameters hold the average of the weights, because the model was last called in evaluation mode: "
                "call model.train() before training on. To train in evaluation mode, call opt.unfollow() first"
            )
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
def swap(groups: Groups, state: State, rule: Rule, training: Sequence[bool]) -> None:
    """Put the weights to train on, or their average, into the parameters of schedule-free groups; a bool for each.

    They hold one of the two already; each group's ``train_mode`` says which. The weights to train on come back to the
    last bit: the state has those that rounding would lose meanwhile (see `rounded`). Should memory run out, what was
    changed until then is changed back.
    """
    changed: list[tuple[dict[str, Any], Tensor, bool]] = []
    try:
        for group, mode in zip(groups, training, strict=True):
            for param in group["params"] if group["train_mode"] != mode else ():
                if "offset" in state.get(param, {}):
                    _swap(rule, group, state[param], param, mode)
                    changed.append((group, param, mode))
    except BaseException:
        for group, param, mode in reversed(changed):
            _swap(rule, group, state[param], param, not mode)
        raise
    for group, mode in zip(groups, training, strict=True):
        group["train_mode"] = mode


def _swap(rule: Rule, group: dict[str, Any], of_param: dict[str, Any], param: Tensor, training: bool) -> None:
    here, of_here = local(param), local_state(of_param, of_param)
    if training:
        here.copy_(_trained(rule, group, of_here, here))
        forget_rounding(of_param)
        return
    average = _average(rule, group, of_here, here)
    lost = rounded(rule, group, of_here, here, average)
    here.copy_(average)
    forget_rounding(of_param)
    of_param |= lost


def _moved(param: Tensor, offset: Tensor, by: float) -> Tensor:
    """A parameter moved by so much of its iterate minus average, in memory of its own."""
    return param.detach().to(offset.dtype).add(offset, alpha=by).to(param.dtype)


def _average(rule: Rule, group: dict[str, Any], of_param: dict[str, Any], weights: Tensor) -> Tensor:
    return _moved(weights, of_param["offset"], -_distance(rule, group))


def _trained(rule: Rule, group: dict[str, Any], of_param: dict[str, Any], average: Tensor) -> Tensor:
    """The weights to train on, from their average and what rounding loses of them."""
    if TRAINED in of_param:
        return of_param[TRAINED]  # type: ignore[no-any-return]
    weights = _moved(average, of_param["offset"], _distance(rule, group))
    if ROUNDED[0] not in of_param:
        return weights
    index, values = (of_param[name] for name in ROUNDED)
    return weights.reshape(-1).index_copy(0, index.to(weights.device), values.to(weights)).view(weights.shape)


# Names in a parameter's state: indices (K,) int64, and values (K,) of the parameter's dtype.
ROUNDED = ("rounded_at", "rounded_to")
TRAINED = "trained"  # likewise, in files: the weights to train on


def rounded(
    rule: Rule, group: dict[str, Any], of_param: dict[str, Any], param: Tensor, average: Tensor
) -> dict[str, Tensor]:
    """Which weights to train on do not come back from their average, and what they are; empty if all come back.

    Few: those where numbers of the average's size lie further apart.
    """
    differ = (_moved(average, of_param["offset"], _distance(rule, group)) != param).reshape(-1)
    index = differ.nonzero().squeeze(1)
    return dict(zip(ROUNDED, (index, param.detach().reshape(-1)[index]), strict=True)) if len(index) > 0 else {}


def forget_rounding(of_param: dict[str, Any]) -> None:
    """Drop what a parameter's state has of the weights to train on: they are in the model, or gone."""
    for name in (*ROUNDED, TRAINED):
        of_param.pop(name, None)


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


@torch.no_grad()
def average_of(rule: Rule, group: dict[str, Any], state: State, param: Tensor) -> Tensor | None:
    """The average of a parameter that holds the weights to train on, in memory of its own; None if that is the same."""
    of_param = state.get(param, {})
    return _average(rule, group, of_param, param) if "offset" in of_param else None


@torch.no_grad()
def as_saved(
    rule: Rule, group: dict[str, Any], of_param: dict[str, Any], param: Tensor, beside_average: bool
) -> dict[str, Any]:
    """A parameter's state as a checkpoint has it.

    `beside_average` tells whether the model's has the average. Then what rounding loses of the weights to train on is
    saved, by `ROUNDED`; in a distributed run all of these weights, for torch.distributed.checkpoint takes no tensors
    whose shapes change from step to step. Of sharded parameters nothing is saved: theirs come back but for rounding.
    """
    if "offset" not in of_param:
        return of_param
    saved = {name: value for name, value in of_param.items() if name not in ROUNDED}
    if mesh_of(param) is not None or not (beside_average or len(saved) < len(of_param)):
        return saved
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        held = param.detach() if group["train_mode"] else _trained(rule, group, of_param, param.detach())
        return {**saved, TRAINED: held.clone()}
    if not group["train_mode"]:
        return of_param
    return {**saved, **rounded(rule, group, of_param, param, _average(rule, group, of_param, param))}


SAMPLES = 32


def _sampled(group: dict[str, Any], state: State) -> list[tuple[Tensor, int]]:
    """Up to so many elements of a group's parameters, spread over them: (parameter, position). Of sharded ones none."""
    there = [p for p in group["params"] if "offset" in state.get(p, {}) and p.numel() > 0 and mesh_of(p) is None]
    count = min(SAMPLES, sum(p.numel() for p in there))
    return [((p := there[i * len(there) // count]), i * 7919 % p.numel()) for i in range(count)]


def _element(tensor: Tensor, i: int) -> Tensor:
    """The i-th element in the order of indices, without copying the tensor."""
    return tensor[tuple(int(k) for k in np.unravel_index(i, tensor.shape))] if tensor.dim() else tensor


@torch.no_grad()
def samples(rule: Rule, group: dict[str, Any], state: State) -> str:
    """A few of a group's weights to train on, each with its average: by these a checkpoint's parts know each other.

    Pairs, as JSON: torch.distributed.checkpoint takes no lists whose lengths differ. Empty where there are none.
    """
    distance, found = _distance(rule, group), []
    for param, i in _sampled(group, state):
        weight, offset = _element(param, i), _element(state[param]["offset"], i)
        pair = torch.stack([weight, _moved(weight, offset, -distance if group["train_mode"] else distance)])
        found.append((pair if group["train_mode"] else pair.flip(0)).cpu().double())
    return json.dumps(torch.stack(found).tolist()) if found else ""


@torch.no_grad()
def holds(group: dict[str, Any], state: State, known: str | list[list[float]]) -> tuple[bool, bool]:
    """Whether a group's parameters agree with samples of the weights to train on, and with those of the average.

    To the last bit with one of them, or else to rounding, for they may have been cast meanwhile.
    """
    places = _sampled(group, state)
    if isinstance(known, str):  # an earlier version saved a list
        known = json.loads(known)
    if len(places) != len(known):
        return False, False
    mine = torch.stack([_element(param, i).detach().cpu().double() for param, i in places])
    both = torch.tensor(known, dtype=torch.float64).unbind(1)
    exactly = [torch.equal(mine, other) for other in both]
    if any(exactly):
        return exactly[0], exactly[1]
    eps = torch.tensor([2 * torch.finfo(param.dtype).eps for param, _ in places], dtype=torch.float64)
    first, second = (bool(((mine - other).abs() <= eps * other.abs() + 1e-30).all()) for other in both)
    return first, second


def _distance(rule: Rule, group: dict[str, Any]) -> float:
    """By how much of the offset the weights to train on are ahead of their average."""
    return 1 - (rule.share(group) if group["share"] is None else float(group["share"]))


def _shift(group: dict[str, Any], state: State, by: float) -> None:
    """Move parameters by so much of iterate minus average."""
    for param in group["params"]:
        if "offset" in (of_param := state.get(param, {})):
            here = local(param)
            here.copy_(_moved(here, local(of_param["offset"]), by))


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
