"""One step in compiled code: all tensors of a bucket in one pass over parameter, gradient and state.

`csrc/update_math.h` says how; `plain.py` is the same in plain torch. An operator is handed here what its schema asks.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from lwas_fast.rule import Part, Rule, Scaling
from lwas_fast.selection import RMS_FLOOR
from lwas_fast.update import extension
from lwas_fast.update.control import SLACK, control


def compiled_step(rule: Rule, part: Part, scaling: Scaling) -> None:
    """Take one step with some of a bucket's tensors; states and statistics are brought up to date.

    Raises:
        TypeError: A dtype that the operator does not take. Nothing has been changed.
    """
    operator, arguments = _call(rule, part, scaling)
    operator(*arguments)


def step_of_shards(rule: Rule, part: Part, scaling: Scaling) -> Generator[Tensor, Tensor, None]:
    """The same where other processes hold parts of the tensors, in two parts.

    It yields this process's sums over layers, (S, 4) float64, and is to be sent those of all, the same to the last bit
    on each.

    Raises:
        TypeError: As above.
    """
    operator, arguments = _call(rule, part, scaling)
    on, selection = part.bucket.table.device, part.selection
    totals = torch.empty(len(selection.elements), 4, dtype=torch.float64, device=on)
    scratch = None
    if on.type == "cuda" and extension.EXTENSION is not None:
        size = extension.EXTENSION.scratch_size([param.numel() for param in arguments[0]])
        scratch = torch.empty(size, dtype=torch.float64, device=on)
    operator(*arguments, totals, scratch)
    if selection.shards is None:
        totals = yield totals
    else:
        totals = yield selection.shards.share_of_layers(totals)
        totals[:, 2].round_()  # elements that were left alone, counted by shares
    operator(*arguments, totals, scratch, True)


def _call(rule: Rule, part: Part, scaling: Scaling) -> tuple[Any, tuple[Any, ...]]:
    """The operator, and its arguments up to those that take it in two parts."""
    bucket, selection, group, states, gradients = part
    lr: float | Tensor = group["lr"]
    on_device = None
    if isinstance(lr, Tensor) and lr.is_cuda and lr.device == bucket.table.device:
        on_device, lr = lr.to(torch.float32), 1.0  # to read it here would wait for the device
    scalars = (None if s is None else s.to(device=bucket.table.device, dtype=torch.float32) for s in scaling)
    warming, warmup_rate, gain, ramp, cap, largest = control(rule, group)
    assert rule.operator is not None  # `extension.serves` says so
    return getattr(torch.ops.lwas_fast, rule.operator), (
        selection.here,
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
