"""Hyperparameters: which there are, what they may be, what became of old ones, and the errors that say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any, TypedDict

from torch import Tensor

from lwas_fast.says import warn

# What the method has one value for.
MAX_GROWTH = 100.0  # most that a measured rate may exceed the layer's present one, as a factor; it is cut to that
MOST_PROMISED = 100.0  # most that Newton's step counts as promising, in mean sizes of the loss

ESTIMATORS = ("signs", "blocks")
DECAYING = ("all", "matrices")
HVP_MODES = ("autograd", "finite_difference")


class Common(TypedDict, total=False):
    """The keywords that all optimizers share; `LayerwiseOptimizer` says what each does."""

    update_every: int | None
    weight_decay_on: str
    curvature: str
    hvp: str
    warmup_steps: int
    maximize: bool
    foreach: bool | None
    fused: bool | None
    seed: int


DEFAULTS: Common = {
    "update_every": None,
    "weight_decay_on": "all",
    "curvature": "signs",
    "hvp": "autograd",
    "warmup_steps": 0,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "seed": 0,
}
# One pass measures every group, so these cannot differ between groups.
WHOLE = ("curvature", "hvp", "seed")

# Options of earlier versions -> (the default that each had at last, what to say to those who pass one).
REMOVED: dict[str, tuple[Any, str]] = {
    "noise_exponent": (0.0, "rates are no longer scaled by the share of signal in the gradient"),
    "probe": ("gradient", "curvature is always measured along the direction that the gradient alone gives"),
    "self_concordance": (
        2.0,
        "steps are bounded by the size of the loss instead, so that the scale of the loss does not matter",
    ),
    "negative_curvature": ("abs", "the size of negative curvature is taken"),
    "damping": (0.0, "nothing is added to the curvature but SGDLW's weight decay"),
    "rate_horizon": (None, "rates are averaged over 100 steps, and at least 5 measurements"),
    "max_growth": (10.0, "how far a measured rate may exceed the present one is part of the method"),
}


def _number(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Any:
    def check(value: Any) -> bool:
        if isinstance(value, (str, bytes)):  # which float() would read, and nothing that computes with it later
            return False
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError):
            return False
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        return bool(above and below)

    bounds = f"{'greater than' if open_low else 'at least'} {low:g}"
    if high < math.inf or open_high:
        bounds += f" and {'less than' if open_high else 'at most'} {high:g}"
    return check, f"a number {bounds}"


def integer(low: int) -> Any:
    """An integer of at least so much, as an entry of `RANGES`."""

    def check(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    return check, f"an integer, at least {low}"


def or_none(rule: Any) -> Any:
    """The same entry of `RANGES`, or None."""
    check, allowed = rule
    return lambda value: value is None or check(value), f"None or {allowed}"


def _one_of(*values: Any) -> Any:
    return lambda value: any(value is v or value == v for v in values), "one of " + ", ".join(map(repr, values))


def _betas(value: Any) -> bool:
    check = _number(0, 1, open_high=True)[0]
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(check, value))


# name -> (check, what is allowed). Every option of every parameter group stands here.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _number(0, math.inf, open_high=True),
    "momentum": _number(0, 1, open_high=True),
    "betas": (_betas, "a pair of numbers, each at least 0 and less than 1"),
    "eps": _number(0, math.inf, open_low=True, open_high=True),
    "weight_decay": _number(0, math.inf, open_high=True),
    "update_every": or_none(integer(1)),
    "cap": or_none(_number(0, open_low=True)),
    "warmup_steps": integer(0),
    "warmup_rate": _number(0, math.inf, open_high=True),
    "ramp_steps": integer(0),
    "schedule_free": _one_of(True, False),
    "maximize": _one_of(True, False),
    "foreach": _one_of(None, True, False),
    "fused": _one_of(None, True, False),
    "weight_decay_on": _one_of(*DECAYING),
    "curvature": _one_of(*ESTIMATORS),
    "hvp": _one_of(*HVP_MODES),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "an integer"),
}


def check_names(names: Iterable[str], optimizer: str) -> None:
    """Refuse keywords that an optimizer does not have; TypeError says which, and what became of a removed one."""
    refuse_removed(names, optimizer)
    if unknown := sorted(set(names) - set(DEFAULTS)):
        raise TypeError(f"{optimizer} has no keyword {unknown[0]!r}")


def refuse_removed(names: Iterable[str], optimizer: str) -> None:
    """Refuse options of earlier versions, by a TypeError that says what became of them."""
    for name in sorted(REMOVED.keys() & set(names)):
        raise TypeError(f"{optimizer} has no option {name!r} any more: {REMOVED[name][1]}. Leave it out")


LEAST_LR = 0.05  # less than that is a learning rate left over from another optimizer


def warn_of_lr(group: dict[str, Any]) -> bool:
    """Warn of a multiplier, at a scheduler's most, that looks like a learning rate; 0 is somebody's intention."""
    lr = group.get("max_lr", group.get("initial_lr", group["lr"]))
    if isinstance(lr, (int, float)) and 0 < lr < LEAST_LR:
        warn(
            f"lr={lr:g}: here lr multiplies step sizes that are measured, so this leaves {lr:.2g} of each step. Leave "
            "it out, or give schedulers a base (max_lr, base_lr) of 1"
        )
        return True
    return False


def wants_plain(group: dict[str, Any]) -> bool:
    """Whether a group asks for plain torch in place of compiled code."""
    return group.get("foreach") is not None or group.get("fused") is False


def check(options: dict[str, Any], where: str = "") -> None:
    """Check hyperparameters, names to values; other names are left alone. `where` goes into the message.

    Raises:
        TypeError: ``curvature="joint"``, which earlier versions had.
        ValueError: A value is out of range; the message names the option, the value and what is allowed.
    """
    if options.get("curvature") == "joint":
        raise TypeError(
            'curvature="joint" is gone: with the terms between layers it trained worse than "signs", which costs the '
            'same. Leave it out, or take "blocks" (exact, one product a layer)'
        )
    for name, value in options.items():
        if name in RANGES:
            valid, allowed = RANGES[name]
            if not valid(value):
                raise ValueError(f"{name}={value!r}{where} is not valid: it must be {allowed}")
    if options.get("fused") and options.get("foreach"):
        raise ValueError(f"fused=True and foreach=True{where} exclude each other: leave one of them out")


class Checked:
    """Options of parameter groups as they were at the last check: users and schedulers set others in mid-training."""

    def __init__(self) -> None:
        self._known: list[list[Any]] = []

    def check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Check groups in which something is not the very same object as the last time, or could have been written to.

        Tensors on a GPU are not, for to read them would wait for that.

        Raises:
            ValueError: See `check`.
        """
        now = [[group.get(name) for name in RANGES] for group in groups]
        for number, (values, known) in enumerate(zip(now, [*self._known, *([()] * len(now))], strict=False)):
            changing = any(isinstance(value, (Tensor, list)) for value in values)
            if len(known) == len(values) and all(map(is_, values, known)) and not changing:
                continue
            given = {name: v for name, v in zip(RANGES, values, strict=True) if not getattr(v, "is_cuda", False)}
            check({name: given[name] for name in given.keys() & groups[number]}, f" in parameter group {number}")
        self._known = now

    def are_valid(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether `check` has nothing to refuse."""
        try:
            self.check(groups)
        except ValueError:
            return False
        return True
