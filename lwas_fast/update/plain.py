"""One step in plain torch: advance the state, bound the step, move the weights.

The formula of the direction is the optimizers' own (`sgd.py`, `adamw.py`); what is common to them stands here. It
never reads a number back from the device: an element whose gradient is not finite is left alone by arithmetic. The
compiled update (`compiled.py`, csrc/) does the same in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwas_fast.layers import squared_norms, state_dtype
from lwas_fast.rule import Moving, Part, Rule, Scaling, each
from lwas_fast.table import Column
from lwas_fast.update.control import control, stepped


def plain_step(rule: Rule, part: Part, scaling: Scaling) -> None:
    """Take one step with some of a bucket's tensors; states and statistics are brought up to date."""
    bucket, selection, group, states = part
    dtype = bucket.table.dtype
    weights = [p.to(state_dtype(p)) for p in selection.params]  # p itself unless half precision
    gradients = [p.grad.to(w.dtype) for p, w in zip(selection.params, weights, strict=True) if p.grad is not None]
    if scaling.grad_scale is not None:
        gradients = [g / scaling.grad_scale.to(g.device) for g in gradients]
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    moving = Moving(part, gradients, weights, scaling)

    directions = rule.advance(group, states, moving)

    directions = moving.taking_part(directions, [d.new_zeros(()) for d in directions])
    lengths = selection.per_layer(squared_norms(directions, dtype)).sqrt()
    sizes = selection.per_layer(squared_norms(weights, dtype)).sqrt().maximum(selection.floor)
    old = bucket.table[selection.rows]
    table = stepped(old, sizes, lengths, moving.moves, moving.skips, group["lr"], control(rule, group))
    applied = table[:, Column.APPLIED]
    if scaling.found_inf is not None:
        table = torch.where(scaling.found_inf.to(table.device) == 0, table, old)
    bucket.table[selection.rows] = table
    torch._foreach_mul_(directions, selection.per_tensor(applied))
    decay = group["weight_decay"] if rule.decoupled else 0.0
    if group["schedule_free"]:
        if decay != 0:
            torch._foreach_sub_(directions, torch._foreach_mul(weights, selection.per_tensor(applied * decay)))
        moved = _average_in(directions, part, weights, moving, rule.share(group))
    elif decay != 0:
        moved = list(torch._foreach_mul(weights, selection.per_tensor(1 - applied * decay)))
        torch._foreach_add_(moved, directions)
    else:
        moved = list(torch._foreach_add(weights, directions))
    torch._foreach_copy_(selection.params, moving.taking_part(moved, weights))


def _average_in(moves: list[Tensor], part: Part, weights: list[Tensor], moving: Moving, beta: float) -> list[Tensor]:
    """Move the iterates, take them into their averages, and return the weights between both to train on.

    A tensor's state holds its iterate minus its average; its weights are the average plus 1 - beta of that.
    """
    shares = 1 / moving.steps  # of the new iterate in the new average
    offsets = [state["offset"] for state in part.states]
    ahead = list(torch._foreach_add(offsets, moves))  # the iterate minus the average before it
    # In the increments of both, so that where nothing moves the weights stay to the last bit.
    pull, rest, of_move = beta * shares, 1 - shares, 1 - beta + beta * shares
    moved = list(torch._foreach_mul(moves, each(of_move, weights)))
    torch._foreach_add_(moved, torch._foreach_mul(offsets, each(pull, weights)))
    torch._foreach_add_(moved, weights)
    for i, (param, weight) in enumerate(zip(part.selection.params, weights, strict=True)):
        if param.dtype != weight.dtype:
            # Half precision rounds moves away. The iterate makes the move that is left, or its average would run off.
            ahead[i] += (moved[i].to(param.dtype).to(weight.dtype) - moved[i]) / of_move[i].to(weight.dtype)
    torch._foreach_mul_(ahead, each(rest, weights))
    torch._foreach_copy_(offsets, moving.taking_part(ahead, offsets))
    return moved
