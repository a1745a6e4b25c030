"""The tensors that take part in one pass, and their numbers: from each tensor's to its layer's and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwas_fast.shards import Shards, local

# A layer's weights may start at zero (biases, the last layer of a residual branch): relative to its own norm it
# could never move. Its root mean square counts as this much at least (in the manner of Adafactor's epsilon_2).
RMS_FLOOR = 1e-2

# A norm takes torch over a microsecond, however short the tensor. Up to FEW elements each on average it is cheaper to
# string tensors together, so many that they stay in the cache; below 2**15, from which on torch wakes other threads.
FEW, BLOCK = 2**12, 3 * 2**13

HALF = (torch.bfloat16, torch.float16)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's state and arithmetic: float32 for half precision, else its own."""
    return torch.float32 if param.dtype in HALF else param.dtype


def squared_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The squared Euclidean norms (N,) of some tensors, on a CPU the same bits for any number of threads."""
    if tensors and tensors[0].is_cpu:  # norms of tensors with gaps, or expanded ones, are summed up by all threads
        tensors = [t if t.is_contiguous() or _is_dense(t) else t.contiguous() for t in tensors]
    return torch.stack(torch._foreach_norm(list(tensors))).to(dtype).square()


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill a block of memory, in whichever order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


@dataclass(frozen=True, eq=False)
class Selection:
    """The tensors of a bucket that take part in one pass, and how their numbers add up to layers.

    Attributes:
        indices: Positions in the bucket, in order.
        params: The tensors.
        rows: Which rows of the bucket's table the S layers are: a slice or a LongTensor.
        layer: For each tensor, its layer's position among the S; does not decrease.
        index: LongTensor (S, most tensors a layer has), padded with len(params).
        owner: LongTensor (N,), `layer` on the device.
        places: Which of the bucket's `steps` are the tensors': a slice or a LongTensor.
        elements: (S,) int64, elements of each layer.
        where: LongTensor (N, 4) on the CPU: each tensor's row in the bucket's table, its position in the bucket,
            whether weight decay acts on it (0 or 1), and the elements of its layer.
        decays: Positions in `params` of those that it acts on.
        dtype: The table's.
        shards: Where other processes hold parts of these tensors; None where they do not.
    """

    indices: tuple[int, ...]
    params: list[Tensor]
    rows: Any
    layer: list[int]
    index: Tensor
    owner: Tensor
    places: Any
    elements: Tensor
    where: Tensor
    decays: list[int]
    dtype: torch.dtype
    shards: Shards | None = None

    @property
    def here(self) -> list[Tensor]:
        """What this process holds of each tensor: the tensor itself, or its shard."""
        return self.params if self.shards is None else [local(param) for param in self.params]

    @cached_property
    def counts(self) -> Tensor:
        """(S,) `elements` in the table's dtype."""
        return self.elements.to(self.dtype)

    @cached_property
    def sizes(self) -> Tensor:
        """(N,) int64, elements of each tensor, of what is `here`."""
        return torch.tensor([param.numel() for param in self.here], device="cpu").to(self.elements.device)

    @cached_property
    def floor(self) -> Tensor:
        """(S,), the least norm a layer's weights count with (see RMS_FLOOR)."""
        return RMS_FLOOR * self.counts.sqrt()

    @cached_property
    def blocks(self) -> list[slice]:
        """The tensors in parts of about `BLOCK` elements, which stay in a CPU's cache; elsewhere one part."""
        ends = np.cumsum([param.numel() for param in self.here])
        cuts = (np.flatnonzero(np.diff(ends // BLOCK)) + 1).tolist() if self.params[0].is_cpu else []
        return [slice(i, j) for i, j in pairwise([0, *cuts, len(ends)])]

    @cached_property
    def _starts(self) -> list[tuple[Any, Any]]:
        """Of each block, which tensors are not empty, and where these start; none if long or not on a CPU."""
        sizes = np.array([param.numel() for param in self.here])
        if not self.params[0].is_cpu or not 0 < sizes.sum() <= FEW * (sizes > 0).sum():
            return []
        full = [at.start + np.flatnonzero(sizes[at]) for at in self.blocks]
        starts = sizes.cumsum() - sizes
        return [(which, starts[which] - starts[at.start]) for at, which in zip(self.blocks, full, strict=True)]

    def squared_norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """The squared norms (N,) of tensors shaped like those `here`, in the table's dtype."""
        if not self._starts:
            return squared_norms(tensors, self.dtype)
        found = np.zeros(len(tensors))
        for at, (full, starts) in zip(self.blocks, self._starts, strict=True):
            flat: Tensor = torch._utils._flatten_dense_tensors(tensors[at])  # type: ignore[no-untyped-call]
            with np.errstate(over="ignore"):  # as in torch, an infinite norm is no cause to warn
                found[full] = np.add.reduceat(flat.square().numpy(), starts)
        return torch.from_numpy(found).to(self.dtype)

    def per_layer(self, values: Tensor) -> Tensor:
        """Sum numbers of tensors (N, ...) to numbers of layers (S, ...), always in the same order."""
        if len(self.index) == len(self.params):  # each is a layer
            return values
        return torch.cat([values, torch.zeros_like(values[:1])])[self.index].sum(1)

    def share(self, values: Tensor) -> Tensor:
        """Sum numbers of tensors (N, ...), of what is `here`, to this process's share in numbers of layers (S, ...)."""
        return self.per_layer(values if self.shards is None else self.shards.share(values))

    def of_tensors(self, values: Tensor) -> Tensor:
        """The numbers (N,) of the tensors' layers: (S,) -> (N,)."""
        return values if len(values) == len(self.params) else values[self.owner]

    def per_tensor(self, values: Tensor) -> list[Tensor]:
        """Hand each tensor its layer's number, in the dtype of its state: (S,) -> N tensors without dimension."""
        numbers = values.unbind()
        return [numbers[i].to(state_dtype(param)) for i, param in zip(self.layer, self.params, strict=True)]
