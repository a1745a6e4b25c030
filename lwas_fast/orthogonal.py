"""The nearest orthogonal matrix, by matrix products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

# Of Jordan et al. (Muon, 2024). Five rounds bring singular values from above 1e-3 of the norm to between 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
ROUNDS = 5


def orthogonalized(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    r"""Make all singular values of each tensor about equal, and its root mean square about 1.

    A tensor counts as a matrix, of its first dimension by all others, and becomes about
    :math:`\sqrt{n}\,(M M^\top)^{-1/2} M`, n being its longer side, in a few rounds of Newton and Schulz
    (:math:`M \leftarrow a M + (b M M^\top + c (M M^\top)^2) M`). A vector becomes :math:`\sqrt{n}\, v / \lVert v
    \rVert`. What is 0 stays so; scaling a tensor by a power of two changes no bit of its result.

    Args:
        tensors: Of floating-point dtype; they are not changed. On a GPU, products of float32 are taken in bfloat16, as
            ``torch.optim.Muon`` takes them everywhere.

    Returns:
        For each a new tensor of its shape, dtype and device, all NaN where an element is not finite; and for each its
        root mean square, of no dimension.
    """
    # First, or squares of small elements would be lost. Of a tensor without elements there is no such norm.
    sizes = [torch.zeros_like(t.sum()) if t.numel() == 0 else torch.linalg.vector_norm(t, math.inf) for t in tensors]
    torch._foreach_clamp_min_(sizes, [torch.finfo(size.dtype).tiny for size in sizes])
    scaled = torch._foreach_div(list(tensors), sizes)
    norms = torch._foreach_norm(list(scaled))
    roots = [math.sqrt(max(1, tensor.numel())) for tensor in tensors]
    means = torch._foreach_div(torch._foreach_mul(sizes, norms), roots)
    torch._foreach_clamp_min_(norms, 1.0)  # it is 1 at least, or all is 0
    found: dict[int, Tensor] = {}
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(scaled):
        rows = len(tensor) if tensor.ndim > 1 else 1
        columns = tensor.numel() // rows if rows else 0
        if min(rows, columns) < 2:
            found[i] = tensor * (roots[i] / norms[i])
        else:
            shape = torch.Size((min(rows, columns), max(rows, columns)))
            alike.setdefault((shape, tensor.dtype, tensor.device), []).append(i)
    for ((_, columns), dtype, device), members in alike.items():
        of_products = torch.bfloat16 if device.type == "cuda" and dtype == torch.float32 else dtype
        flat = [scaled[i].reshape(len(scaled[i]), -1) for i in members]
        matrices = torch.stack([m if m.shape[1] == columns else m.T for m in flat])
        matrices /= torch.stack([norms[i] for i in members]).view(-1, 1, 1)
        matrices = _rounds(matrices.to(of_products)).to(dtype) * math.sqrt(columns)
        for i, m, result in zip(members, flat, matrices, strict=True):
            found[i] = (result if m.shape[1] == columns else result.T).reshape(scaled[i].shape)
    return [found[i] for i in range(len(tensors))], list(means)


def _rounds(matrices: Tensor) -> Tensor:
    """Bring singular values of matrices (K, m, n), m <= n, in (0, 1], to about 1."""
    if matrices.dtype == torch.bfloat16 or matrices.shape[2] < 2 * matrices.shape[1]:
        for _ in range(ROUNDS):
            gram = matrices @ matrices.mT
            matrices = torch.baddbmm(matrices, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), matrices, beta=_A)
        return matrices
    # The same on the small side alone, of a wide one much less work: all factors are polynomials of the first product
    # and commute. In bfloat16 what rounding leaves of it below 0 would grow.
    gram = matrices @ matrices.mT
    factors: list[Tensor] = []
    for k in range(ROUNDS):
        gram = factors[-1] @ gram @ factors[-1] if k else gram
        factors.append(torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C))
        factors[-1].diagonal(dim1=1, dim2=2).add_(_A)
    return reduce(torch.matmul, (*factors, matrices))
