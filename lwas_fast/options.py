"""Hyperparameters: which there are, what they may be, and the errors when they are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

ESTIMATORS = ("signs", "joint", "blocks")
HVP_MODES = ("autograd", "finite_difference")


class Common(TypedDict, total=False):
    """The keywords that both optimizers share; `LayerwiseOptimizer` says what each does."""

    update_every: int | None
    curvature: str
    probe: str
    hvp: str
    rate_horizon: float | None
    max_growth: float
    warmup_steps: int
    damping: float
    negative_curvature: str
    self_concordance: float
    maximize: bool
    foreach: bool | None
    fused: bool | None
    seed: int


DEFAULTS: Common = {
    "update_every": None,
    "curvature": "signs",
    "probe": "gradient",
    "hvp": "autograd",
    "rate_horizon": None,
    "max_growth": 10.0,
    "warmup_steps": 0,
    "damping": 0.0,
    "negative_curvature": "abs",
    "self_concordance": 2.0,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "seed": 0,
}
# One pass measures every group, so these cannot differ between groups.
WHOLE = ("curvature", "hvp", "seed")


def _number(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Any:
    def check(value: Any) -> bool:
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError):
            return False
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        return bool(above and below)

    bounds = f"{'greater than' if open_low else 'at least'} {low:g}"
    if high < math.inf:
        bounds += f" and {'less than' if open_high else 'at most'} {high:g}"
    return check, f"a number {bounds}"


def _integer(low: int) -> Any:
    def check(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    return check, f"an integer, at least {low}"


def _or_none(rule: Any) -> Any:
    check, allowed = rule
    return lambda value: value is None or check(value), f"None or {allowed}"


def _one_of(*values: Any) -> Any:
    return lambda value: any(value is v or value == v for v in values), "one of " + ", ".join(map(repr, values))


def _betas(value: Any) -> bool:
    check = _number(0, 1, open_high=True)[0]
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(check, value))


# name -> (check, what is allowed). Every option of every parameter group stands here.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _number(0),
    "momentum": _number(0, 1, open_high=True),
    "betas": (_betas, "a pair of numbers, each at least 0 and less than 1"),
    "eps": _number(0, math.inf, open_low=True, open_high=True),
    "weight_decay": _number(0, math.inf, open_high=True),
    "update_every": _or_none(_integer(1)),
    "probe": _one_of("gradient", "update"),
    "rate_horizon": _or_none(_number(0, math.inf, open_high=True)),
    "noise_exponent": _or_none(_number(0, math.inf, open_high=True)),
    "cap": _or_none(_number(0, open_low=True)),
    "max_growth": _number(1, open_low=True),
    "warmup_steps": _integer(0),
    "warmup_rate": _number(0, math.inf, open_high=True),
    "ramp_steps": _integer(0),
    "damping": _number(0, math.inf, open_high=True),
    "negative_curvature": _one_of("abs", "skip"),
    "self_concordance": _number(0, math.inf, open_high=True),
    "schedule_free": _one_of(True, False),
    "maximize": _one_of(True, False),
    "foreach": _one_of(None, True, False),
    "fused": _one_of(None, True, False),
    "curvature": _one_of(*ESTIMATORS),
    "hvp": _one_of(*HVP_MODES),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "an integer"),
}


def check(options: dict[str, Any], where: str = "") -> None:
    """Check hyperparameters.

    Args:
        options: Names to values; names that are no hyperparameters are left alone.
        where: Which group they belong to, for the message.

    Raises:
        ValueError: A value is out of range; the message names the option, the value and what is allowed.
    """
    for name, value in options.items():
        if name in RULES:
            valid, allowed = RULES[name]
            if not valid(value):
                raise ValueError(f"{name}={value!r}{where} is not valid: it must be {allowed}")
    if options.get("schedule_free"):
        for name, without in (("probe", "gradient"), ("noise_exponent", 0)):
            if options.get(name) not in (None, without):
                raise ValueError(
                    f"{name}={options[name]!r}{where} needs momentum, which a schedule-free optimizer does not have: "
                    f"pass schedule_free=False, or {name}={without!r}"
                )
    if options.get("fused") and options.get("foreach"):
        raise ValueError(f"fused=True and foreach=True{where} exclude each other: leave one of them out")
