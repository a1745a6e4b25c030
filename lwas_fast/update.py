"""One optimizer step in plain torch: advance the state, bound the step, move the weights.

The formula of the direction is the optimizers' own (`sgd.py`, `adamw.py`); what is common to them stands here. It
never reads a number back from the device: a layer whose gradient is not finite is left alone by arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lwas_fast import rates
from lwas_fast.layers import Bucket, Selection, state_dtype

Advance: TypeAlias = "Callable[[dict[str, Any], list[dict[str, Any]], Moving], list[Tensor]]"


class Moving:
    """What an optimizer's `_advance` works on: gradients, weights, and which layers take part.

    Attributes:
        gradients: Ascent gradients of the loss to be minimised, zeroed where the layer is left alone. Owned: may be
            overwritten.
        weights: The parameters in their state's dtype. Not to be changed by `_advance`.
    """

    def __init__(self, selection: Selection, gradients: list[Tensor], weights: list[Tensor], finite: Tensor):
        self.gradients = gradients
        self.weights = weights
        self._selection = selection
        self._moves = finite

    def share(self, value: float) -> list[Tensor]:
        """For each tensor, `value` where its layer takes part and 0 where it is left alone."""
        return self._selection.per_tensor(self._moves * value)

    def count(self, states: list[dict[str, Any]]) -> Tensor:
        """Count this step in each tensor's ``step`` where it takes part; return the counts (N,)."""
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [share.to(torch.float32) for share in self.share(1.0)])
        return torch.stack(steps).to(self._moves.dtype)

    def each(self, values: Tensor) -> list[Tensor]:
        """Split numbers of tensors (N,) into N views in the tensors' own dtypes."""
        return [v.to(w.dtype) for v, w in zip(values.unbind(), self.weights, strict=True)]


def bias_correction(steps: Tensor, beta: float, empty: float = 1.0) -> Tensor:
    """1 - beta**steps without the cancellation that costs float32 four digits at beta = 0.999.

    Args:
        steps: Number of updates, any shape.
        beta: The average's decay, 0 <= beta < 1.
        empty: What to give where there was no update yet.
    """
    decay = math.log(beta) if beta > 0 else -math.inf
    return torch.where(steps > 0, -torch.expm1(steps * decay), empty)


def _squares(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    norms: Sequence[Tensor] = torch._foreach_norm(tensors)
    return torch.stack([norm.to(dtype) for norm in norms]).square()


def step_selection(
    bucket: Bucket,
    selection: Selection,
    group: dict[str, Any],
    states: list[dict[str, Any]],
    advance: Advance,
    decoupled: bool,
) -> None:
    """Take one step with some of a bucket's tensors, all of which have a gradient.

    Args:
        bucket: Gives the table of statistics, whose `APPLIED` and counters are brought up to date.
        selection: The tensors.
        group: Their hyperparameters.
        states: Their states, changed in place.
        advance: Updates the states and returns the directions (fresh tensors).
        decoupled: Whether weight decay acts on the weights here (AdamW) or came with the gradient (SGD).
    """
    dtype = bucket.table.dtype
    weights = [p.to(state_dtype(p)) for p in selection.params]  # p itself unless half precision
    gradients = [p.grad.to(w.dtype) for p, w in zip(selection.params, weights, strict=True) if p.grad is not None]
    finite = selection.per_layer(_squares(gradients, dtype)).isfinite()
    moves = selection.per_tensor(finite)
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    gradients = [torch.where(move, g, 0.0) for move, g in zip(moves, gradients, strict=True)]

    directions = advance(group, states, Moving(selection, gradients, weights, finite.to(dtype)))

    lengths = selection.per_layer(_squares(directions, dtype)).sqrt()
    sizes = selection.per_layer(_squares(weights, dtype)).sqrt().maximum(selection.floor)
    table = rates.apply(bucket.table[selection.rows], sizes, lengths, finite, group, decoupled)
    bucket.table[selection.rows] = table
    applied = table[:, rates.Column.APPLIED]
    if decoupled and group["weight_decay"] != 0:
        torch._foreach_mul_(weights, selection.per_tensor(1 - applied * group["weight_decay"]))
    torch._foreach_mul_(directions, selection.per_tensor(applied))
    torch._foreach_add_(weights, directions)
    for param, weight in zip(selection.params, weights, strict=True):
        if weight is not param:
            param.copy_(weight)
