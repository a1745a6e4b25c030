"""What an optimizer says of itself to the rooms that measure and update, and the values it works on.

A rule is the whole difference between `SGDLW` and `AdamWLW`: the state it keeps, the direction it measures along and
steps along, and how its weight decay acts. `adamw.py` and `sgd.py` have one each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lwas_fast.layers import Bucket, Selection


class Scaling(NamedTuple):
    """What a ``torch.amp.GradScaler`` sets: see its ``step``.

    Tensors of one element, or None.
    """

    grad_scale: Tensor | None = None  # gradients are to be divided by it
    found_inf: Tensor | None = None  # nothing is to happen where it is not 0


class Part(NamedTuple):
    """What of a bucket takes a step: the tensors that have a gradient, their hyperparameters and their states."""

    bucket: Bucket
    selection: Selection
    group: dict[str, Any]
    states: list[dict[str, Any]]


class Here(NamedTuple):
    """Where a measurement is to be made: a list each, of one entry for each parameter.

    Attributes:
        states: The optimizer's; zeros before a parameter's first step.
        weights: The parameters, in the dtype of their state.
        gradients: Theirs, of the loss to be minimised, likewise.
        steps: The number (N,) of their next update, in the dtype of the statistics.
        factors: What the ascent direction (of SGD: the gradient) is to be multiplied by: -1 or 1, by layer.
    """

    states: list[dict[str, Any]]
    weights: list[Tensor]
    gradients: list[Tensor]
    steps: Tensor
    factors: list[float]


class Moving:
    """What `Rule.advance` works on: gradients, weights, and which elements take part. Making it counts the step.

    Attributes:
        gradients: Ascent gradients of the loss to be minimised. Owned: may be overwritten.
        weights: The parameters in their state's dtype. Not to be changed by `Rule.advance`.
        steps: How many steps each has taken with this one (N,).
        moves: (S,) bool, whether anything of a layer moves.
        skips: (S,) bool, whether elements of it are left alone.
    """

    def __init__(self, part: Part, gradients: list[Tensor], weights: list[Tensor], scaling: Scaling):
        self.gradients = gradients
        self.weights = weights
        # The square: a second moment must not become infinite either.
        self._finite = [gradient.square().isfinite() for gradient in gradients]
        if scaling.found_inf is not None:
            self._finite = [finite & (scaling.found_inf.to(finite.device) == 0) for finite in self._finite]
        alive = part.selection.per_layer(torch.stack([finite.sum() for finite in self._finite]))
        self.skips = alive < part.selection.elements
        self.moves = (alive > 0) | ~self.skips
        counts, moves = [state["step"] for state in part.states], self.moves.to(torch.float32)
        torch._foreach_add_(counts, [moves[layer] for layer in part.selection.layer])
        self.steps = torch.stack(counts).to(part.selection.dtype)

    def taking_part(self, values: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        """Of each tensor `values` where the gradient is finite, `others` elsewhere."""
        return [torch.where(f, v, o) for f, v, o in zip(self._finite, values, others, strict=True)]


def each(values: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Split the numbers of N tensors (N,) into N tensors without dimension, in the others' dtypes."""
    return [v.to(t.dtype) for v, t in zip(values.unbind(), tensors, strict=True)]


def bias_correction(steps: Tensor, beta: float) -> Tensor:
    """1 - beta**steps without the cancellation that costs float32 four digits at beta = 0.999; 1 at 0 steps."""
    decay = math.log(beta) if beta > 0 else -math.inf
    return torch.where(steps > 0, -torch.expm1(steps * decay), 1.0)


class Rule(ABC):
    """An optimizer's own formulae.

    Attributes:
        name: The optimizer's, for messages.
        buffers_schedule_free: Names of the state tensors, shaped like the parameter, in the schedule-free mode; the
            first is ``"offset"``, the iterate minus the average.
        buffers_with_momentum: Their names in the mode with momentum.
        cap_schedule_free: Default of ``cap``; likewise `cap_with_momentum`.
        decoupled: Whether weight decay acts on the weights rather than through the gradient.
        operator: Name of the compiled update in ``torch.ops.lwas_fast``; None where there is none.
    """

    name: ClassVar[str]
    buffers_schedule_free: ClassVar[tuple[str, ...]]
    buffers_with_momentum: ClassVar[tuple[str, ...]]
    cap_schedule_free: ClassVar[float]
    cap_with_momentum: ClassVar[float]
    decoupled: ClassVar[bool]
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

    @abstractmethod
    def directions(self, group: dict[str, Any], here: Here) -> tuple[list[Tensor] | None, list[Tensor]]:
        """Give what a measurement goes along, changing nothing: where a step would go from these gradients alone.

        Returns:
            ``here.gradients`` (with L2), or None if they are the ascent direction itself, which saves reading them; and
            the ascent direction times ``here.factors``.
        """

    @abstractmethod
    def advance(self, group: dict[str, Any], states: list[dict[str, Any]], moving: Moving) -> list[Tensor]:
        """Update the states in place, in plain torch, and return the directions to step along (fresh tensors).

        States change through ``moving.taking_part(new, old)`` only, for an element whose gradient is not finite stays
        as it is. Directions need no masking.
        """

    def numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """The hyperparameters that the compiled operator's schema asks for, in its order."""
        raise NotImplementedError
