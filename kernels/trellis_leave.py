"""What a program of the trellis product has in the end: as its part of K, or scaled and stored; and, of the program
that comes last, the sums of all parts. See `trellis_product.py`.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.shared import get, put_one
from quant.kernels.trellis_decode import carry_of, is_halves, row_of, row_scales
from quant.kernels.trellis_inputs import is_integer
from quant.kernels.uniform import collected, stored
from quant.kernels.warp import shuffled


@triton.constexpr_function
def tokens_at_once(code: str) -> int:
    """Tokens that share a product, whose eight columns are the two bytes of `x`, and of `twin` two sums."""
    return 2 if code == "twin" else 4 if is_integer(code) else 8


@triton.constexpr_function
def products_of(code: str) -> int:
    """Products of a unit with four columns: one for each row, of `twin` for two."""
    return 8 if code == "twin" else 16


@triton.jit
def finish(
    x, scales, peaks, table, bias, out, partial, M, N,
    BM: tl.constexpr, TAKEN: tl.constexpr, LENGTH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The sums of all parts of this tile of the output, in their order, scaled and stored: TAKEN tokens at a time,
    eight parts of them on their way."""
    rows = tl.program_id(0) * 256 + tl.arange(0, 256)
    inside = rows < N
    scale = row_scales(scales, peaks, table, rows, inside, LENGTH)
    token = tl.program_id(2) * BM
    for start in range(token, tl.minimum(token + BM, M), TAKEN):
        tokens = start + tl.arange(0, TAKEN)
        live = tokens < M
        at = tokens[None, :].to(tl.int64) * N + rows[:, None]
        total = collected(partial, at, inside[:, None] & live[None, :], M, N, 8)
        stored(total * scale[:, None], x, bias, out, out, rows, tokens, inside, live, N, False, BIAS, False)


@triton.jit
def carried(sums, lanes, CODE: tl.constexpr, PARTS: tl.constexpr, NATIVE: tl.constexpr):
    """What the two columns of a lane's results carry beside the values: `sums`, each lane's own of the bytes of `x` in
    its column, are of one column where lanes have the same `g`."""
    BASE: tl.constexpr = carry_of(CODE) // 2  # of two bytes: `x` stands in four, of `twin` in two
    at = lanes // 32 * 32 + lanes % 4 * 8
    made = ()
    for part in tl.static_range(PARTS):
        total = sums[part]
        for step in tl.static_range(2):
            total += shuffled(total, lanes ^ (step + 1), NATIVE)
        total = total // 2 * BASE
        made = made + ((shuffled(total, at, NATIVE), shuffled(total, at + 4, NATIVE)),)
    return made


@triton.jit
def _value(mine, sums, down, lanes, HALF: tl.constexpr, TOKEN: tl.constexpr, CODE: tl.constexpr, NATIVE: tl.constexpr):
    """One of a lane's results: of its unit HALF, and of codes that are not integers of its token TOKEN."""
    if is_halves(CODE):
        return (mine[2 * HALF + TOKEN] - sums[TOKEN]) * 16777216.0 * down[TOKEN]
    elif not is_integer(CODE):
        return mine[2 * HALF + TOKEN] * down[TOKEN]
    else:
        upper = (mine[2 * HALF] - sums[0]).to(tl.float32) * 256.0
        lower = (mine[2 * HALF + 1] - sums[1]).to(tl.float32)
        value = upper + lower
        if CODE == "twin":  # a lane has one sum and its neighbour the other
            other = shuffled(value, lanes ^ 1, NATIVE)
            value = other + tl.where(lanes % 2 == 0, value, -value)
        return value * down


PITCH = tl.constexpr(280)
"""Float32 numbers in shared memory from a token's values to the next one's."""


@triton.jit
def place_of(token, row, unit):
    """Where a value of a program's 16 units lies there: lanes that store together want different banks, and so do lanes
    that read 32 rows one after the other."""
    return token * PITCH + row * 17 + unit


@triton.constexpr_function
def held_bytes(bm: int, one: bool, code: str, warps: int, steps: int, ahead: int) -> int:
    """Shared memory of a program: what `x` is multiplied as, of `ahead` chunks of each warp or, rotated here, of
    `steps` times 8 and a number; later the values of a part."""
    integers = ahead * 64 * (1 if one else bm) if is_integer(code) or is_halves(code) else 0
    if steps:
        integers = steps * 512 + 4
    return warps * max(integers, (1 if one else tokens_at_once(code)) * 280 * 4)


@triton.jit
def _kept(
    value, row, token, here, held, out, partial, M, N,
    LENGTH: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Stores values: as this program's part, or, scaled, as the output."""
    at = token.to(tl.int64) * N + row
    if SPLIT:
        tl.store(partial + tl.program_id(1).to(tl.int64) * M * N + at, value, mask=here)
    else:
        scales, peaks, table, bias = held
        value *= row_scales(scales, peaks, table, row, here, LENGTH)
        if BIAS:
            value += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def leave(
    acc, sums, down, start, held, out, partial, begin, first, lanes, M, N,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, LENGTH: tl.constexpr, PARTS: tl.constexpr,
    WARPS: tl.constexpr, ONE: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Adds what the warps have and stores it: 256 rows from `begin` on, tokens from `first` on. Through shared memory,
    from address `start`; the interpreter has none."""
    EACH: tl.constexpr = 1 if ONE else tokens_at_once(CODE)
    STEP: tl.constexpr = EACH * PITCH * 4
    SIZE: tl.constexpr = EACH * 256
    LANES: tl.constexpr = 32 * WARPS
    HELD: tl.constexpr = 1 if is_integer(CODE) or ONE else 2  # tokens of a lane
    for part in tl.static_range(PARTS):
        if NATIVE:
            tl.debug_barrier()
        for j in tl.static_range(products_of(CODE)):
            for half in tl.static_range(2):
                for i in tl.static_range(HELD):
                    value = _value(acc[j * PARTS + part], sums[part], down[part], lanes, half, i, CODE, NATIVE)
                    lane = lanes if NATIVE else tl.arange(0, 32)
                    g, t = lane // 4 % 8, lane % 4
                    unit, row = g + 8 * half, row_of(j, CODE, BITS, WINDOW)
                    token = t // 2 if CODE == "twin" else t if is_integer(CODE) else t * 2 + i
                    if CODE == "twin":
                        row = row + t % 2
                    if NATIVE:
                        place = place_of(0 if ONE else token, row, unit) * 4 + lane // 32 * STEP
                        put_one(start + place.to(tl.uint32), value)
                    else:
                        value = tl.sum(tl.reshape(value, (WARPS, 32)), 0)
                        row, token = begin + unit * 16 + row, first + part * EACH + token
                        _kept(value, row, token, (row < N) & (token < M), held, out, partial, M, N, LENGTH, SPLIT, BIAS)
        if NATIVE:
            tl.debug_barrier()
            for i in tl.static_range(SIZE // LANES if SIZE > LANES else 1):
                place = i * LANES + lanes
                row, token = place % 256, place // 256 % EACH
                at = start + (place_of(token, row % 16, row // 16) * 4).to(tl.uint32)
                value = get(at)
                for w in tl.static_range(1, WARPS):
                    value += get(at + w * STEP)
                row, token = begin + row, first + part * EACH + token
                here = (row < N) & (token < M) & (place < SIZE)
                _kept(value, row, token, here, held, out, partial, M, N, LENGTH, SPLIT, BIAS)
