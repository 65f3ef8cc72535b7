"""The Triton kernel that multiplies few tokens by codebooks of 256 vectors of 4 (`codebook_order.py`): 2 bits a weight.

`out[M, N] = x[M, K] @ W[N, K]^T`. Such a table takes 2 KB, so shared memory holds 16 copies side by side, `[entry,
copy, 8 bytes]`: entries are 128 bytes apart, lane `l` reads copy `l % 16`, and 32 random lookups never want a bank
twice. What bounds the kernel then is the width of shared memory, 128 bytes per clock: two clocks of a multiprocessor
for 128 weights.

A program has 32 TILES rows, and its warps take the units of 64 columns of its part of K in turn. Which thread holds
what is written down (`warp.py`): lane `(g, t)` has of each tile of 8 vector rows the row `g`, and of a unit 16 columns,
16 bytes of indices. An entry is two words, rows 0, 1 and rows 2, 3 of one column, and each goes into the tensor core as
it is: a pair along the product's contracted index stands for two rows of *one* column, and `x` of that column is
`(x, 0)` in an even column of the right operand and `(0, x)` in the odd one after it. So nothing is packed anew, and the
8 columns of a product are 4 tokens. Half of the tensor core multiplies by zero; it has time.

At the end the warps' parts are added through the memory that held the table, in the warps' order, and those of programs
that share K as in `uniform.py`, in theirs. Scales of rows come on last. A bfloat16 `x` is scaled as in
`codebook_product.py`.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005, SIM102
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.codebook_product import scale_of
from quant.kernels.shared import added, entries, filled, look_up
from quant.kernels.uniform import inverse, is_last, power
from quant.kernels.warp import (
    joined,
    largest_of,
    load_inputs,
    load_words,
    nothing,
    numbers,
    permuted,
    product,
    shuffled,
    waited,
)


@triton.constexpr_function
def held_bytes(tiles: int, warps: int) -> int:
    """Shared memory of a program: the table's copies, later what the warps have of four tokens."""
    return max(32768, warps * 16 * (32 * tiles + 8))


@triton.jit
def _vector(codebook, copy, word, BYTE: tl.constexpr, NATIVE: tl.constexpr):
    """The entry of index BYTE of a word. `copy`: the address of the lane's."""
    if NATIVE:
        return look_up(copy, word, BYTE)
    else:
        both = tl.load(codebook.to(tl.pointer_type(tl.uint64)) + (word >> (8 * BYTE) & 255))
        return both.to(tl.uint32), (both >> 32).to(tl.uint32)


@triton.jit
def _unit_words(at, unit, last, TILES: tl.constexpr, NATIVE: tl.constexpr):
    """The indices of 16 columns of a row of each tile. `at`: where a lane has them in unit 0 of each 16 vector rows."""
    words = ()
    for tile in tl.static_range(TILES):
        words = words + load_words(at[tile // 2] + tl.minimum(unit, last) * 256 + tile % 2 * 128, 4, False, NATIVE)
    return words


@triton.jit
def _unit_inputs(place, unit, end, K, t, EVEN: tl.constexpr, NATIVE: tl.constexpr):
    """16 columns of `x` of a unit, in eight words; zero from unit `end` and from column K on."""
    k = unit // 2 * 128 + unit % 2 * 16
    first = load_inputs(place + k, (unit < end) & (k + t * 32 < K), 4, EVEN, NATIVE)
    return first + load_inputs(place + k + 8, (unit < end) & (k + t * 32 + 8 < K), 4, EVEN, NATIVE)


@triton.jit
def _all_inputs(places, unit, end, K, t, PARTS: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr):
    """Those of each part."""
    made = ()
    for part in tl.static_range(PARTS):
        made = made + (_unit_inputs(places[part], unit, end, K, t, EVEN, NATIVE),)
    return made


@triton.jit
def _sided(word, left, HIGH: tl.constexpr, NATIVE: tl.constexpr):
    """The high or the low half of a word, in the low half or, where `left`, the high one, beside zero."""
    select = tl.where(left, 0x3244 if HIGH else 0x1044, 0x4432 if HIGH else 0x4410)  # 4: a byte of zero
    return permuted(word, 0, select, NATIVE)


@triton.jit
def _operand(word, up, left, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Two columns of `x` as the right operand of a product."""
    if KIND == "bf16":
        x0, x1 = numbers(word, KIND)
        word = joined(x0 * up, x1 * up, NATIVE)
    return _sided(word, left, False, NATIVE), _sided(word, left, True, NATIVE)


@triton.jit
def _powers(
    places, begin, end, each, K, lanes,
    WARPS: tl.constexpr, PARTS: tl.constexpr, ONE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """By what the token of a lane is multiplied in each part, so that the largest `|x|` of its warp's units fits. All
    `g` have the one token, or two of them the same, and take the units in turn."""
    TURNS: tl.constexpr = 8 if ONE else 2
    found = ()
    for _ in tl.static_range(PARTS):
        found = found + (tl.zeros(lanes.shape, tl.float32),)
    for i in range(0, each, TURNS):
        unit = begin + (i + lanes // 4 % TURNS) * WARPS + lanes // 32
        fresh = ()
        for part in tl.static_range(PARTS):
            words, most = _unit_inputs(places[part], unit, end, K, lanes % 4, False, NATIVE), found[part]
            for w in tl.static_range(8):
                low, high = numbers(words[w], "bf16")
                either = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
                most = tl.maximum(most, either, propagate_nan=tl.PropagateNan.ALL)
            fresh = fresh + (most,)
        found = fresh
    powers = ()
    for part in tl.static_range(PARTS):
        powers = powers + (power(largest_of(found[part], lanes, 5 if ONE else 3, NATIVE)),)
    return powers


@triton.jit
def _left(sums, at, token, lanes, M, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Stores a program's sums of a part where the last one finds them."""
    for i in tl.static_range(len(sums)):
        tl.store(at + i * LANES, sums[i], mask=token + (i * LANES + lanes) // ROWS < M)


@triton.jit
def _collected(at, left, lanes, LANES: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """The sums of all programs' parts of COUNT places of each lane, in their order; several on their way at a time.
    `left`: tokens from here on."""
    AHEAD: tl.constexpr = 8 if COUNT == 1 else 4
    splits = tl.num_programs(1)
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((LANES,), tl.float32),)
    for begin in range(0, splits, AHEAD):
        fresh = ()
        for i in tl.static_range(COUNT):
            total = sums[i]
            for part in tl.static_range(AHEAD):
                mine = at + (begin + part) * SIZE + i * LANES
                here = ((i * LANES + lanes) // ROWS < left) & (tl.full((LANES,), begin + part, tl.int32) < splits)
                total += tl.load(mine, mask=here, other=0.0, cache_modifier=".cg")
            fresh = fresh + (total,)
        sums = fresh
    return sums


@triton.jit
def _stored(
    sums, held, out, begin, inside, token, lanes, M, N,
    LANES: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Scales and stores a part's sums, as `shared.added` gives them. `inside`: how many rows there are from `begin`."""
    scales, table, bias, peak = held
    for i in tl.static_range(len(sums)):
        row, mine = (i * LANES + lanes) % ROWS, token + (i * LANES + lanes) // ROWS
        here = (row < inside) & (mine < M)
        value = sums[i] * scale_of(scales, table, peak, begin + row, here)
        if BIAS:
            value += tl.load(bias + begin + row, mask=here, other=0.0).to(tl.float32)
        tl.store(out + mine.to(tl.int64) * N + begin + row, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _products(
    acc, words, inputs, codebook, copy, up, left,
    KIND: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`acc` and the products of a unit: two columns of a lane at a time."""
    for pair in tl.static_range(8):
        operands = ()
        for part in tl.static_range(PARTS):
            operands = operands + (_operand(inputs[part][pair], up[part], left, KIND, NATIVE),)
        fresh = ()
        for tile in tl.static_range(TILES):
            word = words[tile * 4 + pair // 2]
            a = _vector(codebook, copy, word, pair % 2 * 2, NATIVE)
            b = _vector(codebook, copy, word, pair % 2 * 2 + 1, NATIVE)
            for part in tl.static_range(PARTS):
                x0, x1 = operands[part]
                fresh = fresh + (product(a[0], a[1], b[0], b[1], x0, x1, acc[tile * PARTS + part], "fp16", NATIVE),)
        acc = fresh
    return acc


@triton.jit
def _finish(
    acc, up, start, held, out, partial, counters, row, inside, M, N,
    BM: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, ONE: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Adds the warps' products, and those of all programs, and stores the `inside` rows from `row` on."""
    LANES: tl.constexpr = 32 * WARPS
    ROWS: tl.constexpr = 32 * TILES
    COUNT: tl.constexpr = (ROWS // LANES if ROWS > LANES else 1) if ONE else 4 * ROWS // LANES
    SIZE: tl.constexpr = BM * ROWS
    lanes = tl.arange(0, LANES)
    place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    place = partial + place.to(tl.int64) * tl.num_programs(1) * SIZE + lanes
    first = tl.program_id(2) * BM
    for part in tl.static_range(BM // 4):
        down = shuffled(inverse(up[part]), lanes // 32 * 32 + lanes % 4 * 8, NATIVE)
        sums = added(acc, down, start, lanes, part, BM // 4, TILES, WARPS, COUNT, NATIVE)
        token = first + part * 4
        if SPLIT:
            _left(sums, place + tl.program_id(1) * SIZE + part * 4 * ROWS, token, lanes, M, LANES, ROWS)
        else:
            _stored(sums, held, out, row, inside, token, lanes, M, N, LANES, ROWS, BIAS)
    if SPLIT:
        if is_last(counters):
            for some in range(first, tl.minimum(first + BM, M), 4):
                sums = _collected(place + (some - first) * ROWS, M - some, lanes, LANES, ROWS, SIZE, COUNT)
                _stored(sums, held, out, row, inside, some, lanes, M, N, LANES, ROWS, BIAS)


@triton.jit(do_not_specialize=("M", "units", "each", "tiles", "per"))
def codebook_shared_kernel(
    x, weight, codebook, scales, peaks, table, bias, out, partial, counters,
    M, N, K, stride, units, each, tiles, per,
    GROUP: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, ONE: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`x` `[M, K]` with rows `stride` apart, `K` and `stride` multiples of 8; `units` of 64 columns, of which each warp
    takes `each`; `tiles` of 16 vector rows, `per` of them in a whole group. ONE: M is 1. EVEN: no unit is ragged or
    missing. EARLY: see `warp.waited`. NATIVE: not in the interpreter, which has no assembler."""
    KIND: tl.constexpr = "bf16" if x.dtype.element_ty == tl.bfloat16 else "fp16"
    PARTS: tl.constexpr = BM // 4
    LANES: tl.constexpr = 32 * WARPS
    ROWS: tl.constexpr = 32 * TILES
    lanes = tl.arange(0, LANES)
    g, t, warp = lanes // 4 % 8, lanes % 4, lanes // 32
    blocks = (2 * per + TILES - 1) // TILES
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    codebook += group * 1024
    if EARLY:
        zero = waited(lanes)
        g, t, codebook = g + zero, t + zero, codebook + zero
    begin = tl.program_id(1) * each * WARPS
    end = tl.minimum(begin + each * WARPS, units)
    at = ()
    for half in tl.static_range(TILES // 2):  # what is not there, or of another group, is not stored
        tile = tl.minimum(group * per + block * (TILES // 2) + half, tiles - 1)
        at = at + (weight + tl.cast(tile, tl.int64) * units * 256 + (g * 4 + t) * 4,)
    words = _unit_words(at, begin + warp, units - 1, TILES, NATIVE)
    if NATIVE:
        some = entries(codebook, lanes, LANES)
    first = tl.program_id(2) * BM
    places, up = (), ()
    for part in tl.static_range(PARTS):
        token = tl.minimum(first + part * 4 + g // 2, M - 1)
        places, up = places + (x + token.to(tl.int64) * stride + t * 32,), up + (tl.full((LANES,), 1.0, tl.float32),)
    if KIND == "bf16":
        up = _powers(places, begin, end, each, K, lanes, WARPS, PARTS, ONE, NATIVE)
    start = lanes.to(tl.uint32)
    if NATIVE:
        start = filled(some, lanes, LANES, held_bytes(TILES, WARPS))
    copy = start + (lanes % 16 * 8).to(tl.uint32)
    acc = nothing(TILES * PARTS, False, LANES)
    unit = begin + warp
    if PARTS == 1:  # more have no registers for the next inputs
        inputs = _all_inputs(places, unit, end, K, t, PARTS, EVEN, NATIVE)
    for _ in range(each):
        if PARTS > 1:
            inputs = _all_inputs(places, unit, end, K, t, PARTS, EVEN, NATIVE)
        unit += WARPS
        then = _unit_words(at, unit, units - 1, TILES, NATIVE)
        if PARTS == 1:
            later = _all_inputs(places, unit, end, K, t, PARTS, False, NATIVE)
        acc = _products(acc, words, inputs, codebook, copy, up, g % 2 == 1, KIND, TILES, PARTS, NATIVE)
        words = then
        if PARTS == 1:
            inputs = later
    held = scales, table, bias, tl.load(peaks + group).to(tl.float32)
    row = group * GROUP + block * ROWS
    inside = tl.minimum(GROUP - block * ROWS, N - row)
    _finish(acc, up, start, held, out, partial, counters, row, inside, M, N, BM, TILES, WARPS, ONE, SPLIT, BIAS, NATIVE)
