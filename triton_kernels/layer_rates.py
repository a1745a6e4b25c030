"""Rates of all layers in one launch: from the vectors of a measurement to each layer's refreshed statistics.

Every program sums up one chunk of one tensor. The last one of a layer to arrive, whichever that is, adds the layer's
chunks in a fixed order and finishes it: closed form, guards, averages. So results are equal bit for bit from run to
run, layers finish beside each other, and nothing is left to launch. `lwas_fast/rates/closed_form.py` is the same in
plain torch, `lwas_fast/rates/launch.py` lays out what is handed over here.

Sums are float32 within a chunk (a few additions in each lane, then a tree) and float64 across chunks.
"""

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl

from lwas_fast.options import MOST_DAMPING, SELF_CONCORDANCE
from lwas_fast.table import Column, Sums

CHUNK = 16384  # elements that a program sums up; a multiple of BLOCK
BLOCK = 2048  # elements that it takes at a time
AT_ONCE = 256  # partial sums that a layer's last program takes at a time
WARPS = 8


class Tensors(IntEnum):
    """What is handed over of each tensor, as int64: addresses, float32 where not said otherwise."""

    GRADIENT = 0  # of the dtype that KIND says
    DIRECTION = 1  # times the layer's sign
    PRODUCT = 2  # of the dtype that KIND says
    KIND = 3  # 0 float32, 1 bfloat16, 2 float16; and 4 more where not all addresses are multiples of 16


class Chunks(IntEnum):
    """What is handed over of each chunk, as int64."""

    TENSOR = 0
    NUMBER = 1  # in its tensor
    COUNT = 2
    LAYER = 3


class Layers(IntEnum):
    """What is handed over of each layer, as int64."""

    FIRST = 0  # its first chunk
    COUNT = 1  # its chunks
    ROW = 2  # address of its statistics
    FACTOR = 3  # address of a factor of the product
    LOSS = 4  # address of the loss's size


class Numbers(IntEnum):
    """What is handed over of each layer, as float32."""

    SIGN = 0  # of its direction
    SCALE = 1  # of the product, besides the factor
    DECAY = 2  # what L2 adds to the curvature
    BETA = 3  # of the averages over measurements
    UNMEASURED = 4  # rate of a layer never measured
    MAX_GROWTH = 5  # most that a measured rate may exceed the layer's, as a factor
    MAX_FALL = 6  # most that its rate may exceed a measured one


def _names(*members: IntEnum) -> list[tl.constexpr]:
    """Numbers under names that a kernel can read: nothing but constexpr, whose value is part of its cache key."""
    return [tl.constexpr(int(member)) for member in members]


_AVERAGE, _WEIGHT, _DESCENT, _CURVATURE = _names(Column.AVERAGE, Column.WEIGHT, Column.DESCENT, Column.CURVATURE)
_REFRESHES, _NEGATIVE, _NONFINITE = _names(Column.REFRESHES, Column.NEGATIVE, Column.NONFINITE)
_NO_DESCENT, _GREW, _LOSS = _names(Column.NO_DESCENT, Column.GROWTH, Column.LOSS)
_SIGN, _SCALE, _DECAY, _BETA, _UNMEASURED, _MAX_GROWTH, _MAX_FALL = _names(*Numbers)
_GRADIENT_AT, _DIRECTION_AT, _PRODUCT_AT, _KIND_AT = _names(*Tensors)
_TENSOR_AT, _NUMBER_AT, _COUNT_AT, _LAYER_AT = _names(*Chunks)
_FIRST_AT, _CHUNKS_AT, _ROW_AT, _FACTOR_AT, _LOSS_AT = _names(*Layers)
_DESCENT_SUM, _CURVATURE_SUM, _SQUARE_SUM = _names(*Sums)
_COLUMNS, _SUMS, _NUMBERS = tl.constexpr(len(Column)), tl.constexpr(len(Sums)), tl.constexpr(len(Numbers))
_TENSORS, _CHUNKS, _LAYERS = tl.constexpr(len(Tensors)), tl.constexpr(len(Chunks)), tl.constexpr(len(Layers))
_LANES = tl.constexpr(1 << (len(Column) - 1).bit_length())  # of a row: a power of two
_HALF_M, _MOST_DAMPING = tl.constexpr(0.5 * SELF_CONCORDANCE), tl.constexpr(MOST_DAMPING)


@triton.jit
def _take(address, dtype: tl.constexpr, offsets, mask, masked: tl.constexpr):
    """Load from an address as float32; zeros where masked out. Without a mask the address is a multiple of 16."""
    if masked:
        return tl.load(address.to(tl.pointer_type(dtype)) + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.load(tl.multiple_of(address.to(tl.pointer_type(dtype)), 16) + offsets).to(tl.float32)


@triton.jit
def _add(sums, addresses, offsets, mask, dtype: tl.constexpr, masked: tl.constexpr, with_gradient: tl.constexpr):
    """Add some elements' products to the lanes of <g, d>, <d, u> and <d, d>; nothing for what is not read."""
    descent, curvature, square = sums
    gradient, direction, product = addresses
    d = _take(direction, tl.float32, offsets, mask, masked)
    curvature += d * _take(product, dtype, offsets, mask, masked)
    square += d * d
    if with_gradient:
        descent += d * _take(gradient, dtype, offsets, mask, masked)
    return descent, curvature, square


@triton.jit
def _sum_chunk(
    tensor, start, count, dtype: tl.constexpr, with_gradient: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr
):
    """Sum up a chunk of a tensor whose gradient and product are of a dtype."""
    lanes = tl.arange(0, block)
    zeros = tl.zeros([block], tl.float32)
    sums = (zeros, zeros, zeros)
    addresses = (tl.load(tensor + _GRADIENT_AT), tl.load(tensor + _DIRECTION_AT), tl.load(tensor + _PRODUCT_AT))
    if (count == chunk) & (tl.load(tensor + _KIND_AT) < 4):
        # With a mask, even one that is always true, loads would be of 4 bytes, not of 16.
        for i in range(0, chunk, block):
            sums = _add(sums, addresses, start + (i + lanes), True, dtype, False, with_gradient)
    else:
        i = 0
        while i < count:  # not range: the interpreter of Triton 3.6 takes no bounds that were loaded
            sums = _add(sums, addresses, start + (i + lanes), i + lanes < count, dtype, True, with_gradient)
            i += block
    return tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0)


@triton.jit
def _total(partials, first, count, at_once: tl.constexpr):
    """Add a column of a layer's partial sums in float64, in an order that depends on their number alone."""
    lanes = tl.arange(0, at_once)
    total = tl.zeros([at_once], tl.float64)
    i = 0
    while i < count:
        # Not from the first-level cache, which other programs' stores do not reach.
        pointers = partials + (first + i + lanes) * _SUMS
        total += tl.load(pointers, mask=i + lanes < count, other=0.0, cache_modifier=".cg").to(tl.float64)
        i += at_once
    return tl.sum(total, 0)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _not(x):
    return x == 0  # in the interpreter ~ makes a number of a truth value


@triton.jit
def _finish(descent, sampled, square, loss_now, row, numbers, new):
    """Take a layer's sums into its statistics: `closed_form.refresh`, for one layer."""
    average, weight = tl.load(row + _AVERAGE), tl.load(row + _WEIGHT)
    beta = tl.load(numbers + _BETA)

    curvature = tl.abs(sampled) + tl.load(numbers + _DECAY) * square
    newton = tl.div_rn(descent, curvature)
    weight_now = beta * weight + (1 - beta)
    loss = beta * tl.load(row + _LOSS) + (1 - beta) * loss_now
    damping = tl.sqrt_rn(tl.div_rn(descent * newton, tl.div_rn(loss, weight_now))) * _HALF_M
    rate = tl.div_rn(newton, 1.0 + tl.where(damping > _MOST_DAMPING, _MOST_DAMPING, damping))
    finite = _finite(descent) & _finite(curvature) & _finite(loss)
    # Without curvature the closed form has no answer; without descent it has a meaningless one.
    nonfinite = _not(finite) | ((descent > 0) & _not(_finite(rate)))
    no_descent = _not(nonfinite) & (descent <= 0)
    usable = _not(nonfinite | no_descent)

    known = weight > 0
    present = tl.where(known, tl.div_rn(average, tl.where(known, weight, 1.0)), tl.load(numbers + _UNMEASURED))
    limit = present * tl.load(numbers + _MAX_GROWTH)
    grew = usable & known & (rate > limit)
    rate = tl.where(grew, limit, rate)

    lanes = tl.arange(0, _LANES)
    found = tl.load(row + lanes, mask=lanes < _COLUMNS, other=0.0)
    kept = tl.where(known, tl.minimum(average, rate * weight * tl.load(numbers + _MAX_FALL)), 0.0)
    found = tl.where((lanes == _AVERAGE) & usable, beta * kept + (1 - beta) * rate, found)
    found = tl.where((lanes == _WEIGHT) & usable, weight_now, found)
    found = tl.where((lanes == _LOSS) & usable, loss, found)
    found = tl.where(lanes == _DESCENT, tl.where(usable, descent, tl.load(row + _DESCENT)), found)
    found = tl.where(lanes == _CURVATURE, tl.where(usable, sampled, tl.load(row + _CURVATURE)), found)
    found += tl.where(lanes == _REFRESHES, tl.where(usable, 1.0, 0.0), 0.0)
    found += tl.where(lanes == _NEGATIVE, tl.where(sampled < 0, 1.0, 0.0), 0.0)
    found += tl.where(lanes == _NONFINITE, tl.where(nonfinite, 1.0, 0.0), 0.0)
    found += tl.where(lanes == _NO_DESCENT, tl.where(no_descent, 1.0, 0.0), 0.0)
    found += tl.where(lanes == _GREW, tl.where(grew, 1.0, 0.0), 0.0)
    tl.store(new + lanes, found, mask=lanes < _COLUMNS)


@triton.jit
def layer_rates(
    tensors,
    chunks,
    layers,
    numbers,
    partials,
    arrivals,
    out,
    with_gradient: tl.constexpr,
    finish: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    at_once: tl.constexpr,
):
    """Reduce all chunks of all tensors to their layers' sums, and those to new rows of statistics.

    Launch one program for each chunk.

    Args:
        tensors: (N, len(Tensors)) int64.
        chunks: (C, len(Chunks)) int64, those of a layer side by side.
        layers: (S, len(Layers)) int64.
        numbers: (S, len(Numbers)) float32.
        partials: (C, len(Sums)) float32, scratch.
        arrivals: (S,) int32, zeros before and after.
        out: (S, len(Column)) float32, the new rows; unless `finish`, (S, len(Sums)), the sums.
        with_gradient: Whether gradients are read; where not, a gradient is minus the direction without its sign.
        finish: Whether to go on from sums to rows.
        chunk: Elements of a full chunk.
        block: Elements taken at a time; divides `chunk`.
        at_once: Partial sums taken at a time.
    """
    here = tl.program_id(0).to(tl.int64)
    chunks += here * _CHUNKS
    tensor = tensors + tl.load(chunks + _TENSOR_AT) * _TENSORS
    start = tl.load(chunks + _NUMBER_AT) * chunk  # int64; a product, so that the compiler knows a divisor of it
    count = tl.load(chunks + _COUNT_AT)
    layer = tl.load(chunks + _LAYER_AT)
    kind = tl.load(tensor + _KIND_AT) % 4
    if kind == 0:
        a, b, c = _sum_chunk(tensor, start, count, tl.float32, with_gradient, chunk, block)
    elif kind == 1:
        a, b, c = _sum_chunk(tensor, start, count, tl.bfloat16, with_gradient, chunk, block)
    else:
        a, b, c = _sum_chunk(tensor, start, count, tl.float16, with_gradient, chunk, block)

    numbers += layer * _NUMBERS
    mine = partials + here * _SUMS
    tl.store(mine + _DESCENT_SUM, a)
    tl.store(mine + _CURVATURE_SUM, b)
    tl.store(mine + _SQUARE_SUM, c)
    tl.debug_barrier()  # all of the program's stores before the arrival that publishes them
    layers += layer * _LAYERS
    expected = tl.load(layers + _CHUNKS_AT)
    if tl.atomic_add(arrivals + layer, 1, sem="acq_rel") == expected - 1:
        tl.store(arrivals + layer, 0)  # for the next launch
        first = tl.load(layers + _FIRST_AT)
        row = tl.load(layers + _ROW_AT).to(tl.pointer_type(tl.float32))
        factor = tl.load(tl.load(layers + _FACTOR_AT).to(tl.pointer_type(tl.float32)))
        square = _total(partials + _SQUARE_SUM, first, expected, at_once)
        factor *= tl.load(numbers + _SCALE)
        curvature = _total(partials + _CURVATURE_SUM, first, expected, at_once) * factor
        descent = square
        if with_gradient:
            descent = _total(partials + _DESCENT_SUM, first, expected, at_once) * -tl.load(numbers + _SIGN)
        if finish:
            new = out + layer * _COLUMNS
            loss = tl.load(tl.load(layers + _LOSS_AT).to(tl.pointer_type(tl.float32)))
            _finish(descent.to(tl.float32), curvature.to(tl.float32), square.to(tl.float32), loss, row, numbers, new)
        else:
            out += layer * _SUMS
            tl.store(out + _DESCENT_SUM, descent.to(tl.float32))
            tl.store(out + _CURVATURE_SUM, curvature.to(tl.float32))
            tl.store(out + _SQUARE_SUM, square.to(tl.float32))
