"""One step in plain torch: advance the state, bound the step, move the weights.

The formula of the direction is the optimizers' own (`sgd.py`, `adamw.py`); what is common to them stands here. It
never reads a number back from another device than the CPU: there an element whose gradient is not finite is left alone
by arithmetic. The compiled update (`compiled.py`, csrc/) does the same in one pass.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from lwas_fast.rule import Moving, Part, Rule, Scaling, add_times, each
from lwas_fast.selection import HALF, state_dtype
from lwas_fast.table import Column
from lwas_fast.update.control import control, stepped


def plain_step(rule: Rule, part: Part, scaling: Scaling) -> Generator[Tensor, Tensor, None]:
    """Take one step with some of a bucket's tensors; states and statistics are brought up to date.

    Where other processes hold parts of the tensors it takes it in two: it yields this process's sums over layers,
    (S, 4) float64, and is to be sent those of all.
    """
    bucket, selection, group, states, gradients = part
    params = weights = selection.here
    # Asked first, for `to` costs a microsecond also where it does nothing.
    if {p.dtype for p in weights} & set(HALF):
        weights = [p.to(state_dtype(p)) for p in weights]
    if [g.dtype for g in gradients] != [w.dtype for w in weights]:
        gradients = [g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)]
    if scaling.grad_scale is not None:
        gradients = list(torch._foreach_div(gradients, scaling.grad_scale.to(bucket.table.device).reshape(())))
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    moving = Moving(part, gradients, weights, scaling)

    directions = rule.advance(group, states, moving)

    squares = moving.squares
    if squares is None:
        directions = moving.taking_part(directions, [d.new_zeros(()) for d in directions])
    if squares is None or directions is not gradients:
        squares = selection.squared_norms(directions)
    if isinstance(moving.factors, Tensor) or abs(moving.factors) != 1:
        squares = squares * moving.factors**2
    sizes = selection.squared_norms(weights)
    moves: Tensor | bool = True
    skips: Tensor | bool = False
    lost = None if moving.alive is None else selection.sizes - moving.alive
    if selection.shards is None:
        lengths, sizes = selection.per_layer(squares), selection.per_layer(sizes)
        lost = None if lost is None else selection.per_layer(lost)
    else:
        lost = torch.zeros_like(squares) if lost is None else lost
        # Doubles, which count exactly; and as many as the compiled update sends, which another process may have.
        doubles = [column.double() for column in (squares, sizes, lost, torch.zeros_like(squares))]
        sums = yield selection.share(torch.stack(doubles, 1))
        lengths, sizes, lost = sums[:, 0].to(squares), sums[:, 1].to(squares), sums[:, 2].round()
    if lost is not None:
        skips = lost > 0
        moves = (lost < selection.elements) | ~skips
    bucket.steps[selection.places] += selection.of_tensors(moves) if isinstance(moves, Tensor) else 1
    old, elements = bucket.table[selection.rows], selection.counts
    table = stepped(old, sizes, elements, lengths, moves, skips, group["lr"], control(rule, group))
    if scaling.found_inf is not None:
        bucket.table[selection.rows] = torch.where(scaling.found_inf.to(table.device) == 0, table, old)
    else:
        bucket.table[selection.rows] = table
    applied = selection.of_tensors(table[:, Column.APPLIED])
    decay = float(group["weight_decay"]) if rule.decoupled else 0.0
    factors = moving.factors
    if decay != 0 and (which := selection.decays):
        by = -decay / factors
        by = by[which] if isinstance(by, Tensor) else by
        add_times([directions[i] for i in which], [weights[i] for i in which], by)
    rates = each(applied * factors, weights)
    if group["schedule_free"]:
        _move_averaged(part, params, moving, directions, rates, rule.share(group))
        return
    moved = moving.to_change(weights)
    torch._foreach_addcmul_(moved, directions, rates)
    moving.settle(params, moved, weights)


def _move_averaged(
    part: Part, params: list[Tensor], moving: Moving, directions: list[Tensor], rates: list[Tensor], beta: float
) -> None:
    """Move the iterates, take them into their averages, and the weights to between both to train on.

    A tensor's state holds its iterate minus its average; its weights are the average plus 1 - beta of that.
    """
    weights = moving.weights
    shares = 1 / moving.steps  # of the new iterate in the new average
    offsets = [state["offset"] for state in part.states]
    ahead, moved = moving.to_change(offsets), moving.to_change(weights)
    pulls, rests = beta * shares, each(1 - shares, weights)
    for at in part.selection.blocks:
        # First the iterate minus the average before it; then it takes the weights along, which make 1 - beta of the
        # move besides. In increments, so that where nothing moves the weights stay to the last bit.
        torch._foreach_addcmul_(ahead[at], directions[at], rates[at])
        torch._foreach_addcmul_(moved[at], directions[at], rates[at], value=1 - beta)
        add_times(moved[at], ahead[at], pulls[at] if isinstance(pulls, Tensor) else pulls)
        torch._foreach_mul_(ahead[at], rests[at])
    moving.settle(params, moved, weights)
    if params is not weights:
        # Half precision rounds moves away. The iterate makes the move that is left, or its average would run off.
        left = each((1 - shares) / (1 - beta + beta * shares), weights)
        for i, (param, weight) in enumerate(zip(params, moved, strict=True)):
            if param.dtype != weight.dtype:
                ahead[i] += (param.to(weight.dtype) - weight) * left[i]
    moving.settle(offsets, ahead, offsets)
