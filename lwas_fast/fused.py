"""One optimizer step in compiled code: all tensors of a bucket in one pass over parameter, gradient and state.

`csrc/update_math.h` says how; `update.py` is the same in plain torch. Each function here hands an operator what its
schema asks for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lwas_fast import rates
from lwas_fast.layers import RMS_FLOOR, Bucket, Selection
from lwas_fast.update import Scaling

# A layer whose step was within this factor of its cap has its weights moved in a second pass, when the norms are known;
# others in the first, and corrected if they turn out to be capped, which takes a direction that many times as long as
# the one before. Results are the same up to rounding: one more, at about the weights' own size, where it was corrected.
NEAR = 2.0


def _scalar(value: Tensor | None, table: Tensor) -> Tensor | None:
    return None if value is None else value.to(device=table.device, dtype=torch.float32)


class _Common(NamedTuple):
    """What both operators ask for: before their own hyperparameters, and after."""

    first: tuple[Any, ...]
    last: tuple[Any, ...]


def _common(
    bucket: Bucket, selection: Selection, group: dict[str, Any], scaling: Scaling, decoupled: bool, beta: float
) -> _Common:
    lr: float | Tensor = group["lr"]
    on_device = None
    if isinstance(lr, Tensor) and lr.is_cuda and lr.device == bucket.table.device:
        on_device, lr = lr.to(torch.float32), 1.0  # to read it here would wait for the device
    warming, warmup_rate, gain, ramp, cap, largest = rates.control(group, decoupled, beta)
    control = [float(lr), ramp, warmup_rate, gain, cap, largest, RMS_FLOOR, NEAR]
    scalars = (_scalar(value, bucket.table) for value in scaling)
    return _Common(
        (bucket.table, bucket.steps, selection.where, control, warming),
        (group["maximize"], group["schedule_free"], on_device, *scalars),
    )


def adamw(
    bucket: Bucket, selection: Selection, group: dict[str, Any], states: list[dict[str, Any]], scaling: Scaling
) -> None:
    """Take an AdamW step with some of a bucket's tensors.

    Args:
        bucket: Gives the table of statistics and the step counts.
        selection: The tensors, all of which have a gradient.
        group: Their hyperparameters.
        states: Their states, changed in place.
        scaling: What a GradScaler wants done with the gradients.

    Raises:
        TypeError: A dtype that the operator does not take. Nothing has been changed.
    """
    common = _common(bucket, selection, group, scaling, True, group["betas"][0])
    torch.ops.lwas_fast.adamw_step(
        selection.params,
        [p.grad for p in selection.params],
        [state["offset" if group["schedule_free"] else "exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        *common.first,
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        *common.last,
    )


def sgd(
    bucket: Bucket, selection: Selection, group: dict[str, Any], states: list[dict[str, Any]], scaling: Scaling
) -> None:
    """Take an SGD step with momentum; see `adamw`."""
    common = _common(bucket, selection, group, scaling, False, group["momentum"])
    torch.ops.lwas_fast.sgd_step(
        selection.params,
        [p.grad for p in selection.params],
        [state["offset" if group["schedule_free"] else "momentum_buffer"] for state in states],
        *common.first,
        group["momentum"],
        group["weight_decay"],
        *common.last,
    )
