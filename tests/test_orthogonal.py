"""Muon's direction: the nearest orthogonal matrix, by products.

Catches: a tensor of some shape, layout or size that breaks it or changes its direction; squares that over- or
underflow; a result that depends on what else is in the list; inputs that are written to.
"""

from __future__ import annotations

import math

import pytest
import torch
from reference import orthogonal

from lwas_fast import orthogonal as package


def orthogonalized(tensors):
    return package.orthogonalized(tensors)[0]


SHAPES = [
    (),
    (1,),
    (7,),
    (1, 5),
    (5, 1),
    (3, 4),
    (3, 8),
    (8, 3),
    (4, 4),
    (6, 3, 2, 2),
    (2, 3, 4),
    (1, 3, 2, 2),
    (5, 1, 1, 1),
]
EMPTY = [(0,), (0, 3), (3, 0), (2, 0, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def drawn(shape, dtype=torch.float64, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made, dtype=torch.float64).to(dtype)


def orth(tensor):
    (found,) = orthogonalized([tensor])
    return found


def moderate(rows, columns, dtype=torch.float64):
    """A matrix whose singular values lie between 0.1 and 1."""
    U, _, V = torch.linalg.svd(drawn((rows, columns)), full_matrices=False)
    return ((U * torch.linspace(1, 0.1, min(rows, columns), dtype=torch.float64)) @ V).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape):
    tensor = drawn(shape)
    torch.testing.assert_close(orth(tensor), orthogonal(tensor), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY], ids=str)
def test_shape_and_dtype_stay_and_inputs_too(shape, dtype):
    tensor = drawn(shape, dtype)
    before = tensor.clone()
    found = orth(tensor)
    assert (found.shape, found.dtype, found.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert found.isfinite().all()
    assert torch.equal(tensor, before) and (found.numel() == 0 or found.data_ptr() != tensor.data_ptr())
    if tensor.numel():  # its root mean square is about 1, but for a narrow matrix, where fewer directions make it up
        rank = min(len(tensor), tensor.numel() // len(tensor)) if tensor.ndim > 1 else 1
        assert 0.6 < found.double().norm() / math.sqrt(rank * max(tensor.numel() // rank, rank)) < 1.3


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (4, 9), (9, 4), (30, 40), (20, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_become_alike_and_vectors_stay(rows, columns, dtype):
    matrix = moderate(rows, columns, dtype)
    found = orth(matrix)
    values = torch.linalg.svdvals(found) / math.sqrt(max(rows, columns))
    assert 0.6 < values.min() and values.max() < 1.3, values
    assert (matrix * found).sum() > 0.5 * torch.linalg.svdvals(matrix).sum() * math.sqrt(max(rows, columns))
    # U p(S) V: with the matrix's own it is symmetric, on either side.
    for product in (matrix @ found.T, matrix.T @ found):
        torch.testing.assert_close(product, product.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(40, 50), (40, 200), (200, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_of_low_rank_is_not_filled_with_rounding(rows, columns, dtype):
    """Rounding is a 1e-7th, and the rounds lengthen what is short 500 times at most."""
    matrix = drawn((rows, 2)) @ drawn((2, columns), seed=1)
    values = torch.linalg.svdvals(orth(matrix.to(dtype)).double()) / math.sqrt(max(rows, columns))
    assert 0.6 < values[1] and values[0] < 1.3 and values[2] < 500 * torch.finfo(dtype).eps, values[:4]


def test_a_vector_has_its_direction_and_the_length_of_ones():
    for shape in ((9,), (1, 9), (9, 1), (1, 3, 3)):
        vector = drawn(shape)
        torch.testing.assert_close(orth(vector), 3 * vector / vector.norm())
    assert orth(torch.tensor(-0.25)).item() == -1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_zero_stays_so(shape, dtype):
    assert not orth(torch.zeros(shape, dtype=dtype)).any()


@pytest.mark.parametrize("shape", [(7,), (3, 8), (8, 3), (4, 3, 2, 2)], ids=str)
def test_size_does_not_matter(shape):
    """Not that of squares which float32 does not hold; and of powers of two not a bit."""
    tensor = drawn(shape, torch.float32)
    found = orth(tensor)
    for power in (-120, -60, -1, 1, 60, 120):
        assert torch.equal(orth(tensor * 2.0**power), found), power
    for size in (1e-30, 1e30):
        torch.testing.assert_close(orth(tensor * size), found, rtol=1e-3, atol=1e-4)
    mixed = tensor.clone()
    mixed.view(-1)[0] = 1e30
    assert orth(mixed).isfinite().all() and orth(mixed).flatten()[0] > 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_not_finite_spoils_its_own_tensor_alone(shape, value):
    tensor, other = drawn(shape), drawn(shape, seed=1)
    tensor.view(-1)[-1] = value
    found, beside = orthogonalized([tensor, other])
    assert found.isnan().all()
    torch.testing.assert_close(beside, orth(other))


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (5, 5)], ids=str)
def test_rows_columns_and_sides_may_be_exchanged(shape):
    matrix = drawn(shape)
    found = orth(matrix)
    rows, columns = torch.randperm(shape[0]), torch.randperm(shape[1])
    torch.testing.assert_close(orth(matrix[rows][:, columns]), found[rows][:, columns], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(orth(matrix.T), found.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(orth(-matrix), -found, rtol=0, atol=0)


def test_of_a_kernel_the_first_dimension_makes_the_rows():
    kernel = drawn((4, 3, 2, 5))
    torch.testing.assert_close(orth(kernel), orth(kernel.reshape(4, 30)).view_as(kernel), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_together_or_one_at_a_time(dtype):
    """Those of one size go together, also where one is the other's transposed."""
    shapes = [*SHAPES, (3, 8), (12, 6), *EMPTY, (8, 3), (7,), (6, 12)]
    tensors = [drawn(shape, dtype, seed=i) for i, shape in enumerate(shapes)]
    tensors.append(drawn((3, 8), torch.float64, seed=99))  # another dtype than its like
    together = orthogonalized(tensors)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    for tensor, found in zip(tensors, together, strict=True):
        torch.testing.assert_close(found, orth(tensor), rtol=tolerance, atol=tolerance)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every other": lambda t: torch.stack([t, torch.full_like(t, 9.0)], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_layout_changes_nothing(name):
    tensor = LAYOUTS[name](drawn((4, 3, 2, 2)))
    assert not tensor.is_contiguous()
    torch.testing.assert_close(orth(tensor), orth(tensor.contiguous()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_root_mean_squares_come_with_it(shape):
    made = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=made)
    (large, small, zero), (a, b, c) = package.orthogonalized([tensor * 1e30, tensor * 1e-30, tensor * 0])
    assert a.shape == b.shape == c.shape == () and c == 0 and not zero.any()
    expected = tensor.double().square().mean().sqrt() if tensor.numel() else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(torch.stack([a * 1e-30, b * 1e30]).double(), expected.expand(2), rtol=1e-5, atol=0)
    assert large.isfinite().all() and small.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 512), (512, 3), (32, 40)], ids=str)
def test_autocast_does_not_matter(shape):
    made = torch.Generator().manual_seed(0)
    low = torch.randn(shape[0], 2, generator=made) @ torch.randn(2, shape[1], generator=made)
    expected = orthogonalized([low])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonalized([low])[0], expected)
