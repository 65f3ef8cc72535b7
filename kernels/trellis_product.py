"""The Triton kernel that multiplies by trellis weights in kernel order (`trellis_order.py`), for few tokens.

`out[M, N] = x[M, K] @ W[N, K]^T`: each program has 16 units, 256 rows (or 8: APART), and each of its warps, up to 16 of
them, a part of K whose weights it decodes once per BM tokens; they add what they have through shared memory, and a
cluster's blocks through each other's. What a thread holds is written down (`warp.py`): lane `(g, t)` has units `2 g`
and `2 g + 1`, and of a side of a chunk the four columns `8 t + 4 side + i`. So one row of every unit is an operand of a
tensor core as it is: 16 products, one per row of a unit, and no value ever changes its thread.

A value is one or two instructions from its state (SASS, sm_90):

    inst   one multiply-add, one mask, and there lie two float16: the halves of one weight, side by side like two
           columns. They stay apart, each is multiplied by the same `x`, and the tensor core adds them, in float32. So
           the sum is not rounded to float16 as the table's is: up to `2^-11 |value|` apart, which tolerances include.
    mac    one multiply-add: a weight is the sum of the four bytes of a word, so each is multiplied by the same `x`, as
           an integer. `x` is rounded to 16 bits, a token at a time, to a scale of each warp: an error of 2^-16 of the
           largest, where a bfloat16 number's own is 2^-9 of itself. Its two bytes go to two columns of the product.
           Where a state has two values (`twin`, the kernels' name for it), the sum of its bytes 0 and 2 and that of its
           bytes 1 and 3 are columns of their own: `x` stands in two places of four. Their sum and their difference are
           the rows' values, so one multiply-add and half of a tensor core's instruction make two weights
           Of 8 and 16 tokens (`_halves`) bytes are added up first, 1.5 instructions for each weight: the sum is a
           subnormal float16, `x` is scaled as for other codes, and a token has one column
    sum    the same with a mask first
    hyb    one multiply-add, two for the place in the table, one lookup of 4 bytes, in a table of 2 KB that stays in the
           first-level cache, and one for the sign, for two weights: two rows' values lie side by side

Between a register and a state stand a shift and a mask, but states share their registers, and the multiplier of `mac`
is a multiple of 8, so that a state may lie up to 3 bits from where its register begins (`integer_word`): of 2 bits and
two values, 12 of them for 16 weights.

What codes of bytes take of `x` waits in shared memory: of one token as a whole, else 16 chunks at a time, of halves 8.
Loaded when it is wanted it would come behind the next chunk's weights, which were asked for before: loads return in
order (28.8 us for 31.0).

What sums of bytes carry beside the value, 510 or 126, comes off with the sum of all `x`, an integer or a product; the
scale of a row comes on at the end. A left shift may be written as a multiplication: shifts and masks share one half of
a multiprocessor's units, and integer products go to the other. The first mask of `inst` is an argument and the second
a product with it; an instruction holds one constant, and the assembler would load the other again and again.

The tensor core takes float16 of the other codes only. A bfloat16 `x` is scaled by a power of two, per token and
warp, so that the largest is between 2^14 and 2^15; that is exact for all that are not `2^29` times smaller.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005, SIM102
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.cluster import own_part, room
from quant.kernels.trellis_decode import (
    FLIP,
    carry_of,
    chunk_words,
    integer_word,
    is_halves,
    neighbours,
    row_of,
    row_words,
    state_at,
    streams_of,
    value_of,
)
from quant.kernels.trellis_inputs import (
    ahead_of,
    is_integer,
    leave_inputs,
    operand_integers,
    operand_x,
    places_of,
)
from quant.kernels.trellis_leave import carried, finish, held_bytes, leave, products_of, tokens_at_once
from quant.kernels.trellis_turn import chunk_inputs, taken
from quant.kernels.uniform import is_last
from quant.kernels.warp import byte_sum, fetch, load_inputs, nothing, permuted, product, waited

FETCH = tl.constexpr(2)
"""Chunks that are asked for ahead of time, into the second-level cache."""


@triton.constexpr_function
def fetches(bm: int, parts: int, native: bool) -> bool:
    """Whether chunks are asked for ahead of time: where there are registers for it."""
    return native and (parts == 1 or bm == 4)


@triton.jit
def _asked(weight, size, lanes, chunk, count, BITS: tl.constexpr, APART: tl.constexpr):
    """Where each lane of a warp asks for a line of a chunk of its program's units, of APART chunks from `chunk` on: 8
    lines of 128 bytes for a bit."""
    LINES: tl.constexpr = 8 // APART
    line = lanes % 32 % (8 * BITS)
    if BITS == 3:
        line = tl.minimum(lanes % 32, 23)
    place = tl.minimum(tl.program_id(0) * (256 // APART) + line % LINES * 32, size - 1)
    chunk = tl.minimum(chunk + line // LINES % APART, count - 1)
    return weight + chunk.to(tl.int64) * (BITS * size) + line // 8 * size + place


@triton.jit
def _multiplied(made, inputs, acc, CODE: tl.constexpr, NATIVE: tl.constexpr):
    """`acc` and the product of one row of all units with four columns of each lane. `made`: 2 units x 4 columns."""
    if CODE == "hyb" or is_halves(CODE):
        a0, a1 = permuted(made[0], made[1], 0x5410, NATIVE), permuted(made[4], made[5], 0x5410, NATIVE)
        a2, a3 = permuted(made[2], made[3], 0x5410, NATIVE), permuted(made[6], made[7], 0x5410, NATIVE)
        return product(a0, a1, a2, a3, inputs[0], inputs[1], acc, "fp16", NATIVE)
    else:
        KIND: tl.constexpr = "int8" if is_integer(CODE) else "fp16"
        acc = product(made[0], made[4], made[1], made[5], inputs[0], inputs[1], acc, KIND, NATIVE)
        return product(made[2], made[6], made[3], made[7], inputs[2], inputs[3], acc, KIND, NATIVE)


@triton.jit
def _side(
    acc, sums, words, inputs, mask, flip, pairs, SIDE: tl.constexpr,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, PARTS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """The products of all rows of the units with one side of a chunk."""
    PIECES: tl.constexpr = 4 if BITS <= 2 else 8
    streams, last, fresh = (), (mask,) * 8, ()
    for half in tl.static_range(2):
        for i in tl.static_range(4):
            streams = streams + (streams_of(words, SIDE * (2 * PIECES + 4) + half * PIECES, i, SIDE, BITS),)
    for j in tl.static_range(products_of(CODE)):
        row = ()
        for i in tl.static_range(8):
            if is_integer(CODE):
                word = integer_word(streams[i], state_at(j, CODE, BITS, WINDOW), BITS, WINDOW, CODE, NATIVE)
            else:
                word = row_words(
                    last[i], streams[i], mask, flip, pairs, row_of(j, CODE, BITS, WINDOW),
                    BITS, WINDOW, CODE, TABLE, NATIVE,
                )  # fmt: skip
            row = row + (word,)
        made, last = row, row
        if is_halves(CODE):
            made = ()
            for i in tl.static_range(8):
                value = value_of(last[i], j % 2 == 1, carry_of(CODE), CODE, NATIVE)  # a subnormal float16
                made = made + (value.to(tl.uint32, bitcast=True),)
        for part in tl.static_range(PARTS):
            fresh = fresh + (_multiplied(made, inputs[part], acc[j * PARTS + part], CODE, NATIVE),)
    if is_integer(CODE):
        added = ()
        for part in tl.static_range(PARTS):
            total = sums[part]
            for i in tl.static_range(4):
                total = byte_sum(inputs[part][i], 0x01010101, total, True, NATIVE)
            added = added + (total,)
        sums = added
    elif is_halves(CODE):
        added = ()
        carry = tl.full(mask.shape, carry_of(CODE) * 0x10001, tl.uint32)
        for part in tl.static_range(PARTS):
            carries = product(carry, carry, carry, carry, inputs[part][0], inputs[part][1], sums[part], "fp16", NATIVE)
            added = added + (carries,)
        sums = added
    return fresh, sums


@triton.jit
def _operands(
    some, x, places, scale, where, chunk, SIDE: tl.constexpr, t, K, PARTS: tl.constexpr, KIND: tl.constexpr,
    CODE: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The right operands of a side of a chunk, of each part. `some`: four words of each that lay in shared memory."""
    inputs = ()
    for part in tl.static_range(PARTS):
        if is_integer(CODE):
            inputs = inputs + (operand_integers(some, 4 * part + 2 * SIDE, where, NATIVE),)
        elif is_halves(CODE):
            inputs = inputs + ((some[4 * part + 2 * SIDE], some[4 * part + 2 * SIDE + 1]),)
        else:
            k = chunk * 32 + SIDE * 4
            four = load_inputs(x + (places[part] + k), k + t * 8 < K, 2, EVEN, NATIVE)
            inputs = inputs + (operand_x(four, scale[part], KIND, CODE, NATIVE),)
    return inputs


@triton.jit
def _summed(
    x, grid, scaled, words, mask, pairs, begin, end, turns, K, lanes, own,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, WARPS: tl.constexpr, CTAS: tl.constexpr, APART: tl.constexpr, ONE: tl.constexpr,
    BM: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The products with all chunks of a warp's part of K, and of integer codes the sums of `x`."""
    INTEGER: tl.constexpr = is_integer(CODE)
    HALVES: tl.constexpr = is_halves(CODE)
    AHEAD: tl.constexpr = ahead_of(CODE)
    EACH: tl.constexpr = tokens_at_once(CODE)
    PARTS: tl.constexpr = BM // EACH
    weight, size, pair, after, count = grid
    places, scale, integers, mine, where = scaled
    t, flip = lanes % 4, mask * FLIP
    acc = nothing(products_of(CODE) * PARTS, INTEGER, 32 * WARPS * CTAS)
    sums = nothing(PARTS, False, 32 * WARPS * CTAS) if HALVES else (tl.zeros(lanes.shape, tl.int32),) * PARTS
    SEVERAL: tl.constexpr = 8 * STEPS if BLOCK > 0 else AHEAD
    for several in range(0, turns, SEVERAL):
        if (INTEGER or HALVES) and NATIVE and BLOCK == 0:
            leave_inputs(x, mine, places, scale, begin + several, end, K, lanes, ONE, EACH, PARTS, AHEAD, HALVES, KIND)
        for i in range(several, tl.minimum(several + SEVERAL, turns)):
            first = begin + i * APART
            chunk = first + own
            if fetches(BM, PARTS, NATIVE):
                fetch(_asked(weight, size, lanes, first + FETCH * APART, count, BITS, APART))
            then = chunk_words(weight, tl.minimum(chunk + APART, count - 1), size, pair, after, t, BITS, NATIVE)
            some = ()
            if INTEGER or HALVES:
                some = chunk_inputs(
                    integers, x, mine, places, scale, chunk, (i - several) * APART + own, K, lanes,
                    BLOCK, STEPS, ONE, EACH, PARTS, HALVES, KIND, NATIVE,
                )  # fmt: skip
            for side in tl.static_range(2):
                inputs = _operands(some, x, places, scale, where, chunk, side, t, K, PARTS, KIND, CODE, EVEN, NATIVE)
                acc, sums = _side(
                    acc, sums, words, inputs, mask, flip, pairs, side, BITS, WINDOW, CODE, TABLE, PARTS, NATIVE
                )
            words = then
    return acc, sums


@triton.jit(do_not_specialize=("M", "count", "each", "total", "whole", "mask"))
def trellis_kernel(
    x, signs, weight, scales, peaks, pairs, table, bias, out, partial, counters,
    M, N, K, stride, count, each, total, whole, mask,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, LENGTH: tl.constexpr,
    BM: tl.constexpr, APART: tl.constexpr, WARPS: tl.constexpr, CTAS: tl.constexpr, ONE: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    BIAS: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`x` `[M, K]` with rows `stride` apart, `K` and `stride` multiples of 8; `count` chunks of K, of which each warp
    takes APART times `each`; `total` units, `whole` of them of whole sequences. BM: 8 or 16 tokens, 4 of integer codes,
    2 or 4 of `twin`. APART: 2 of a program with 128 rows, whose warps take two chunks at a time, else 1. CTAS: blocks
    of a program, a cluster, each with WARPS warps and a part of K. ONE: M is 1. EVEN: every warp has `each` whole
    chunks. BLOCK: what `x` is rotated in, with `signs`; 1: it is not, but taken as a whole by each warp; 0: nor that.
    STEPS times 8 are a warp's chunks at least. EARLY: see `warp.waited`. NATIVE: not in the interpreter, which has no
    assembler."""
    INTEGER: tl.constexpr = is_integer(CODE)
    KIND: tl.constexpr = "bf16" if x.dtype.element_ty == tl.bfloat16 else "fp16"
    EACH: tl.constexpr = tokens_at_once(CODE)
    PARTS: tl.constexpr = BM // EACH
    AHEAD: tl.constexpr = ahead_of(CODE)
    ROWS: tl.constexpr = 256 // APART
    lanes = tl.arange(0, 32 * WARPS * CTAS)
    g, t = lanes // 4 % 8, lanes % 4
    pair, own = g % (8 // APART), g // (8 // APART)
    part, local = own_part(lanes, WARPS, CTAS)
    warp = local // 32
    turns = each if CTAS > 1 else tl.minimum(each, tl.cdiv(count - part * (each * APART * WARPS), APART))
    begin = (part * WARPS + warp) * (each * APART)
    end = tl.minimum(begin + each * APART, count)
    HELD: tl.constexpr = held_bytes(BM, ONE, CODE, WARPS, APART, STEPS if BLOCK > 0 else 0, AHEAD)
    SUMS: tl.constexpr = 4 * ROWS * (1 if ONE else EACH)
    start = room(lanes, local, HELD, SUMS, CTAS, NATIVE)
    size = total * 16
    zero = lanes * 0
    if fetches(BM, PARTS, NATIVE):
        for ahead in tl.static_range(FETCH):
            fetch(_asked(weight, size, lanes, begin + ahead * APART, count, BITS, APART))
    if EARLY:
        zero = waited(lanes)
    begin += zero
    pair = tl.minimum(tl.program_id(0) * (ROWS // 32) + pair + zero, total // 2 - 1)  # what is not there is not stored
    after = neighbours(pair * 2 + 1, whole, total, LENGTH)
    words = chunk_words(weight, tl.minimum(begin + own, count - 1), size, pair, after, t, BITS, NATIVE, BLOCK > 0)
    mask = tl.full(lanes.shape, 0, tl.uint32) + mask.to(tl.uint32, bitcast=True)
    first = tl.program_id(2) * BM
    integers, places, scale, down, mine = taken(
        x, signs, start, first, M, K, stride, begin, end, each * APART, lanes, warp,
        INTEGER, BLOCK, STEPS, ONE, BM, EACH, AHEAD, KIND, NATIVE,
    )  # fmt: skip
    grid = weight, size, pair, after, count
    scaled = places, scale, integers, mine, places_of(g, CODE)
    acc, sums = _summed(
        x, grid, scaled, words, mask, pairs, begin, end, turns, K, lanes, own,
        BITS, WINDOW, CODE, TABLE, BLOCK, STEPS, WARPS, CTAS, APART, ONE, BM, EVEN, KIND, NATIVE,
    )  # fmt: skip
    if INTEGER:
        sums = carried(sums, lanes, CODE, PARTS, NATIVE)
    leave(
        acc, sums, down, start, (scales, peaks, table, bias), out, partial, tl.program_id(0) * ROWS, first, lanes, part,
        local, M, N, BITS, WINDOW, CODE, LENGTH, PARTS, WARPS, CTAS, APART, HELD, ONE, SPLIT, BIAS, NATIVE,
    )  # fmt: skip
    if SPLIT:
        if is_last(counters):
            TAKEN: tl.constexpr = 1 if ONE else 2 if BM == 2 else 4
            finish(x, scales, peaks, table, bias, out, partial, M, N, BM, TAKEN, ROWS, LENGTH, BIAS)
