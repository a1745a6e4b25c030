"""Rates of all layers in one launch: from the vectors of a measurement to each layer's refreshed statistics.

Every program sums up one chunk of one tensor. The last one of a layer to arrive, whichever that is, adds the layer's
chunks in a fixed order. The last of all finishes all layers side by side, for their steps depend on each other: closed
form, promises, guards, averages. So results are equal bit for bit from run to run, and nothing is left to launch.
`lwas_fast/rates/closed_form.py` is the same in plain torch, `lwas_fast/rates/launch.py` lays out what is handed over
here.

Sums are float32 within a chunk (a few additions in each lane, then a tree) and float64 across chunks.
"""

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl

from lwas_fast.options import MAX_GROWTH, MOST_PROMISED
from lwas_fast.table import Column, Sums

CHUNK = 16384  # elements that a program sums up; a multiple of BLOCK
BLOCK = 2048  # elements that it takes at a time
AT_ONCE = 256  # partial sums that a layer's last program takes at a time, and layers that the last of all does
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
    MAX_FALL = 5  # most that its rate may exceed a measured one, as a factor


def _names(*members: IntEnum) -> list[tl.constexpr]:
    """Numbers under names that a kernel can read: nothing but constexpr, whose value is part of its cache key."""
    return [tl.constexpr(int(member)) for member in members]


_AVERAGE, _WEIGHT, _DESCENT, _CURVATURE = _names(Column.AVERAGE, Column.WEIGHT, Column.DESCENT, Column.CURVATURE)
_REFRESHES, _NEGATIVE, _NONFINITE = _names(Column.REFRESHES, Column.NEGATIVE, Column.NONFINITE)
_NO_DESCENT, _GREW, _LOSS = _names(Column.NO_DESCENT, Column.GROWTH, Column.LOSS)
_SIGN, _SCALE, _DECAY, _BETA, _UNMEASURED, _MAX_FALL = _names(*Numbers)
_GRADIENT_AT, _DIRECTION_AT, _PRODUCT_AT, _KIND_AT = _names(*Tensors)
_TENSOR_AT, _NUMBER_AT, _COUNT_AT, _LAYER_AT = _names(*Chunks)
_FIRST_AT, _CHUNKS_AT, _ROW_AT, _FACTOR_AT, _LOSS_AT = _names(*Layers)
_DESCENT_SUM, _CURVATURE_SUM, _SQUARE_SUM = _names(*Sums)
_COLUMNS, _SUMS, _NUMBERS = tl.constexpr(len(Column)), tl.constexpr(len(Sums)), tl.constexpr(len(Numbers))
_TENSORS, _CHUNKS, _LAYERS = tl.constexpr(len(Tensors)), tl.constexpr(len(Chunks)), tl.constexpr(len(Layers))
_MAX_GROWTH, _MOST_PROMISED = tl.constexpr(MAX_GROWTH), tl.constexpr(MOST_PROMISED)


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
def _row_of(layers, at, mask):
    return tl.load(layers + at * _LAYERS + _ROW_AT, mask=mask, other=0).to(tl.pointer_type(tl.float32))


@triton.jit
def _closed_form(sums, layers, numbers, at, mask):
    """What the sums of some layers say: `closed_form.closed_form`, for a block of layers."""
    sums += at * _SUMS  # not from the first-level cache, see `_total`
    descent = tl.load(sums + _DESCENT_SUM, mask=mask, other=0.0, cache_modifier=".cg")
    sampled = tl.load(sums + _CURVATURE_SUM, mask=mask, other=0.0, cache_modifier=".cg")
    square = tl.load(sums + _SQUARE_SUM, mask=mask, other=0.0, cache_modifier=".cg")
    row = _row_of(layers, at, mask)
    loss_at = tl.load(layers + at * _LAYERS + _LOSS_AT, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    numbers += at * _NUMBERS
    beta = tl.load(numbers + _BETA, mask=mask, other=0.0)
    weight = beta * tl.load(row + _WEIGHT, mask=mask, other=0.0) + (1 - beta)
    loss_now = tl.load(loss_at, mask=mask, other=0.0)
    loss = beta * tl.load(row + _LOSS, mask=mask, other=0.0) + (1 - beta) * loss_now

    curvature = tl.abs(sampled) + tl.load(numbers + _DECAY, mask=mask, other=0.0) * square
    newton = tl.div_rn(descent, curvature)
    promise = tl.div_rn(descent * newton, tl.div_rn(loss, weight))
    promise = tl.where(promise > _MOST_PROMISED, _MOST_PROMISED, promise)
    rate = tl.div_rn(newton, 1.0 + 0.5 * promise)
    finite = _finite(descent) & _finite(curvature) & _finite(loss)
    # Without curvature the closed form has no answer; without descent it has a meaningless one.
    usable = finite & (descent > 0) & _finite(rate)
    promised = tl.where(usable & mask, tl.div_rn(promise, 1.0 + 0.5 * promise), 0.0)
    return descent, sampled, weight, loss, rate, promised, usable, finite & (descent <= 0)


@triton.jit
def _finish(sums, layers, numbers, out, count, at_once: tl.constexpr):
    """Take the sums of all layers into their statistics: `closed_form.refresh`."""
    lanes = tl.arange(0, at_once).to(tl.int64)
    promised = tl.zeros([at_once], tl.float32)
    i = 0
    while i < count:
        at = i + lanes
        _, _, _, _, _, more, _, _ = _closed_form(sums, layers, numbers, at, at < count)
        promised += more
        i += at_once
    excess = tl.maximum(tl.sum(promised, 0), 1.0)
    i = 0
    while i < count:
        at = i + lanes
        _enter(sums, layers, numbers, out, at, at < count, excess)
        i += at_once


@triton.jit
def _enter(sums, layers, numbers, out, at, mask, excess):
    """The new statistics of some layers; `excess` is what all steps are divided by."""
    descent, sampled, weight_now, loss, rate, _, usable, no_descent = _closed_form(sums, layers, numbers, at, mask)
    row = _row_of(layers, at, mask)
    numbers += at * _NUMBERS
    beta = tl.load(numbers + _BETA, mask=mask, other=0.0)
    average = tl.load(row + _AVERAGE, mask=mask, other=0.0)
    weight = tl.load(row + _WEIGHT, mask=mask, other=0.0)
    known = weight > 0
    unmeasured = tl.load(numbers + _UNMEASURED, mask=mask, other=0.0)
    present = tl.where(known, tl.div_rn(average, tl.where(known, weight, 1.0)), unmeasured)
    rate = tl.div_rn(rate, excess)
    limit = present * _MAX_GROWTH
    grew = usable & known & (rate > limit)
    rate = tl.where(grew, limit, rate)
    most = rate * weight * tl.load(numbers + _MAX_FALL, mask=mask, other=0.0)
    kept = tl.where(known, tl.minimum(average, most), 0.0)
    nonfinite = _not(usable | no_descent)
    for column in tl.static_range(_COLUMNS):
        new = tl.load(row + column, mask=mask, other=0.0)
        if column == _AVERAGE:
            new = tl.where(usable, beta * kept + (1 - beta) * rate, new)
        elif column == _WEIGHT:
            new = tl.where(usable, weight_now, new)
        elif column == _LOSS:
            new = tl.where(usable, loss, new)
        elif column == _DESCENT:
            new = tl.where(usable, descent, new)
        elif column == _CURVATURE:
            new = tl.where(usable, sampled, new)
        elif column == _REFRESHES:
            new += tl.where(usable, 1.0, 0.0)
        elif column == _NEGATIVE:
            new += tl.where(sampled < 0, 1.0, 0.0)
        elif column == _NONFINITE:
            new += tl.where(nonfinite, 1.0, 0.0)
        elif column == _NO_DESCENT:
            new += tl.where(no_descent, 1.0, 0.0)
        elif column == _GREW:
            new += tl.where(grew, 1.0, 0.0)
        tl.store(out + at * _COLUMNS + column, new, mask=mask)


@triton.jit(do_not_specialize=["count_of_layers"])
def layer_rates(
    tensors,
    chunks,
    layers,
    numbers,
    partials,
    arrivals,
    sums,
    out,
    count_of_layers,
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
        arrivals: (S + 1,) int32, zeros before and after.
        sums: (S, len(Sums)) float32, each layer's sums.
        out: (S, len(Column)) float32, the new rows; unless `finish` not written.
        count_of_layers: S.
        with_gradient: Whether gradients are read; where not, a gradient is minus the direction without its sign.
        finish: Whether to go on from sums to rows.
        chunk: Elements of a full chunk.
        block: Elements taken at a time; divides `chunk`.
        at_once: Partial sums, and layers, taken at a time.
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

    mine = partials + here * _SUMS
    tl.store(mine + _DESCENT_SUM, a)
    tl.store(mine + _CURVATURE_SUM, b)
    tl.store(mine + _SQUARE_SUM, c)
    tl.debug_barrier()  # all of the program's stores before the arrival that publishes them
    this = layers + layer * _LAYERS
    expected = tl.load(this + _CHUNKS_AT)
    if tl.atomic_add(arrivals + layer, 1, sem="acq_rel") == expected - 1:
        tl.store(arrivals + layer, 0)  # for the next launch
        first = tl.load(this + _FIRST_AT)
        factor = tl.load(tl.load(this + _FACTOR_AT).to(tl.pointer_type(tl.float32)))
        square = _total(partials + _SQUARE_SUM, first, expected, at_once)
        factor *= tl.load(numbers + layer * _NUMBERS + _SCALE)
        curvature = _total(partials + _CURVATURE_SUM, first, expected, at_once) * factor
        descent = square
        if with_gradient:
            sign = tl.load(numbers + layer * _NUMBERS + _SIGN)
            descent = _total(partials + _DESCENT_SUM, first, expected, at_once) * -sign
        mine = sums + layer * _SUMS
        tl.store(mine + _DESCENT_SUM, descent.to(tl.float32))
        tl.store(mine + _CURVATURE_SUM, curvature.to(tl.float32))
        tl.store(mine + _SQUARE_SUM, square.to(tl.float32))
        if finish:
            tl.debug_barrier()  # as above
            if tl.atomic_add(arrivals + count_of_layers, 1, sem="acq_rel") == count_of_layers - 1:
                tl.store(arrivals + count_of_layers, 0)
                _finish(sums, layers, numbers, out, count_of_layers, at_once)
