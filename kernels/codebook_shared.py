"""The Triton kernel that multiplies few tokens by codebooks of 256 vectors of 4 (`codebook_order.py`): 2 bits a weight.

`out[M, N] = x[M, K] @ W[N, K]^T`. Such a table takes 2 KB, so shared memory holds 16 copies side by side, `[entry,
copy, 8 bytes]`: entries are 128 bytes apart, lane `l` reads copy `l % 16`, and 32 random lookups never want a bank
twice. What bounds the kernel then is the width of shared memory, 128 bytes per clock: two clocks of a multiprocessor
for 128 weights.

A program has 32 TILES rows, and its warps share the units of 64 columns of its part of K. Which thread holds what is
written down (`warp.py`): lane `(g, t)` has of each tile of 8 vector rows the row `g`, and of a unit 16 columns, 16
bytes of indices. An entry is two words, rows 0, 1 and rows 2, 3 of one column, and each goes into the tensor core as it
is: a pair along the product's contracted index stands for two rows of *one* column, and `x` of that column is `(x, 0)`
in an even column of the right operand and `(0, x)` in the odd one after it. So nothing is packed anew, and the 8
columns of a product are 4 tokens. Half of the tensor core multiplies by zero; it has time.

At the end the warps' parts are added through the memory that held the table, in the warps' order, and those of blocks
or programs that share K as in `cluster.py` or in `uniform.py`, in theirs. Scales of rows come on last. A bfloat16 `x`
is scaled as in `codebook_product.py`.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005, SIM102
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.cluster import exchanged, leave_number, own_part, planned, room
from quant.kernels.codebook_inputs import all_inputs, operand, powers_of, taken_inputs
from quant.kernels.codebook_product import scale_of
from quant.kernels.shared import added, entries, filled, get_four, look_up
from quant.kernels.uniform import inverse, is_last
from quant.kernels.warp import fetch, load_words, nothing, product, shuffled, waited

FETCH = tl.constexpr(2)
"""Units that are asked for ahead of time, into the second-level cache."""


@triton.constexpr_function
def held_bytes(tiles: int, warps: int, steps: int) -> int:
    """Shared memory of a block: the table's copies, later what the warps have of four tokens; and `x`."""
    return max(32768, warps * 16 * (32 * tiles + 8)) + steps * warps * 512


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
    sums = (tl.zeros((LANES,), tl.float32),) * COUNT
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
    sums, made, bias, out, begin, inside, token, first, most, local, M, N,
    LANES: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, CTAS: tl.constexpr,
):  # fmt: skip
    """Stores a part's sums, as `shared.added` gives them from place `first` on, `most` of them, times `made`.
    `inside`: how many rows there are from `begin`."""
    for i in tl.static_range(len(sums)):
        place = first + i * LANES + local
        row, mine = place % ROWS, token + place // ROWS
        here = (row < inside) & (mine < M) & (i * LANES + local < most)
        value = sums[i] * made[i]
        if BIAS:
            value += tl.load(bias + begin + row, mask=here, other=0.0).to(tl.float32)
        leave_number(out + mine.to(tl.int64) * N + begin + row, value, here, CTAS)


@triton.jit
def _scales(held, begin, inside, first, most, local, COUNT: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Those of the rows of COUNT places of each lane, for `_stored`. Asked for before they are wanted: each is two
    loads, one after the other."""
    scales, table, peak = held
    made = ()
    for i in tl.static_range(COUNT):
        row = (first + i * LANES + local) % ROWS
        here = (row < inside) & (i * LANES + local < most)
        made = made + (scale_of(scales, table, peak, begin + row, here),)
    return made


@triton.jit
def _products(
    acc, words, inputs, codebook, copy, up, left,
    KIND: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`acc` and the products of a unit: two columns of a lane at a time."""
    for pair in tl.static_range(8):
        operands = ()
        for part in tl.static_range(PARTS):
            operands = operands + (operand(inputs[part][pair], up[part], left, KIND, NATIVE),)
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
    acc, up, start, held, bias, out, partial, counters, row, inside, lanes, mine, local, M, N,
    BM: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, CTAS: tl.constexpr, STEPS: tl.constexpr,
    ONE: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Adds the warps' products, and those of all blocks or programs, and stores the `inside` rows from `row` on."""
    LANES: tl.constexpr = 32 * WARPS
    ROWS: tl.constexpr = 32 * TILES
    PLACES: tl.constexpr = ROWS if ONE else 4 * ROWS
    COUNT: tl.constexpr = -(-PLACES // LANES)
    SIZE: tl.constexpr = BM * ROWS
    ALL: tl.constexpr = CTAS if NATIVE else 1  # the interpreter has added up all blocks
    OWN: tl.constexpr = PLACES // ALL  # places that a block stores
    first, own = tl.program_id(2) * BM, mine * OWN if ALL > 1 else 0
    place = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    place = partial + place.to(tl.int64) * tl.num_programs(1) * SIZE + local
    made = _scales(held, row, inside, own, OWN, local, -(-OWN // LANES), LANES, ROWS)
    for part in tl.static_range(BM // 4):
        down = shuffled(inverse(up[part]), lanes // 32 * 32 + lanes % 4 * 8, NATIVE)
        sums = added(acc, down, start, local, part, BM // 4, TILES, WARPS, COUNT, NATIVE)
        token = first + part * 4
        if ALL > 1:
            planned(counters, M)
            sums = exchanged(sums, start + held_bytes(TILES, WARPS, STEPS), mine, local, LANES, PLACES, ALL)
        if SPLIT:
            _left(sums, place + mine * SIZE + part * 4 * ROWS, token, local, M, LANES, ROWS)
        else:
            _stored(sums, made, bias, out, row, inside, token, own, OWN, local, M, N, LANES, ROWS, BIAS, ALL)
    if SPLIT:
        if is_last(counters):
            for some in range(first, tl.minimum(first + BM, M), 4):
                sums = _collected(place + (some - first) * ROWS, M - some, local, LANES, ROWS, SIZE, COUNT)
                _stored(sums, made, bias, out, row, inside, some, 0, PLACES, local, M, N, LANES, ROWS, BIAS, 1)


@triton.jit
def _summed(
    words, at, asked, places, columns, codebook, copy, up, begin, end, each, last, K, g, t,
    KIND: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """The products of a warp's units. `words`: of its first one; `columns`: where its inputs lie in shared memory;
    `asked`: where a lane asks for a line of a unit."""
    HALF: tl.constexpr = "fp16" if STEPS > 0 else KIND
    BEFORE: tl.constexpr = STEPS == 0 and PARTS == 1  # more have no registers for the next inputs
    acc, unit = nothing(TILES * PARTS, False, g.shape[0]), begin
    if BEFORE:
        inputs = all_inputs(places, unit, end, K, t, PARTS, EVEN, NATIVE)
    for i in range(each):
        if NATIVE and PARTS == 1:
            fetch(asked + tl.minimum(unit + FETCH, last) * 256)
        if STEPS > 0:
            place = columns + (i // 2 * 256 + i % 2 * 32 + t * 64).to(tl.uint32)
            inputs = (get_four(place) + get_four(place + 16),)
        elif PARTS > 1:
            inputs = all_inputs(places, unit, end, K, t, PARTS, EVEN, NATIVE)
        unit += 1
        then = _unit_words(at, unit, last, TILES, NATIVE)
        if BEFORE:
            later = all_inputs(places, unit, end, K, t, PARTS, False, NATIVE)
        acc = _products(acc, words, inputs, codebook, copy, up, g % 2 == 1, HALF, TILES, PARTS, NATIVE)
        words = then
        if BEFORE:
            inputs = later
    return acc


@triton.jit(do_not_specialize=("M", "units", "each", "tiles", "per"))
def codebook_shared_kernel(
    x, weight, codebook, scales, peaks, table, bias, out, partial, counters,
    M, N, K, stride, units, each, tiles, per,
    GROUP: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, CTAS: tl.constexpr,
    STEPS: tl.constexpr, ONE: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`x` `[M, K]` with rows `stride` apart, `K` and `stride` multiples of 8; `units` of 64 columns, of which each warp
    takes `each`, an even number where STEPS; `tiles` of 16 vector rows, `per` of them in a whole group. CTAS: blocks of
    a program, a cluster, each with WARPS warps and a part of K. STEPS: each warp takes its part of one token as a
    whole, through shared memory, four units at a step; or 0. ONE: M is 1. EVEN: no unit is ragged or missing. EARLY:
    see `warp.waited`. NATIVE: not in the interpreter, which has no assembler."""
    KIND: tl.constexpr = "bf16" if x.dtype.element_ty == tl.bfloat16 else "fp16"
    PARTS: tl.constexpr = BM // 4
    LANES: tl.constexpr = 32 * WARPS
    ROWS: tl.constexpr = 32 * TILES
    tl.static_assert(CTAS == 1 or (PARTS == 1 and not SPLIT))
    lanes = tl.arange(0, LANES * CTAS)
    part, local = own_part(lanes, WARPS, CTAS)
    g, t, warp = lanes // 4 % 8, lanes % 4, local // 32
    blocks = (2 * per + TILES - 1) // TILES
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    codebook += group * 1024
    row = group * GROUP + block * ROWS
    inside = tl.minimum(GROUP - block * ROWS, N - row)
    begin = (part * WARPS + warp) * each
    end = tl.minimum(begin + each, units)
    start = room(lanes, local, held_bytes(TILES, WARPS, STEPS), ROWS * (4 if ONE else 16), CTAS, NATIVE)
    asked = tl.minimum(group * per + block * (TILES // 2) + lanes % (4 * TILES) // 8, tiles - 1).to(tl.int64)
    asked = weight + asked * units * 256 + lanes % 8 * 32  # where a lane asks for a line of a unit
    if EARLY:
        for ahead in tl.static_range(FETCH):
            fetch(asked + tl.minimum(begin + ahead, units - 1) * 256)
        zero = waited(lanes)
        g, t, codebook, begin = g + zero, t + zero, codebook + zero, begin + zero
    at = ()
    for half in tl.static_range(TILES // 2):  # what is not there, or of another group, is not stored
        tile = tl.minimum(group * per + block * (TILES // 2) + half, tiles - 1)
        at = at + (weight + tl.cast(tile, tl.int64) * units * 256 + (g * 4 + t) * 4,)
    words = _unit_words(at, tl.minimum(begin, units - 1), units - 1, TILES, NATIVE)
    if NATIVE:
        some = entries(codebook, local, LANES)
    first = tl.program_id(2) * BM
    places, up = (), ()
    for number in tl.static_range(PARTS):
        token = tl.minimum(first + number * 4 + g // 2, M - 1)
        places = places + (x + token.to(tl.int64) * stride + t * 32,)
        up = up + (tl.full((LANES * CTAS,), 1.0, tl.float32),)
    columns = start
    if STEPS > 0:
        columns += (held_bytes(TILES, WARPS, 0) + warp * (STEPS * 512)).to(tl.uint32)
        up = (taken_inputs(x, columns, begin * 64, tl.minimum(K, end * 64), lanes, STEPS, KIND),)
    elif KIND == "bf16":
        up = powers_of(places, begin, end, each, K, lanes, PARTS, ONE, NATIVE)
    if NATIVE:
        filled(start, some, local, LANES)
    acc = _summed(
        words, at, asked, places, columns, codebook, start + (lanes % 16 * 8).to(tl.uint32), up, begin, end, each,
        units - 1, K, g, t, KIND, TILES, PARTS, STEPS, EVEN, NATIVE,
    )  # fmt: skip
    held = scales, table, tl.load(peaks + group).to(tl.float32)
    _finish(
        acc, up, start, held, bias, out, partial, counters, row, inside, lanes, part, local, M, N,
        BM, TILES, WARPS, CTAS, STEPS, ONE, SPLIT, BIAS, NATIVE,
    )  # fmt: skip
