"""The Triton kernel that multiplies by codebook weights in kernel order (`codebook_order.py`).

`out[M, N] = x[M, K] @ W[N, K]^T` for few tokens: each program has 16 vector rows, `16 length` rows, and a part of K,
and looks every vector up once per BM tokens. Place `t` of all vectors, `[16, columns]`, is an operand of a tensor core
as it is: `length` accumulators, one per place, and no value ever changes its thread; two columns side by side are one
`prmt`. The second indices are a product of their own, of the finer columns alone, into the same accumulators, so the
two values of a weight are added in float32 and never rounded. Scales come on at the end.

A vector is one load of 2 `width` bytes, at most 16, from a table in global memory that stays in the first-level cache:
weights are read past it (evict-first), the kernel takes no shared memory for itself, and programs that run together
share a codebook. A lookup is written in PTX, or the compiler would spread a vector's values over threads and carry them
back. What is larger than that cache, 128 to 256 KiB less other kernels' shares, is looked up in the second-level one.

The tensor core takes float16 only. A bfloat16 `x` is scaled by a power of two, per token and program, so that the
largest is between 2^14 and 2^15; that is exact for all that are not `2^29` times smaller.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005, SIM108
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.uniform import inverse, is_last, power, stored
from quant.kernels.warp import read_words

PAIRS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8))
"""How the compiler wants operands: two registers of a lane side by side before Triton 3.8 (`kWidth = 4` where they are
joined), one since. The other order is right too, but takes more instructions."""

STEP = tl.constexpr(8 if PAIRS else 4)
"""Columns of a lane in one product; see `PAIRS`."""


@triton.jit
def tile_words(start, BITS: tl.constexpr):
    """The BITS words uint32 `[16 rows, 4 lanes]` of the cells of a tile. `max_contiguous`: a thread is to read one word
    of a row, not two, since its rows are eight apart."""
    cell = tl.arange(0, 16)[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = ()
    for piece in tl.static_range(BITS // 4):
        at = start + piece * 256 + cell[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        four = tl.load(at, eviction_policy="evict_first").to(tl.uint32, bitcast=True)
        even, odd = tl.split(tl.reshape(four, (16, 4, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        words = words + (first, second, third, fourth)
    if BITS & 2:
        at = start + BITS // 4 * 256 + cell[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        first, second = tl.split(tl.load(at, eviction_policy="evict_first").to(tl.uint32, bitcast=True))
        words = words + (first, second)
    if BITS & 1:
        at = start + BITS // 2 * 128 + tl.max_contiguous(cell, [1, 1])
        words = words + (tl.load(at, eviction_policy="evict_first").to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def index_of(words, COLUMN: tl.constexpr, BITS: tl.constexpr):
    """The index of one of the 32 columns of a lane."""
    PLACE: tl.constexpr = COLUMN * BITS // 32
    SHIFT: tl.constexpr = COLUMN * BITS % 32
    if SHIFT + BITS <= 32:
        found = words[PLACE] >> SHIFT
    else:
        found = words[PLACE] >> SHIFT | words[PLACE + 1] << (32 - SHIFT)
    return found & ((1 << BITS) - 1)


@triton.jit
def vectors(table, index, WIDTH: tl.constexpr, NATIVE: tl.constexpr):
    """The vectors of `index`: WIDTH // 2 words uint32, each two float16."""
    if NATIVE:
        at = table.to(tl.int64) + (index * (2 * WIDTH)).to(tl.int64)
        words = ()
        for part in tl.static_range(-(-WIDTH // 8)):
            words = words + read_words(at + part * 16, 4 if WIDTH >= 8 else WIDTH // 2, ".nc.L1::evict_last")
        return words
    else:
        words = ()
        for part in tl.static_range(WIDTH // 2):
            low = tl.load(table + index * WIDTH + 2 * part).to(tl.uint16, bitcast=True).to(tl.uint32)
            high = tl.load(table + index * WIDTH + 2 * part + 1).to(tl.uint16, bitcast=True).to(tl.uint32)
            words = words + (low | high << 16,)
        return words


@triton.jit
def _half(words, ROW: tl.constexpr):
    """Place ROW of vectors, float16."""
    return (words[ROW // 2] >> (ROW % 2 * 16)).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def four(found, FIRST: tl.constexpr, EACH: tl.constexpr, ROW: tl.constexpr):
    """Place ROW of four vectors, float16 `[16, 4 lanes, 2, 2]`."""
    even = tl.join(_half(found[FIRST], ROW), _half(found[FIRST + 2 * EACH], ROW))
    odd = tl.join(_half(found[FIRST + EACH], ROW), _half(found[FIRST + 3 * EACH], ROW))
    return tl.join(even, odd)


@triton.jit
def _operand(found, ROW: tl.constexpr):
    """Place ROW of the vectors of STEP columns, float16 `[16, 4 STEP]`."""
    if PAIRS:
        both = tl.join(four(found, 0, 2, ROW), four(found, 1, 2, ROW))
        return tl.reshape(tl.permute(both, (0, 2, 1, 3, 4)), (16, 32))
    else:
        return tl.reshape(tl.permute(four(found, 0, 1, ROW), (0, 2, 1, 3)), (16, 16))


@triton.jit
def _inputs(some, BM: tl.constexpr):
    """`x` `[4 lanes, STEP, BM]` in the order of `_operand`."""
    if PAIRS:
        return tl.reshape(tl.permute(tl.reshape(some, (4, 2, 4, BM)), (1, 0, 2, 3)), (32, BM))
    else:
        return tl.reshape(tl.permute(tl.reshape(some, (4, 2, 2, BM)), (1, 0, 2, 3)), (16, BM))


@triton.jit
def _some(places, columns, k, size, live, EVEN: tl.constexpr, FEW: tl.constexpr):
    """`x` `[4 lanes, STEP, BM]` of columns from `k` on, or of the finer ones. `places`: the tokens' beginnings."""
    numbers = k + tl.arange(0, 4)[:, None, None] * 32 + tl.arange(0, STEP)[None, :, None]
    here = live[None, None, :]
    if not EVEN:
        here = here & (numbers < size)
    if FEW:
        numbers = tl.load(columns + numbers, mask=numbers < size, other=0)
    return tl.load(places + numbers, mask=here, other=0.0)


@triton.jit
def _largest(largest, places, columns, begin, end, size, live, EVEN: tl.constexpr, FEW: tl.constexpr):
    """The largest `|x|` at each place of a step, `[4, STEP, BM]`."""
    for tile in range(begin, end):
        for step in range(32 // STEP):
            some = _some(places, columns, tile * 128 + step * STEP, size, live, EVEN, FEW)
            largest = tl.maximum(largest, tl.abs(some.to(tl.float32)))
    return largest


@triton.jit
def _product(
    acc, places, columns, stream, table, up, begin, end, size, live,
    BITS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr,
    FEW: tl.constexpr, SCALED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`acc` and the products of tiles `begin` to `end` of a stream. Barriers: the assembler else puts the lookups of a
    whole tile first and has no registers for them."""
    for tile in range(begin, end):
        words = tile_words(stream + tl.cast(tile, tl.int64) * (64 * BITS), BITS)
        tl.debug_barrier()
        for step in tl.static_range(32 // STEP):
            some = _some(places, columns, tile * 128 + step * STEP, size, live, EVEN, FEW)
            if SCALED:
                some = (some.to(tl.float32) * up[None, None, :]).to(tl.float16)
            inputs = _inputs(some, BM)
            found = ()
            for i in tl.static_range(STEP):
                found = found + (vectors(table, index_of(words, step * STEP + i, BITS), WIDTH, NATIVE),)
            fresh = ()
            for j in tl.static_range(LENGTH):
                fresh = fresh + (tl.dot(_operand(found, j), inputs, acc[j], out_dtype=tl.float32),)
            acc = fresh
            tl.debug_barrier()
    return acc


@triton.jit
def rows_of(tile, per, LENGTH: tl.constexpr, GROUP: tl.constexpr):
    """Of a tile: its group, the rows at which its vectors begin, and how many rows of the group come from there on."""
    group = tile // per
    within = (tile % per * 16 + tl.arange(0, 16)) * LENGTH
    return group, group * GROUP + within, GROUP - within


@triton.jit
def scale_of(scales, table, peak, rows, inside):
    code = tl.load(scales + rows, mask=inside, other=255).to(tl.int32)
    return tl.load(table + code) * peak


@triton.jit(do_not_specialize=("M", "count", "each", "few", "more", "per"))
def codebook_kernel(
    x, weight, codebook, second, columns, scales, peaks, table, bias, out, partial, counters,
    M, N, K, stride, count, each, few, more, per,
    BITS: tl.constexpr, SECOND: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, FEW: tl.constexpr, BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """`x` `[M, K]` with rows `stride` apart; `count` column tiles, `each` of them per split; `few` finer columns, of
    which `more` tiles per split; `per`: row tiles of a whole group. FEW: finer columns are listed, not all. NATIVE: not
    in the interpreter, which has no assembler."""
    tile = tl.program_id(0).to(tl.int64)
    group, first_rows, left = rows_of(tl.program_id(0), per, LENGTH, GROUP)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, count)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    live = tokens < M
    places = x + tokens[None, None, :].to(tl.int64) * stride
    number = tl.cast(group, tl.int64)
    columns += number * (few + K)
    fine = (few + 127) // 128
    start = tl.program_id(1) * more
    stop = tl.minimum(start + more, fine)
    SCALED: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    up = tl.full((BM,), 1.0, tl.float32)
    if SCALED:
        largest = tl.zeros((4, STEP, BM), tl.float32)
        largest = _largest(largest, places, columns, begin, end, K, live, EVEN, False)
        if SECOND > 0:
            largest = _largest(largest, places, columns, start, stop, few, live, False, FEW)
        up = power(tl.max(tl.max(largest, 0), 0))
    acc = (tl.zeros((16, BM), tl.float32),) * LENGTH
    acc = _product(
        acc, places, columns, weight + tile * count * (64 * BITS), codebook + (number << BITS) * WIDTH, up, begin, end,
        K, live, BITS, LENGTH, WIDTH, BM, EVEN, False, SCALED, NATIVE,
    )  # fmt: skip
    if SECOND > 0:
        after = weight + tl.num_programs(0).to(tl.int64) * count * (64 * BITS)
        acc = _product(
            acc, places, columns, after + tile * fine * (64 * SECOND), second + (number << SECOND) * WIDTH, up, start,
            stop, few, live, SECOND, LENGTH, WIDTH, BM, False, FEW, SCALED, NATIVE,
        )  # fmt: skip
    down = inverse(up)
    last = not SPLIT
    if SPLIT:
        at = partial + (tl.program_id(2) * tl.num_programs(0) + tile) * (tl.num_programs(1) * LENGTH * BM * 16)
        at += tl.arange(0, BM)[None, :] * 16 + tl.arange(0, 16)[:, None]
        for j in tl.static_range(LENGTH):
            mine = at + (tl.program_id(1) * LENGTH + j) * (BM * 16)
            tl.store(mine, acc[j] * down[None, :], mask=live[None, :])
        last = is_last(counters)
    if last:
        peak = tl.load(peaks + group).to(tl.float32)
        for j in tl.static_range(LENGTH):
            if SPLIT:
                product = _collected(at + j * (BM * 16), live, LENGTH, BM)
            else:
                product = acc[j] * down[None, :]
            rows = first_rows + j
            inside = (left > j) & (rows < N)
            product *= scale_of(scales, table, peak, rows, inside)[:, None]
            stored(product, x, bias, out, out, rows, tokens, inside, live, N, False, BIAS, False)


@triton.jit
def _collected(at, live, LENGTH: tl.constexpr, BM: tl.constexpr):
    """The sum of all parts of one place, in their order. They are 16 rows each, so eight are on their way at a time."""
    acc = tl.zeros((16, BM), tl.float32)
    splits = tl.num_programs(1)
    for first in range(0, splits, 8):
        for part in tl.static_range(8):
            here = live[None, :] & (tl.full((1, BM), first + part, tl.int32) < splits)
            mine = at + (first + part) * (LENGTH * BM * 16)
            acc += tl.load(mine, mask=here, other=0.0, cache_modifier=".cg")
    return acc
