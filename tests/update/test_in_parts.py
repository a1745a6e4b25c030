"""A compiled step in two parts, as ranks take it that hold a part of every tensor each.

Catches: ranks whose rates, rows or step counts drift apart; sums that miss a rank; a layer of which a rank holds
nothing, or whose gradient is no number on one rank alone; a first part that settles anything, a second that advances
anything. `fuzz/` does the same with random lists, there with the CUDA kernels too.
"""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
import torch
from test_fused import DEVICES, EACH, KINDS, TOLERANCE
from torch import Tensor

from lwas_fast.rule import Part, Scaling
from lwas_fast.table import Column
from lwas_fast.update import extension
from lwas_fast.update.compiled import compiled_step, step_of_shards
from lwas_fast.update.step import prepare

pytestmark = pytest.mark.skipif(extension.EXTENSION is None, reason=f"no compiled update: {extension.MISSING}")
# Of two layers each two tensors, one of them longer than a chunk; a row that cannot be cut; a vector; nothing at all.
SHAPES = [(7, 5), (9,), (60, 1000), (3, 2), (1, 3), (11,), (0, 4)]
NAMES = ["a.weight", "a.bias", "b.weight", "b.bias", "row.weight", "vector.weight", "nothing.weight"]
# Where each is cut in two: unevenly, and so that one rank has all of it.
CUTS = [2, 0, 41, 3, 1, 10, 0]


@dataclass
class Holder:
    """What one rank holds, or the only process: parts of all tensors, and the numbers of whole layers."""

    params: list[Tensor]
    states: list[dict[str, Tensor]]
    table: Tensor
    steps: Tensor

    def all(self) -> list[Tensor]:
        return [*self.params, *(value for state in self.states for value in state.values()), self.table, self.steps]


def make(kind: str, dtype: torch.dtype, device: str = "cpu", **options: object):
    params = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in SHAPES]
    return KINDS[kind](
        zip(NAMES, params, strict=True), fused=True, update_every=10**9, warmup_steps=10**9, weight_decay=0.1, **options
    )


def part_of(opt, gradients: list[Tensor]) -> Part:
    """The step that an optimizer is about to take with these gradients."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    ((part, _, compiled),) = prepare(opt._layout, opt.rule)
    assert compiled and len(part.selection.params) == len(SHAPES)
    return part


def holder(part: Part, rank: int | None = None) -> Holder:
    """A copy of what a part works on: all of it, or a rank's shards."""

    def shard(tensor: Tensor, i: int) -> Tensor:
        cut = CUTS[i]
        own = tensor if rank is None else tensor[:cut] if rank == 0 else tensor[cut:]
        return own.detach().clone()

    names = part.states[0].keys() - {"layer", "step"}
    return Holder(
        [shard(p, i) for i, p in enumerate(part.selection.params)],
        [{name: shard(state[name], i) for name in names} for i, state in enumerate(part.states)],
        part.bucket.table.clone(),
        part.bucket.steps.clone(),
    )


def as_part(part: Part, of: Holder, rank: int | None = None) -> Part:
    """The step as this holder takes it: its tensors in the places of the optimizer's."""
    gradients = part.gradients
    if rank is not None:
        gradients = [g[:cut] if rank == 0 else g[cut:] for g, cut in zip(gradients, CUTS, strict=True)]
    bucket = replace(part.bucket, table=of.table, steps=of.steps)
    selection = replace(part.selection, params=of.params)
    return Part(bucket, selection, part.group, of.states, [g.contiguous() for g in gradients])


def take(opt, part: Part, scaling: Scaling) -> tuple[Holder, list[Holder], Tensor]:
    """The same step by one process and by two ranks; and what the ranks added up."""
    whole, ranks = holder(part), [holder(part, rank) for rank in (0, 1)]
    before = copy.deepcopy(ranks)
    compiled_step(opt.rule, as_part(part, whole), scaling)
    steps = [step_of_shards(opt.rule, as_part(part, rank, number), scaling) for number, rank in enumerate(ranks)]
    sums = torch.stack([next(step) for step in steps]).sum(0)
    for rank, old in zip(ranks, before, strict=True):
        assert torch.equal(rank.table, old.table) and torch.equal(rank.steps, old.steps)
    for step in steps:
        with suppress(StopIteration):
            step.send(sums.clone())
    return whole, ranks, sums


def close(one: Tensor, two: Tensor, dtype: torch.dtype, what: str) -> None:
    atol, rtol = TOLERANCE[dtype]
    torch.testing.assert_close(one, two, atol=atol, rtol=rtol, msg=lambda m: f"{what}: {m}")


def compare(whole: Holder, ranks: list[Holder], dtype: torch.dtype) -> None:
    assert torch.equal(ranks[0].table, ranks[1].table)
    assert torch.equal(ranks[0].steps, ranks[1].steps)
    assert torch.equal(ranks[0].steps, whole.steps)
    torch.testing.assert_close(ranks[0].table, whole.table, atol=0, rtol=1e-6)
    for i, shape in enumerate(SHAPES):
        close(torch.cat([rank.params[i] for rank in ranks]), whole.params[i], dtype, f"{NAMES[i]}, {shape}")
        for name, value in whole.states[i].items():
            close(torch.cat([rank.states[i][name] for rank in ranks]), value, dtype, f"{name} of {NAMES[i]}")


def finish(opt, part: Part, whole: Holder) -> None:
    """The optimizer goes on from where the whole step led."""
    opt._layout.enter({part.selection: part.states})
    states = [{name: state[name] for name in whole.states[0]} for state in part.states]
    own = Holder([p.detach() for p in part.selection.params], states, part.bucket.table, part.bucket.steps)
    for mine, now in zip(own.all(), whole.all(), strict=True):
        mine.copy_(now)
    part.group["steps"] += 1


def gradients_of(dtype: torch.dtype, scale: float = 1.0, device: str = "cpu") -> list[Tensor]:
    return [(scale * torch.randn(shape)).to(device, dtype) for shape in SHAPES]


@EACH
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_take_the_step_of_one_process(kind, dtype, device):
    opt = make(kind, dtype, device, warmup_rate=0.05, cap=0.1)
    for number in range(6):
        # The first step waits, for nothing is known. The fourth is to be corrected: its gradient is longer, which Adam
        # hardly sees, and its weights are smaller.
        part = part_of(opt, gradients_of(dtype, 100.0 if number == 3 else 1.0, device))
        with torch.no_grad():
            torch._foreach_mul_(part.selection.params, 0.2 if number == 3 else 1.0)
        whole, ranks, sums = take(opt, part, Scaling())
        assert sums.shape == (5, 4)
        if number == 3:
            assert (whole.table[:4, Column.APPLIED] < 0.9 * part.bucket.table[:4, Column.APPLIED]).all()
            assert kind != "sgd" or (sums[:2, 3] > 0).all(), "no move was over its limit"
        compare(whole, ranks, dtype)
        finish(opt, part, whole)
    assert (opt._layout.buckets[0].steps == 6).all()


@EACH
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("taken", [0, 2])
def test_gradients_that_are_no_numbers(kind, dtype, taken):
    opt = make(kind, dtype)
    for number in range(taken + 1):
        gradients = gradients_of(dtype)
        if number == taken:
            gradients[2][CUTS[2] :] = math.nan  # all of the weight that the second rank holds, not of the bias
            gradients[5].fill_(math.nan)
            gradients[0][0, 0] = math.inf
        part = part_of(opt, gradients)
        whole, ranks, sums = take(opt, part, Scaling())
        compare(whole, ranks, dtype)
        if number < taken:
            finish(opt, part, whole)
    assert sums[:, 2].tolist() == [1, 1000 * (60 - CUTS[2]), 0, 11, 0]
    assert ranks[1].table[:, Column.SKIPPED].tolist() == [1, 1, 0, 1, 0]
    # Weight and bias of a layer that moves at all are counted, on both ranks; what is no number anywhere is not.
    assert [rank.steps.tolist() for rank in ranks] == [[*[taken + 1] * 5, taken, taken + 1]] * 2
    before = holder(part, 1)
    for i in (2, 5):
        assert torch.equal(ranks[1].params[i], before.params[i])


@EACH
def test_found_inf_leaves_everything_and_adds_up_to_nothing(kind):
    opt = make(kind, torch.float32)
    part = part_of(opt, gradients_of(torch.float32))
    before = holder(part)
    whole, ranks, sums = take(opt, part, Scaling(None, torch.ones(())))
    assert torch.equal(sums, torch.zeros(5, 4, dtype=torch.float64))
    compare(whole, ranks, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before.all(), whole.all(), strict=True))


@EACH
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", DEVICES)
def test_one_rank_in_two_parts_is_one_call_bit_for_bit(kind, dtype, device):
    opt, seen = make(kind, dtype, device), []
    for number in range(3):
        part = part_of(opt, gradients_of(dtype, 100.0 if number == 2 else 1.0, device))
        one, two = holder(part), holder(part)
        versions = [tensor._version for tensor in two.all()]
        compiled_step(opt.rule, as_part(part, one), Scaling())
        step = step_of_shards(opt.rule, as_part(part, two), Scaling())
        seen.append(next(step))
        with suppress(StopIteration):
            step.send(seen[-1])
        for a, b, version in zip(one.all(), two.all(), versions, strict=True):
            assert torch.equal(a, b)
            assert b._version == version + 2  # once for each part
        finish(opt, part, one)
    assert len(seen) == 3 and all(totals.dtype == torch.float64 for totals in seen)
    assert seen[0]._version == 2


def test_scratch_is_nothing_without_cuda():
    if extension.BUILD["cuda"]:
        assert extension.EXTENSION.scratch_size([0, 1, 10**5]) >= 6
    else:
        assert extension.EXTENSION.scratch_size([0, 1, 10**5]) == 0
