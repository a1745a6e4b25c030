"""Hessian-vector products as differences of gradients: (grad F(W + eps v) - grad F(W)) / eps, on the same batch.

One more evaluation of the loss instead of a second derivative. Everything that evaluation moves is put back: parameters
bit for bit, gradients, the running statistics of normalisation layers; and dropout draws the same masks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lwas_fast.errors import FailsAgainError
from lwas_fast.measure.buffers import buffers_kept
from lwas_fast.measure.probes import Probe, Products, ordered_with_median, passes, reach, shares
from lwas_fast.shards import local, local_like, mesh_of, reshard

# Length of the displacement relative to the layer's weights: about the root of the parameters' precision, which
# balances rounding (weights and gradients keep that many digits) against the third derivative.
_RELATIVE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}


_SPREAD = 16.0  # by how much of the median layer's displacement the shortest may shorten all


class Replay:
    """The state of the random generators that a program shares, to draw the same numbers again.

    These are torch's (CPU and the parameters' GPUs), numpy's and Python's own.
    """

    def __init__(self, params: Sequence[Tensor]):
        self._gpus = sorted({p.device.index for p in params if p.device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(i) for i in self._gpus]
        self._others = _others()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the generators start from the state recorded; after, they go on as if nothing had been drawn."""
        now = _others()
        with torch.random.fork_rng(devices=self._gpus):
            try:
                torch.set_rng_state(self._cpu)
                for i, state in zip(self._gpus, self._cuda, strict=True):
                    torch.cuda.set_rng_state(state, i)
                _set_others(self._others)
                yield
            finally:
                _set_others(now)


def _others() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state(legacy=False)


def _set_others(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])


def _copies(leaves: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Their gradients, in memory that the next evaluation does not write to; FSDP2 takes new memory for new ones."""
    there = {leaf: leaf.grad for leaf in leaves if leaf.grad is not None}
    return {leaf: grad.clone() if mesh_of(grad) is None else grad for leaf, grad in there.items()}


@contextmanager
def _gradients_kept(
    leaves: Sequence[Tensor], values: dict[Tensor, Tensor], start: dict[Tensor, Tensor]
) -> Iterator[None]:
    """Start from copies of these gradients inside, and put the present ones, with these values, back after."""
    kept = [(leaf, leaf.grad) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = start[leaf].clone() if leaf in start else None
    try:
        yield
    finally:
        for leaf, grad in kept:
            # Its memory may have been written to: gradients may be views of DDP's buckets, or of buffers of others.
            if grad is not None and values[leaf] is not grad and 0 not in grad.stride():
                grad.copy_(values[leaf])
            elif grad is not None:  # expanded: one number for many elements
                grad = values[leaf]
            leaf.grad = grad


@contextmanager
def _displaced(params: Sequence[Tensor], directions: Sequence[Tensor], eps: Sequence[Tensor]) -> Iterator[None]:
    """Move the parameters by eps times their directions inside, and put them back bit for bit after."""
    kept = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, direction, e in zip(params, directions, eps, strict=True):
                if p.dtype == direction.dtype:
                    p.addcmul_(direction, e)
                else:
                    p.copy_(torch.addcmul(p.to(direction.dtype), direction, e))
        torch.clear_autocast_cache()  # a context around all this keeps casted weights, of where they stood before
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(params, kept, strict=True):
                p.copy_(value)
        torch.clear_autocast_cache()


@contextmanager
def _gathered_anew(sharded: bool, model: nn.Module | None) -> Iterator[None]:
    """Have FSDP2 gather the weights that it finds inside, and others after."""
    if sharded:
        reshard(model)
    try:
        yield
    finally:
        if sharded:
            reshard(model)


def _displacements(probes: Sequence[Probe], estimator: str, computed_in: torch.dtype | None) -> list[Tensor]:
    """For each probe (S,), the eps that a layer's direction is multiplied by; 0 where there is no direction.

    Where layers share a product that is the same for all, as by automatic differentiation: what a layer finds of
    another's terms goes by the ratio of their displacements. But each is kept within what the weights' precision allows
    (six bits of it at least), and an absurd layer, whose must be tiny, does not set those of the others.
    """
    longest, least = [], []
    of_each = [{p.dtype for p in probe.selection.params} | {computed_in or torch.float64} for probe in probes]
    together = set().union(*of_each)  # whose coarsest has them all displaced by as much
    for reaches, own in zip(reach(probes), of_each, strict=True):
        dtypes = together if estimator == "signs" else own
        there = torch.where(reaches.isfinite(), reaches, 0.0)
        longest.append(there * max(_RELATIVE.get(dtype, 1e-3) for dtype in dtypes))
        least.append(torch.minimum(there * max(64 * torch.finfo(dtype).eps for dtype in own), longest[-1]))
    along = longest
    if estimator == "signs" and probes:
        ordered, median = ordered_with_median([torch.where(e > 0, e, torch.nan) for e in longest])
        common = torch.maximum(ordered[0], median / _SPREAD)
        along = [
            torch.where(e > 0, torch.maximum(common.to(e), low).minimum(e), e)
            for e, low in zip(longest, least, strict=True)
        ]
    parts = shares(probes, estimator, along)
    return [torch.maximum(e * share, low) for e, share, low in zip(along, parts, least, strict=True)]


def by_differences(
    probes: Sequence[Probe],
    evaluate: Callable[[], object],
    replay: Replay,
    leaves: Sequence[Tensor],
    estimator: str,
    start: dict[Tensor, Tensor],
    model: nn.Module | None,
    own: dict[Tensor, Tensor] | None = None,
    computed_in: torch.dtype | None = None,
) -> list[Products]:
    """Take the products of each probe as differences of gradients; "blocks" evaluates once for each layer.

    Whatever `evaluate` raises passes, after everything has been put back.

    Args:
        probes: What to measure along; their gradients were taken at the present parameters.
        evaluate: Runs the loss of the same batch and its backward, leaving raw gradients in ``.grad``.
        replay: The random state that the first evaluation started from.
        leaves: Every tensor whose ``.grad`` the evaluation may touch.
        estimator: See `probes`.
        start: The gradients that the first evaluation found in ``.grad``.
        model: See `buffers_kept`.
        own: The gradients of that evaluation alone, if ``.grad`` holds others (see `gradients_alone`).
        computed_in: The dtype that weights are cast to, if that is known: mixed precision rounds displacements away.
    """
    eps = _displacements(probes, estimator, computed_in)
    of_tensor = [probe.selection.per_tensor(e) for probe, e in zip(probes, eps, strict=True)]
    found: list[list[Tensor | None]] = [[None] * len(probe.selection.params) for probe in probes]
    before = _copies(leaves)
    sharded = any(probe.bucket.mesh is not None for probe in probes)
    for members in passes(probes, estimator):
        moved = [local(probes[p].selection.params[i]) for p, i in members]
        along = [probes[p].vectors.directions[i] for p, i in members]
        eps_of = [of_tensor[p][i] for p, i in members]
        with (
            _gradients_kept(leaves, before, start),
            _displaced(moved, along, eps_of),
            _gathered_anew(sharded, model),
            buffers_kept(leaves, model),
            replay.again(),
        ):
            with torch.enable_grad():
                evaluate()
            for p, i in members:
                found[p][i] = _difference(probes[p], i, before if own is None else own)
    return [
        Products(tensors, torch.where(e > 0, probe.scale / e, 0.0))
        for probe, tensors, e in zip(probes, found, eps, strict=True)
    ]


def gradients_alone(
    evaluate: Callable[[], object], replay: Replay, leaves: Sequence[Tensor], model: nn.Module | None
) -> dict[Tensor, Tensor]:
    """What one more evaluation, where the parameters stand, gives leaves for gradients; all is put back.

    In a distributed run micro-batches may be averaged over processes with a window's last one only, all at once.
    """
    before = _copies(leaves)
    with _gradients_kept(leaves, before, {}), buffers_kept(leaves, model), replay.again():
        with torch.enable_grad():
            evaluate()
        return _copies(leaves)  # DDP's may be views of buckets, which are written to again


# Of their norm, by which gradients of one loss may differ: kernels may add up in another order, in half precision.
_NOISE = 0.01


def check_repeats(
    gradients: dict[Tensor, Tensor],
    evaluate: Callable[[], object],
    replay: Replay,
    leaves: Sequence[Tensor],
    model: nn.Module | None,
) -> bool:
    """Check that one more evaluation, where the parameters stand, gives the gradients that the first one gave.

    It reads numbers from the device, so it is for the first measurement alone. False where they are not finite.

    Raises:
        FailsAgainError: It gives others.
    """
    once_more = gradients_alone(evaluate, replay, leaves, model)
    both = [leaf for leaf in gradients if leaf in once_more]
    apart = sum(float((gradients[leaf] - once_more[leaf]).float().square().sum()) for leaf in both) ** 0.5
    whole = sum(float(grad.float().square().sum()) for grad in gradients.values()) ** 0.5
    if len(both) < len(gradients) or apart > _NOISE * whole:
        raise FailsAgainError(
            "evaluated again, the loss has other gradients. Finite differences need the same batch, augmentation "
            "and masks each time: draw from torch's, numpy's or Python's shared random numbers, or before opt.step()"
        )
    return math.isfinite(apart)


@torch.no_grad()
def _difference(probe: Probe, i: int, before: dict[Tensor, Tensor]) -> Tensor:
    param, direction = probe.selection.params[i], probe.vectors.directions[i]
    if param.grad is None or param not in before:  # the evaluations differ in more than the weights: no number
        return torch.full_like(direction, torch.nan)
    after, base = local_like(param, param.grad), local_like(param, before[param])
    return after.to(direction.dtype) - base.to(direction.dtype)
