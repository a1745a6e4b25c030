"""One step in compiled code: all tensors of a bucket in one pass over parameter, gradient and state.

`csrc/update_math.h` says how; `plain.py` is the same in plain torch. An operator is handed here what its schema asks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lwas_fast.rule import Part, Rule, Scaling
from lwas_fast.selection import RMS_FLOOR
from lwas_fast.update import extension
from lwas_fast.update.control import SLACK, control


def compiled_step(rule: Rule, part: Part, scaling: Scaling, total: Callable[[Tensor], None] | None = None) -> None:
    """Take one step with some of a bucket's tensors; states and statistics are brought up to date.

    Args:
        rule: The optimizer's.
        part: The tensors. Where ranks hold a part of every tensor each, the rank's own parts, and a selection whose
            ``where`` has the elements of whole layers.
        scaling: What a GradScaler sets.
        total: Adds up over the ranks, in place, a float64 tensor (S, 4) on the table's device, S being the selection's
            layers; must give the same bits on all of them. None where this process holds all of the tensors.

    Raises:
        TypeError: A dtype that the operator does not take. Nothing has been changed.
    """
    bucket, selection, group, states, gradients = part
    lr: float | Tensor = group["lr"]
    on_device = None
    if isinstance(lr, Tensor) and lr.is_cuda and lr.device == bucket.table.device:
        on_device, lr = lr.to(torch.float32), 1.0  # to read it here would wait for the device
    scalars = (None if s is None else s.to(device=bucket.table.device, dtype=torch.float32) for s in scaling)
    warming, warmup_rate, gain, ramp, cap, largest = control(rule, group)
    assert rule.operator is not None  # `extension.serves` says so
    operator = getattr(torch.ops.lwas_fast, rule.operator)
    arguments = (
        selection.params,
        gradients,
        *([state[name] for state in states] for name in rule.buffers(group)),
        bucket.table,
        bucket.steps,
        selection.where,
        [float(lr), ramp, warmup_rate, gain, cap, largest, RMS_FLOOR, SLACK],
        warming,
        *rule.numbers(group),
        group["maximize"],
        group["schedule_free"],
        on_device,
        *scalars,
    )
    if total is None:
        operator(*arguments)
        return
    on = bucket.table.device
    totals = torch.empty(len(selection.elements), 4, dtype=torch.float64, device=on)
    scratch = None
    if on.type == "cuda" and extension.EXTENSION is not None:
        size = extension.EXTENSION.scratch_size([param.numel() for param in selection.params])
        scratch = torch.empty(size, dtype=torch.float64, device=on)
    operator(*arguments, totals, scratch)
    total(totals)
    operator(*arguments, totals, scratch, True)
