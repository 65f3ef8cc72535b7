"""What a program of the trellis product has in the end: as its part of K, or scaled and stored; and, of the program
that comes last, the sums of all parts. See `trellis_product.py`.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.trellis_decode import row_scales, state_at
from quant.kernels.trellis_inputs import is_integer
from quant.kernels.uniform import collected, stored
from quant.kernels.warp import shuffled


@triton.constexpr_function
def tokens_at_once(code: str) -> int:
    """Tokens that share a product, whose eight columns are the two bytes of `x`, and of `twin` two sums."""
    return 2 if code == "twin" else 4 if is_integer(code) else 8


@triton.constexpr_function
def products_of(code: str) -> int:
    """Products of a unit with four columns: one for each state, of `hyb` for each row."""
    return 8 if code == "twin" else 16


@triton.jit
def finish(
    x, scales, peaks, table, bias, out, partial, M, N,
    BM: tl.constexpr, TAKEN: tl.constexpr, AHEAD: tl.constexpr, LENGTH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The sums of all parts of this tile of the output, in their order, scaled and stored: TAKEN tokens at a time,
    AHEAD parts of them on their way."""
    rows = tl.program_id(0) * 256 + tl.arange(0, 256)
    inside = rows < N
    scale = row_scales(scales, peaks, table, rows, inside, LENGTH)
    token = tl.program_id(2) * BM
    for start in range(token, tl.minimum(token + BM, M), TAKEN):
        tokens = start + tl.arange(0, TAKEN)
        live = tokens < M
        at = tokens[None, :].to(tl.int64) * N + rows[:, None]
        total = collected(partial, at, inside[:, None] & live[None, :], M, N, AHEAD)
        stored(total * scale[:, None], x, bias, out, out, rows, tokens, inside, live, N, False, BIAS, False)


@triton.jit
def carried(sums, t, CODE: tl.constexpr, PARTS: tl.constexpr, NATIVE: tl.constexpr):
    """What the two columns of a lane's results carry beside the values: `sums`, each lane's own of the bytes of `x` in
    its column, are of one column where lanes have the same `g`."""
    BASE: tl.constexpr = (126 if CODE == "sum" else 510) // 2  # of two bytes: `x` stands in four, of `twin` in two
    made = ()
    for part in tl.static_range(PARTS):
        total = sums[part]
        for step in tl.static_range(2):
            total += shuffled(total, tl.arange(0, 32) ^ (step + 1), NATIVE)
        total = total // 2 * BASE
        made = made + ((shuffled(total, t * 8, NATIVE), shuffled(total, t * 8 + 4, NATIVE)),)
    return made


@triton.jit
def leave(
    acc, sums, down, held, out, partial, unit, first, t, M, N,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, LENGTH: tl.constexpr, PARTS: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Stores what a lane has: as this program's part, or, scaled, as the output."""
    INTEGER: tl.constexpr = is_integer(CODE)
    EACH: tl.constexpr = tokens_at_once(CODE)
    scales, peaks, table, bias = held
    for j in tl.static_range(products_of(CODE)):
        for half in tl.static_range(2):
            row = (unit + 8 * half) * 16 + state_at(j, CODE, BITS, WINDOW) * (16 // products_of(CODE))
            if CODE == "twin":
                row = row + t % 2
            inside = row < N
            if not SPLIT:
                row_scale = row_scales(scales, peaks, table, row, inside, LENGTH)
                if BIAS:
                    more = tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
            for part in tl.static_range(PARTS):
                for i in tl.static_range(1 if INTEGER else 2):
                    mine = acc[j * PARTS + part]
                    token = first + part * EACH + (t // 2 if CODE == "twin" else t if INTEGER else t * 2 + i)
                    if INTEGER:
                        upper = (mine[2 * half] - sums[part][0]).to(tl.float32) * 256.0
                        lower = (mine[2 * half + 1] - sums[part][1]).to(tl.float32)
                        value = upper + lower
                        if CODE == "twin":  # a lane has one sum and its neighbour the other
                            other = shuffled(value, tl.arange(0, 32) ^ 1, NATIVE)
                            value = other + tl.where(t % 2 == 0, value, -value)
                        value *= down[part]
                    else:
                        value = mine[2 * half + i] * down[part][i]
                    at = token.to(tl.int64) * N + row
                    here = inside & (token < M)
                    if SPLIT:
                        tl.store(partial + tl.program_id(1).to(tl.int64) * M * N + at, value, mask=here)
                    else:
                        value *= row_scale
                        if BIAS:
                            value += more
                        tl.store(out + at, value.to(out.dtype.element_ty), mask=here)
