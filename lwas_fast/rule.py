"""What an optimizer says of itself to the rooms that measure and update, and the values it works on.

A rule is the whole difference between `MuonLW`, `AdamWLW` and `SGDLW`: the state it keeps, the direction it measures
along and steps along, and how its weight decay acts. `muon.py`, `adamw.py` and `sgd.py` have one each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor

from lwas_fast.layers import Bucket
from lwas_fast.selection import Selection


class Scaling(NamedTuple):
    """What a ``torch.amp.GradScaler`` sets: see its ``step``.

    Tensors of one element, or None.
    """

    grad_scale: Tensor | None = None  # gradients are to be divided by it
    found_inf: Tensor | None = None  # nothing is to happen where it is not 0


class Part(NamedTuple):
    """What of a bucket takes a step: the tensors that have a gradient, their hyperparameters, states and gradients.

    Of sharded tensors states and gradients are what this process holds.
    """

    bucket: Bucket
    selection: Selection
    group: dict[str, Any]
    states: list[dict[str, Any]]
    gradients: list[Tensor]


class Here(NamedTuple):
    """Where a measurement is to be made: a list each, of one entry for each parameter.

    Attributes:
        states: The optimizer's; zeros before a parameter's first step.
        weights: The parameters (of sharded ones what this process holds), in the dtype of their state.
        gradients: Theirs, of the loss to be minimised, likewise.
        decays: Positions of those that weight decay acts on.
        steps: The number (N,) of their next update, in the dtype of the statistics.
        factors: What the ascent direction (of SGD: the gradient) is to be multiplied by: -1 or 1, by layer.
    """

    states: list[dict[str, Any]]
    weights: list[Tensor]
    gradients: list[Tensor]
    decays: list[int]
    steps: Tensor
    factors: list[float]


class Moving:
    """What `Rule.advance` works on: gradients, weights, and which elements take part.

    Attributes:
        gradients: Ascent gradients of the loss to be minimised. Not to be changed: they may be the user's.
        weights: The parameters in their state's dtype. Not to be changed by `Rule.advance`.
        decays: Positions of those that weight decay acts on.
        steps: How many steps each has taken with this one (N,); a number where it is known that all have taken as many.
        alive: How many elements of each take part (N,); None if it is known that all do.
        squares: The squared norms (N,) of the gradients if all elements take part and that is known, else None.
        factors: What the directions that `Rule.advance` returns are to be multiplied by, a number or one a tensor like
            `steps`. A rule may set it, which spares it a pass over them.
    """

    def __init__(self, part: Part, gradients: list[Tensor], weights: list[Tensor], scaling: Scaling):
        selection, counts = part.selection, part.bucket.steps
        self.gradients, self.weights, self.decays = gradients, weights, selection.decays
        self.factors: Tensor | float = 1.0
        self.alive: Tensor | None = None
        self.squares = _squares_if_all_finite(selection, gradients, scaling.found_inf)
        if self.squares is None:
            # The square: a second moment must not become infinite either.
            self._finite = [gradient.square().isfinite() for gradient in gradients]
            if scaling.found_inf is not None:
                self._finite = [finite & (scaling.found_inf.to(finite.device) == 0) for finite in self._finite]
            self.alive = torch.stack([finite.sum() for finite in self._finite])
        counts = counts[selection.places] + 1
        self.steps: Tensor | float = counts.to(selection.dtype)
        if counts.is_cpu:
            least, most = (number.item() for number in counts.aminmax())
            self.steps = least if least == most > 0 else self.steps

    def taking_part(self, values: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        """Of each tensor `values` where the gradient is finite, `others` elsewhere."""
        if self.squares is not None:
            return list(values)
        return [torch.where(f, v, o) for f, v, o in zip(self._finite, values, others, strict=True)]

    def to_change(self, tensors: list[Tensor]) -> list[Tensor]:
        """These tensors if all their elements take part, else copies: to be changed in place, then `settle`d."""
        return tensors if self.squares is not None else list(torch._foreach_mul(tensors, 1))

    def settle(self, tensors: list[Tensor], changed: list[Tensor], before: list[Tensor]) -> None:
        """Write what was changed into `tensors`, where it takes part; elsewhere they keep what was `before`."""
        if changed is not tensors:
            torch._foreach_copy_(tensors, self.taking_part(changed, before))


def _squares_if_all_finite(selection: Selection, gradients: list[Tensor], found_inf: Tensor | None) -> Tensor | None:
    """The gradients' squared norms if these say that all squared elements are finite; None if not, or off the CPU.

    Nothing is read from another device, for that would wait for it.
    """
    if not gradients[0].is_cpu or (found_inf is not None and not (found_inf.is_cpu and found_inf == 0)):
        return None
    squares = selection.squared_norms(gradients)
    limit = min(torch.finfo(dtype).max for dtype in {gradient.dtype for gradient in gradients})
    return squares if squares.max().item() < limit / 4 else None  # NaN is not less; 4: norms are rounded


def each(values: Tensor | float, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Split the numbers of N tensors (N,), or repeat one, into N tensors without dimension, in the others' dtypes.

    `torch._foreach_` takes these faster than a list of Python's numbers. One number for all is for tensors on a CPU.
    """
    dtypes = {t.dtype for t in tensors}
    if isinstance(values, Tensor):
        numbers = {dtype: values.to(dtype).unbind() for dtype in dtypes}
    else:
        numbers = {dtype: (torch.tensor(values, dtype=dtype, device="cpu"),) * len(tensors) for dtype in dtypes}
    if len(numbers) == 1:
        return list(numbers[dtypes.pop()])
    return [numbers[t.dtype][i] for i, t in enumerate(tensors)]


def add_times(tensors: list[Tensor], others: list[Tensor], factors: Tensor | float) -> None:
    """Add others times one number for each (N,), or for all, to tensors, in place."""
    if isinstance(factors, Tensor):
        torch._foreach_addcmul_(tensors, others, each(factors, tensors))
    else:
        torch._foreach_add_(tensors, others, alpha=factors)


def with_decay(gradients: list[Tensor], weights: Sequence[Tensor], decays: Sequence[int], decay: float) -> list[Tensor]:
    """Gradients plus `decay` times the weights, where that acts; the list given and its tensors stay as they are."""
    found = list(gradients)
    if decay != 0 and decays:
        added = torch._foreach_add([gradients[i] for i in decays], [weights[i] for i in decays], alpha=decay)
        for i, gradient in zip(decays, added, strict=True):
            found[i] = gradient
    return found


@overload
def bias_correction(steps: float, beta: float) -> float: ...
@overload
def bias_correction(steps: Tensor, beta: float) -> Tensor: ...
def bias_correction(steps: Tensor | float, beta: float) -> Tensor | float:
    """1 - beta**steps without the cancellation that costs float32 four digits at beta = 0.999; 1 at 0 steps."""
    decay = math.log(beta) if beta > 0 else -math.inf
    if isinstance(steps, Tensor):
        return torch.where(steps > 0, -torch.expm1(steps * decay), 1.0)
    return -math.expm1(steps * decay) if steps > 0 else 1.0


class Rule(ABC):
    """An optimizer's own formulae.

    Attributes:
        name: The optimizer's, for messages.
        buffers_schedule_free: Names of the state tensors, shaped like the parameter, in the schedule-free mode; the
            first is ``"offset"``, the iterate minus the average.
        buffers_with_momentum: Their names in the mode with momentum.
        cap_schedule_free: Default of ``cap``; likewise `cap_with_momentum`.
        decoupled: Whether weight decay acts on the weights rather than through the gradient.
        normalizes: Whether the length of directions is relative to that of past gradients (Adam's), so that a gradient
            that is clipped after it was measured has another length than a step's.
        scalars: Names of state tensors without dimension, which all modes keep.
        whole: Whether a direction needs all of its tensor, so that sharded ones cannot be optimized.
        max_fall: Most that the present rate may exceed a measured one, as a factor; it is cut to that.
        operator: Name of the compiled update in ``torch.ops.lwas_fast``; None where there is none.
    """

    name: ClassVar[str]
    buffers_schedule_free: ClassVar[tuple[str, ...]]
    buffers_with_momentum: ClassVar[tuple[str, ...]]
    cap_schedule_free: ClassVar[float]
    cap_with_momentum: ClassVar[float]
    decoupled: ClassVar[bool]
    normalizes: ClassVar[bool] = False
    scalars: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = False
    max_fall: ClassVar[float] = math.inf
    operator: ClassVar[str | None] = None

    def buffers(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors that a group's mode keeps."""
        return self.buffers_schedule_free if group["schedule_free"] else self.buffers_with_momentum

    def cap(self, group: dict[str, Any]) -> float:
        """The group's cap, or its mode's default."""
        own: float | None = group["cap"]
        default = self.cap_schedule_free if group["schedule_free"] else self.cap_with_momentum
        return default if own is None else own

    @abstractmethod
    def share(self, group: dict[str, Any]) -> float:
        """The average's share in schedule-free weights; with momentum it has no effect."""

    def persistence(self, group: dict[str, Any]) -> float:
        """What bounded rates are multiplied by because directions of successive steps are alike."""
        return 1.0

    @abstractmethod
    def directions(self, group: dict[str, Any], here: Here) -> tuple[list[Tensor] | None, list[Tensor]]:
        """Give what a measurement goes along, changing nothing: where a step would go from these gradients alone.

        Returns:
            ``here.gradients`` (with L2), or None if they are the ascent direction itself, which saves reading them; and
            the ascent direction times ``here.factors``.
        """

    @abstractmethod
    def advance(self, group: dict[str, Any], states: list[dict[str, Any]], moving: Moving) -> list[Tensor]:
        """Update the states in place, in plain torch, and return the directions to step along.

        An element whose gradient is not finite stays as it is: states change through ``moving.taking_part(new, old)``
        only, or between ``moving.to_change`` and ``moving.settle``. Directions need no masking. They may be the
        gradients or states, which are only read, but of a `decoupled` rule they are fresh. ``moving.factors`` may hold
        what they are to be multiplied by.
        """

    def numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """The hyperparameters that the compiled operator's schema asks for, in its order."""
        raise NotImplementedError
