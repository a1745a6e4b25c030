"""The nearest orthogonal matrix, by matrix products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

# Of Jordan et al. (Muon, 2024). Five rounds bring singular values from 2e-3 of the norm to 1 to between 0.68 and 1.21;
# smaller ones grow up to 484 times.
_A, _B, _C = 3.4445, -4.7750, 2.0315
ROUNDS = 5


def orthogonalized(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    r"""Make all singular values of each tensor about equal.

    A tensor counts as a matrix, of its first dimension by all others, and becomes about
    :math:`\sqrt{n}\,(M M^\top)^{-1/2} M`, n being its longer side, in a few rounds of Newton and Schulz
    (:math:`M \leftarrow a M + (b M M^\top + c (M M^\top)^2) M`). So its root mean square is about 1 where its rank is
    full, and less elsewhere. A vector becomes :math:`\sqrt{n}\, v / \lVert v \rVert`. What is 0 stays so; scaling a
    tensor by a power of two changes no bit of its result.

    Args:
        tensors: Of float32 or float64; they are not changed.

    Returns:
        For each a new tensor of its shape, dtype and device, all NaN where an element is not finite; and for each the
        root mean square that it had, of no dimension.
    """
    # First, or squares of small elements would be lost. Of a tensor without elements there is no such norm.
    sizes = [torch.zeros_like(t.sum()) if t.numel() == 0 else torch.linalg.vector_norm(t, math.inf) for t in tensors]
    torch._foreach_clamp_min_(sizes, [torch.finfo(size.dtype).tiny for size in sizes])
    found: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}  # relative to the sizes: 1 at least, or all is 0
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        rows = len(tensor) if tensor.ndim > 1 else 1
        columns = tensor.numel() // rows if rows else 0
        if min(rows, columns) < 2:
            vector = tensor / sizes[i]
            norms[i] = torch.linalg.vector_norm(vector)
            found[i] = vector.mul_(math.sqrt(tensor.numel()) / norms[i].clamp(min=1))
        else:
            shape = torch.Size((min(rows, columns), max(rows, columns)))
            alike.setdefault((shape, tensor.dtype, tensor.device), []).append(i)
    for ((_, columns), _, device), members in alike.items():
        flat = [tensors[i].reshape(len(tensors[i]), -1) for i in members]
        matrices = torch.stack([m if m.shape[1] == columns else m.T for m in flat])
        matrices /= torch.stack([sizes[i] for i in members]).view(-1, 1, 1)
        of_each = torch.linalg.vector_norm(matrices, dim=(1, 2))
        norms.update(zip(members, of_each.unbind(), strict=True))
        matrices /= of_each.clamp(min=1).view(-1, 1, 1)
        with torch.autocast(device.type, enabled=False):  # a loss may be differentiated inside of one
            matrices = _rounds(matrices).mul_(math.sqrt(columns))
        for i, m, result in zip(members, flat, matrices, strict=True):
            found[i] = (result if m.shape[1] == columns else result.T).reshape(tensors[i].shape)
    means = [sizes[i] * norms[i] / math.sqrt(max(1, tensor.numel())) for i, tensor in enumerate(tensors)]
    return [found[i] for i in range(len(tensors))], means


def _rounds(matrices: Tensor) -> Tensor:
    """Bring singular values of matrices (K, m, n), m <= n, in (0, 1], to about 1."""
    if not matrices.is_cpu or matrices.shape[2] < 2 * matrices.shape[1]:
        for _ in range(ROUNDS):
            gram = matrices @ matrices.mT
            matrices = torch.baddbmm(matrices, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), matrices, beta=_A)
        return matrices
    # The same on the small side alone, of a wide one much less work: all factors are polynomials of the first product
    # and commute. Not on a GPU: in TF32 what rounding leaves of that product below 0 would grow.
    gram = matrices @ matrices.mT
    factors: list[Tensor] = []
    for k in range(ROUNDS):
        gram = factors[-1] @ gram @ factors[-1] if k else gram
        factors.append(torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C))
        factors[-1].diagonal(dim1=1, dim2=2).add_(_A)
    return reduce(torch.matmul, (*factors, matrices))
