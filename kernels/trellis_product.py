"""The Triton kernels that multiply by trellis weights in kernel order (`trellis_order.py`), and that decode them.

`out[M, N] = x[M, K] @ W[N, K]^T` for few tokens: each program has 16 units, 256 rows, and a part of K, and decodes its
weights once per BM tokens. The states of one row of every unit, `[units, columns]`, are an operand of a tensor core as
they are: 16 accumulators, one per row of a unit, and no value ever changes its thread.

A state is two shifts away from its register, and a value three or four instructions from its state (SASS, sm_90):

    inst   one multiply-add, one mask, and there lie two float16: the halves of one weight, side by side like two
           columns. They stay apart, each is multiplied by the same `x`, and the tensor core adds them, in float32. So
           the sum is not rounded to float16 as the table's is: up to `2^-11 |value|` apart, which tolerances include.
    mac    one multiply-add and one sum of four bytes (dp4a), an integer from 0 to 1020: the float16 of those bits is
           the subnormal number `integer 2^-24`. Two are put into a register
    sum    the same with a mask before the sum; 0 to 252
    hyb    one multiply-add, two for the place in the table, one lookup of 4 bytes, in a table of 2 KB that stays in the
           first-level cache, and one for the sign, for two weights: two rows' values lie side by side

What integers carry beside the value, 510 or 126, comes off at the end, times the sum of `x`; the scale of a row comes
on there too. The left shift is written as a multiplication: shifts and masks share one half of a multiprocessor's
units, and integer products go to the other. The first mask of `inst` is an argument and the second a product with it;
an instruction holds one constant, and the assembler would load the other again and again.

The tensor core takes float16 only. A bfloat16 `x` is scaled by a power of two, per token and program, so that the
largest is between 2^14 and 2^15; that is exact for all that are not `2^29` times smaller.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005, SIM108
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.trellis_decode import FLIP, load_streams, neighbours, row_scales, row_words
from quant.kernels.uniform import collected, is_last, leave, power, stored

PAIRS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8))
"""How the compiler wants `inst`'s operands: two registers of a lane side by side before Triton 3.8 (`kWidth = 4` where
operands are joined), one since. The other order is right too, but takes more instructions for `inst` of 2 bits: 3235
instead of 2451 with Triton 3.7, 3571 instead of 3179 with 3.6, which shuffles words of its loads all the same."""


@triton.jit
def _operand(word, BU: tl.constexpr, CODE: tl.constexpr):
    """Words as float16 `[BU, 32]` (`inst`, columns twice) or `[BU, 16]`, in the order of `_inputs`: four neighbouring
    columns of a thread are in four registers of the tensor core's operand, or the halves of two."""
    low = word.to(tl.uint16).to(tl.float16, bitcast=True)
    if CODE == "inst":
        both = tl.join(low, (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True))
        if PAIRS:
            both = tl.permute(both, (0, 2, 1, 3, 4))
        else:
            both = tl.permute(both, (0, 2, 3, 1, 4))
        return tl.reshape(both, (BU, 32))
    else:
        return tl.reshape(tl.permute(low, (0, 2, 1, 3)), (BU, 16))


@triton.jit
def _inputs(some, BM: tl.constexpr, CODE: tl.constexpr):
    """`x` `[4 lanes, 4, BM]` in the order of `_operand`."""
    if CODE == "inst":
        both = tl.join(some, some)
        if PAIRS:
            both = tl.permute(tl.reshape(both, (4, 2, 2, BM, 2)), (1, 0, 2, 4, 3))
        else:
            both = tl.permute(both, (1, 0, 3, 2))
        return tl.reshape(both, (32, BM))
    else:
        return tl.reshape(tl.permute(tl.reshape(some, (4, 2, 2, BM)), (1, 0, 2, 3)), (16, BM))


@triton.jit
def _one(parts, COUNT: tl.constexpr):
    """COUNT tensors as one, their number the last dimensions, all of size 2, highest bit first."""
    if COUNT == 1:
        return parts[0]
    else:
        half = ()
        for j in tl.static_range(COUNT // 2):
            half = half + (tl.join(parts[j], parts[j + COUNT // 2]),)
        return _one(half, COUNT // 2)


@triton.jit
def _rows(acc, sums, up, FIRST: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr, CODE: tl.constexpr):
    """Rows FIRST to FIRST + 8 of all units, `[BU * 8, BM]`, but for their scales."""
    parts = ()
    for j in tl.static_range(8):
        parts = parts + (acc[FIRST + j],)
    product = tl.reshape(tl.permute(_one(parts, 8), (0, 2, 3, 4, 1)), (BU * 8, BM))
    if CODE == "mac" or CODE == "sum":
        BASE: tl.constexpr = 510.0 if CODE == "mac" else 126.0
        product = product * 16777216.0 - BASE * sums[None, :]
    down = ((254 << 23) - up.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # 1 / up
    return product * down[None, :]


@triton.jit
def _places(FIRST: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr, M, N):
    """Of `_rows`: rows, tokens, where they are in the output, and which of them there are."""
    count = tl.arange(0, BU * 8)
    rows = (tl.program_id(0) * BU + count // 8) * 16 + FIRST + count % 8
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    return rows, tokens, tokens[None, :].to(tl.int64) * N + rows[:, None], (rows < N)[:, None] & (tokens < M)[None, :]


@triton.jit
def _upscale(places, columns, begin, end, K, live, BM: tl.constexpr):
    """A power of two per token, `[BM]`, that puts the largest `x` between 2^14 and 2^15."""
    largest = tl.zeros((4, 4, BM), tl.float32)
    for chunk in range(begin, end):
        for side in tl.static_range(2):
            k = chunk * 32 + side * 4
            some = tl.load(places + k, mask=live[None, None, :] & (k + columns < K), other=0.0)
            largest = tl.maximum(largest, tl.abs(some.to(tl.float32)))
    return power(tl.max(tl.max(largest, 0), 0))


@triton.jit(do_not_specialize=("M", "count", "each", "total", "whole", "mask"))
def trellis_kernel(
    x, weight, scales, peaks, pairs, table, bias, out, partial, counters,
    M, N, K, stride, count, each, total, whole, mask,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, LENGTH: tl.constexpr,
    BM: tl.constexpr, BU: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`x` `[M, K]` with rows `stride` apart; `count` chunks of K, `each` of them per split; `total` units, `whole` of
    them of whole sequences. NATIVE: not in the interpreter, which has no assembler."""
    units = tl.program_id(0) * BU + tl.arange(0, BU)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, count)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    live, inside = tokens < M, units * 16 < N
    after = neighbours(units, whole, LENGTH)
    size = total * 16
    mask = mask.to(tl.uint32, bitcast=True)
    flip = mask * FLIP
    columns = tl.arange(0, 4)[:, None, None] * 8 + tl.arange(0, 4)[None, :, None]
    places = x + tl.program_id(2).to(tl.int64) * BM * stride + (tl.arange(0, BM)[None, None, :] * stride + columns)
    SCALED: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    up = tl.full((BM,), 1.0, tl.float32)
    if SCALED:
        up = _upscale(places, columns, begin, end, K, live, BM)
    sums = tl.zeros((4, 4, BM), tl.float32)
    acc = ()
    for _ in tl.static_range(16):
        acc = acc + (tl.zeros((BU, BM), tl.float32),)
    for chunk in range(begin, end):
        start = tl.cast(chunk, tl.int64) * (BITS * size)
        for side in tl.static_range(2):
            k = chunk * 32 + side * 4
            here = live[None, None, :] if EVEN else live[None, None, :] & (k + columns < K)
            some = tl.load(places + k, mask=here, other=0.0)
            if SCALED:
                some = (some.to(tl.float32) * up[None, None, :]).to(tl.float16)
            if CODE == "mac" or CODE == "sum":
                sums += some.to(tl.float32)
            inputs = _inputs(some, BM, CODE)
            streams = load_streams(weight, start, size, units, after, inside, side, BITS)
            fresh, word = (), mask
            for j in tl.static_range(16):
                word = row_words(word, streams, mask, flip, pairs, j, BITS, WINDOW, CODE, TABLE, NATIVE)
                fresh = fresh + (tl.dot(_operand(word, BU, CODE), inputs, acc[j], out_dtype=tl.float32),)
            acc = fresh
    total_x = tl.sum(tl.sum(sums, 0), 0)
    last = not SPLIT
    if SPLIT:
        for part in tl.static_range(2):  # half of the rows at a time: registers
            rows, tokens, at, here = _places(part * 8, BM, BU, M, N)
            leave(_rows(acc, total_x, up, part * 8, BM, BU, CODE), partial, at, here, M, N)
        last = is_last(counters)
    if last:
        for part in tl.static_range(2):
            rows, tokens, at, here = _places(part * 8, BM, BU, M, N)
            if SPLIT:
                product = collected(partial, at, here, M, N)
            else:
                product = _rows(acc, total_x, up, part * 8, BM, BU, CODE)
            product *= row_scales(scales, peaks, table, rows, rows < N, LENGTH)[:, None]
            stored(product, x, bias, out, out, rows, tokens, rows < N, tokens < M, N, False, BIAS, False)
