"""When a parameter group is measured, and how long its rates remember a measurement."""

from __future__ import annotations

import math
from typing import Any

INTERVALS = (10, 100)  # least and most steps between measurements; docs/method.md says why
HORIZON, HORIZON_REFRESHES = 100, 5  # rates are averaged over this many steps, and this many measurements, at least
TRIES = 3  # measurements in a row, a step apart, before a layer that none of them has a number for has to wait


def is_due(group: dict[str, Any]) -> bool:
    """Whether a group is to be measured at its present step."""
    return group["steps"] >= group["next_refresh"] and any(p.requires_grad for p in group["params"])


def overdue(group: dict[str, Any]) -> int:
    """Steps since a measurement was due, once another would be due as well; 0 before."""
    late: int = group["steps"] - group["next_refresh"]
    return late if is_due(group) and late >= interval(group) else 0


def interval(group: dict[str, Any]) -> int:
    """Steps from a measurement now to the next: fixed, or a tenth of those since warm-up, in bounds."""
    fixed: int | None = group["update_every"]
    least, most = INTERVALS
    by_age = min(max(least, int(group["steps"] - group["warmup_steps"]) // 10), most)
    return by_age if fixed is None else fixed


def memory(group: dict[str, Any]) -> float:
    """What the averages over measurements keep of their past (beta) in a measurement now."""
    last = group["last_refresh"]
    # A layer that is tried again has not been measured a step ago.
    elapsed = interval(group) if last is None or tries_again(group) else group["steps"] - last
    return math.exp(-elapsed / max(HORIZON, HORIZON_REFRESHES * elapsed))


def tries_again(group: dict[str, Any]) -> bool:
    """Whether the last measurement found no number for some layer, and the next is to be at once."""
    return any(count < TRIES for count in group.get("tries", {}).values())


def retry(group: dict[str, Any], lost: list[str]) -> list[str]:
    """Have a group measured at its present step if the one before found no number for some of its layers.

    ``group["tries"]``, there only where it is not empty, has each such layer's failures in a row.

    Returns:
        The layers for which that was the last of so many tries: now they wait until the group is due.
    """
    tries = group.pop("tries", {})
    if lost:
        group["tries"] = {name: tries.get(name, 0) + 1 for name in lost}
    if tries_again(group):
        group["next_refresh"] = group["steps"]
    return [name for name in lost if group["tries"][name] == TRIES]


def postpone(groups: list[dict[str, Any]]) -> None:
    """Measure groups that are due an interval from now; their rates stay as they are."""
    for group in filter(is_due, groups):
        group["next_refresh"] = group["steps"] + interval(group)


def schedule(group: dict[str, Any], measured: bool) -> None:
    """Note that a group was measured; or that nothing of it had a gradient, so that its next step tries again."""
    if measured:
        group["last_refresh"] = group["steps"]
    group["next_refresh"] = group["steps"] + (interval(group) if measured else 1)
