"""One optimizer step in plain torch: advance the state, bound the step, move the weights.

The formula of the direction is the optimizers' own (`sgd.py`, `adamw.py`); what is common to them stands here. It
never reads a number back from the device: an element whose gradient is not finite is left alone by arithmetic. The
compiled update (`fused.py`, csrc/) does the same in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lwas_fast import rates
from lwas_fast.layers import Bucket, Selection, squared_norms, state_dtype

Advance: TypeAlias = "Callable[[dict[str, Any], list[dict[str, Any]], Moving], list[Tensor]]"


class Scaling(NamedTuple):
    """What a ``torch.amp.GradScaler`` sets: see its ``step``.

    Attributes:
        grad_scale: Gradients are to be divided by it; a tensor of one element, or None.
        found_inf: Nothing is to happen where it is not 0; likewise.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Moving:
    """What an optimizer's `_advance` works on: gradients, weights, and which elements take part.

    Attributes:
        gradients: Ascent gradients of the loss to be minimised. Owned: may be overwritten.
        weights: The parameters in their state's dtype. Not to be changed by `_advance`.
        steps: How many steps each has taken with this one (N,), once `count` was called.
    """

    def __init__(self, selection: Selection, gradients: list[Tensor], weights: list[Tensor], scaling: Scaling):
        self.gradients = gradients
        self.weights = weights
        # The square: a second moment must not become infinite either.
        self._finite = [gradient.square().isfinite() for gradient in gradients]
        if scaling.found_inf is not None:
            self._finite = [finite & (scaling.found_inf.to(finite.device) == 0) for finite in self._finite]
        alive = selection.per_layer(torch.stack([finite.sum() for finite in self._finite]))
        self.skips = alive < selection.elements
        self.moves = (alive > 0) | ~self.skips
        self._selection = selection

    def taking_part(self, values: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        """Of each tensor `values` where the gradient is finite, `others` elsewhere."""
        return [torch.where(f, v, o) for f, v, o in zip(self._finite, values, others, strict=True)]

    def count(self, states: list[dict[str, Any]]) -> Tensor:
        """Count this step in each tensor's ``step`` if its layer moves; return the counts (N,)."""
        steps = [state["step"] for state in states]
        moves = self.moves.to(torch.float32)
        torch._foreach_add_(steps, [moves[layer] for layer in self._selection.layer])
        self.steps = torch.stack(steps).to(self._selection.dtype)
        return self.steps


def each(values: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Split the numbers of N tensors (N,) into N tensors without dimension, in the others' dtypes."""
    return [v.to(t.dtype) for v, t in zip(values.unbind(), tensors, strict=True)]


def bias_correction(steps: Tensor, beta: float, empty: float = 1.0) -> Tensor:
    """1 - beta**steps without the cancellation that costs float32 four digits at beta = 0.999.

    Args:
        steps: Number of updates, any shape.
        beta: The average's decay, 0 <= beta < 1.
        empty: What to give where there was no update yet.
    """
    decay = math.log(beta) if beta > 0 else -math.inf
    return torch.where(steps > 0, -torch.expm1(steps * decay), empty)


def step_selection(
    bucket: Bucket,
    selection: Selection,
    group: dict[str, Any],
    states: list[dict[str, Any]],
    scaling: Scaling,
    advance: Advance,
    decoupled: bool,
    beta: float,
) -> None:
    """Take one step with some of a bucket's tensors, all of which have a gradient.

    Args:
        bucket: Gives the table of statistics, whose `APPLIED`, norms and counters are brought up to date.
        selection: The tensors.
        group: Their hyperparameters.
        states: Their states, changed in place.
        scaling: What a GradScaler wants done with the gradients.
        advance: Updates the states and returns the directions (fresh tensors).
        decoupled: Whether weight decay acts on the weights here (AdamW) or came with the gradient (SGD).
        beta: Decay of the gradient's average, or the average's share in a schedule-free step.
    """
    dtype = bucket.table.dtype
    weights = [p.to(state_dtype(p)) for p in selection.params]  # p itself unless half precision
    gradients = [p.grad.to(w.dtype) for p, w in zip(selection.params, weights, strict=True) if p.grad is not None]
    if scaling.grad_scale is not None:
        gradients = [g / scaling.grad_scale.to(g.device) for g in gradients]
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    moving = Moving(selection, gradients, weights, scaling)

    directions = advance(group, states, moving)

    directions = moving.taking_part(directions, [d.new_zeros(()) for d in directions])
    lengths = selection.per_layer(squared_norms(directions, dtype)).sqrt()
    sizes = selection.per_layer(squared_norms(weights, dtype)).sqrt().maximum(selection.floor)
    old = bucket.table[selection.rows]
    control = rates.control(group, decoupled, beta)
    table = rates.apply(old, sizes, lengths, moving.moves, moving.skips, group["lr"], control)
    applied = table[:, rates.Column.APPLIED]
    if scaling.found_inf is not None:
        table = torch.where(scaling.found_inf.to(table.device) == 0, table, old)
    bucket.table[selection.rows] = table
    torch._foreach_mul_(directions, selection.per_tensor(applied))
    decay = group["weight_decay"] if decoupled else 0.0
    if group["schedule_free"]:
        if decay != 0:
            torch._foreach_sub_(directions, torch._foreach_mul(weights, selection.per_tensor(applied * decay)))
        moved = _average_in(directions, selection.params, weights, states, moving, beta)
    elif decay != 0:
        moved = list(torch._foreach_mul(weights, selection.per_tensor(1 - applied * decay)))
        torch._foreach_add_(moved, directions)
    else:
        moved = list(torch._foreach_add(weights, directions))
    torch._foreach_copy_(selection.params, moving.taking_part(moved, weights))


def _average_in(
    moves: list[Tensor],
    params: list[Tensor],
    weights: list[Tensor],
    states: list[dict[str, Any]],
    moving: Moving,
    beta: float,
) -> list[Tensor]:
    """Move the iterates, take them into their averages, and return the weights between both to train on.

    A tensor's state holds its iterate minus its average; its weights are the average plus 1 - beta of that.
    """
    shares = 1 / moving.steps  # of the new iterate in the new average
    offsets = [state["offset"] for state in states]
    ahead = list(torch._foreach_add(offsets, moves))  # the iterate minus the average before it
    # In the increments of both, so that where nothing moves the weights stay to the last bit.
    pull, rest, of_move = beta * shares, 1 - shares, 1 - beta + beta * shares
    moved = list(torch._foreach_mul(moves, each(of_move, weights)))
    torch._foreach_add_(moved, torch._foreach_mul(offsets, each(pull, weights)))
    torch._foreach_add_(moved, weights)
    for i, (param, weight) in enumerate(zip(params, weights, strict=True)):
        if param.dtype != weight.dtype:
            # Half precision rounds moves away. The iterate makes the move that is left, or its average would run off.
            ahead[i] += (moved[i].to(param.dtype).to(weight.dtype) - moved[i]) / of_move[i].to(weight.dtype)
    torch._foreach_mul_(ahead, each(rest, weights))
    torch._foreach_copy_(offsets, moving.taking_part(ahead, offsets))
    return moved
