"""What a program of the trellis product has in the end: as its part of K, or scaled and stored; and, of the program
that comes last, the sums of all parts. See `trellis_product.py`.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.cluster import exchanged, leave_number, planned
from quant.kernels.shared import added_up, put_one, put_some
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
    BM: tl.constexpr, TAKEN: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The sums of all parts of this tile of the output, in their order, scaled and stored: TAKEN tokens at a time,
    eight parts of them on their way."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
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
def _value(mine, sums, down, HALF: tl.constexpr, TOKEN: tl.constexpr, CODE: tl.constexpr):
    """One of a lane's results: of its unit HALF, and of codes that are not integers of its token TOKEN."""
    if is_halves(CODE):
        return (mine[2 * HALF + TOKEN] - sums[TOKEN]) * 16777216.0 * down[TOKEN]
    elif not is_integer(CODE):
        return mine[2 * HALF + TOKEN] * down[TOKEN]
    else:
        upper = (mine[2 * HALF] - sums[0]).to(tl.float32) * 256.0
        lower = (mine[2 * HALF + 1] - sums[1]).to(tl.float32)
        return (upper + lower) * down


@triton.jit
def _paired(value, lanes, NATIVE: tl.constexpr):
    """Of `twin`, whose rows are the sum and the difference of two sums: one lies in an even lane, one in the next."""
    return shuffled(value, lanes ^ 1, NATIVE) + tl.where(lanes % 2 == 0, value, -value)


PITCH = tl.constexpr(280)
"""Float32 numbers in shared memory from a token's values to the next one's."""


@triton.jit
def place_of(token, row, unit):
    """Where a value of a program's 16 units lies there: lanes that store together want different banks, and so do lanes
    that read 32 rows one after the other."""
    return token * PITCH + row * 17 + unit


@triton.constexpr_function
def held_bytes(bm: int, one: bool, code: str, warps: int, apart: int, steps: int, ahead: int) -> int:
    """Shared memory of a block: what `x` is multiplied as, of `ahead` chunks of each warp or, rotated here, of
    `steps` times 8; later the values of a part."""
    integers = ahead * 64 * (1 if one else bm) if is_integer(code) or is_halves(code) else 0
    if steps:
        integers = steps * 512
    return warps * max(integers, (apart if one else tokens_at_once(code)) * 280 * 4)


@triton.jit
def _kept(
    value, held, scale, row, token, here, out, partial, M, N,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, CTAS: tl.constexpr,
):  # fmt: skip
    """Stores values: as this program's part, or, scaled, as the output."""
    at = token.to(tl.int64) * N + row
    if SPLIT:
        tl.store(partial + tl.program_id(1).to(tl.int64) * M * N + at, value, mask=here)
    else:
        value *= scale
        if BIAS:
            value += tl.load(held[3] + row, mask=here, other=0.0).to(tl.float32)
        leave_number(out + at, value, here, CTAS)


@triton.jit
def _scale(held, row, here, LENGTH: tl.constexpr, SPLIT: tl.constexpr):
    """What `_kept` multiplies by. Asked for before it is wanted: it is two loads, one after the other."""
    if SPLIT:
        return 1.0
    else:
        return row_scales(held[0], held[1], held[2], row, here, LENGTH)


@triton.jit
def _place(t, ROW: tl.constexpr, NUMBER: tl.constexpr, CODE: tl.constexpr):
    """Row of its unit and token of a lane's value: NUMBER of those of product ROW."""
    if CODE == "twin":
        return ROW + t % 2, t // 2
    else:
        return ROW, t if is_integer(CODE) else t * 2 + NUMBER


@triton.jit
def _put(
    start, value, HALF: tl.constexpr, ROW: tl.constexpr, NUMBER: tl.constexpr, local, CODE: tl.constexpr,
    APART: tl.constexpr, ONE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Puts a value of each lane where its warp's lie; of two chunks at a time into the memory of its chunk, where it is
    of one."""
    g, t = local // 4 % 8, local % 4
    row, token = _place(t, ROW, NUMBER, CODE)
    at = place_of(0 if ONE else token, row, 2 * (g % (8 // APART)) + HALF) * 4
    if APART == 1:
        put_one(start + (at + local // 32 * STEP).to(tl.uint32), value)
    else:
        put_some(start + (at + (local // 32 * 2 + g // 4) * STEP).to(tl.uint32), value, g // 4 == t // 2)


@triton.jit
def _of_all(
    value, ROW: tl.constexpr, NUMBER: tl.constexpr, CODE: tl.constexpr, APART: tl.constexpr, WARPS: tl.constexpr
):
    """The same for the interpreter: the sums of all warps, for one of them, with rows and tokens (more than there are
    where there is no sum)."""
    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    value = tl.sum(tl.reshape(value, (WARPS, 32)), 0)
    row, token = _place(t, ROW, NUMBER, CODE)
    if APART == 2:
        value = tl.where(g // 4 == t // 2, value, 0.0)
        value += tl.gather(value, lane ^ 18, 0)
        token = g // 4 + t // 2
    if CODE == "twin":
        value = _paired(value, lane, False)
    return value, row, token


@triton.jit
def leave(
    acc, sums, down, start, held, out, partial, begin, first, lanes, mine, local, M, N,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, LENGTH: tl.constexpr, PARTS: tl.constexpr,
    WARPS: tl.constexpr, CTAS: tl.constexpr, APART: tl.constexpr, SUMS: tl.constexpr, ONE: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Adds what the warps have and stores it: the program's rows from `begin` on, tokens from `first` on. Through
    shared memory, from address `start`; the interpreter has none. Each of CTAS blocks, of which this is number `mine`,
    puts what its warps have into that of the block that stores it, SUMS bytes further on. Of two chunks at a time
    (APART) a lane's results are of its own chunk in two of the four columns `t`, and of nothing in the others."""
    EACH: tl.constexpr = 1 if ONE else tokens_at_once(CODE)
    TWIN: tl.constexpr = CODE == "twin"
    ROWS: tl.constexpr = 256 // APART
    STEP: tl.constexpr = EACH * PITCH * 4
    SIZE: tl.constexpr = EACH * ROWS
    OWN: tl.constexpr = SIZE // CTAS  # places that a block stores
    LANES: tl.constexpr = 32 * WARPS
    HELD: tl.constexpr = 1 if is_integer(CODE) or ONE else 2  # tokens of a lane
    own = mine * OWN if CTAS > 1 else 0
    tl.static_assert(CTAS == 1 or (PARTS == 1 and not SPLIT))
    tl.static_assert(APART == 1 or (ONE and TWIN))
    for part in tl.static_range(PARTS):
        if NATIVE:
            tl.debug_barrier()
            scales = ()
            for i in tl.static_range(-(-OWN // LANES)):
                place = i * LANES + local
                row = begin + (own + place) % ROWS
                scales = scales + (_scale(held, row, (row < N) & (place < OWN), LENGTH, SPLIT),)
        for j in tl.static_range(products_of(CODE)):
            for half in tl.static_range(2):
                for i in tl.static_range(HELD):
                    value = _value(acc[j * PARTS + part], sums[part], down[part], half, i, CODE)
                    row = row_of(j, CODE, BITS, WINDOW)
                    if NATIVE:
                        _put(start, value, half, row, i, local, CODE, APART, ONE, STEP)
                    else:
                        value, row, token = _of_all(value, row, i, CODE, APART, WARPS * CTAS)
                        unit = 2 * (tl.arange(0, 32) // 4 % (8 // APART)) + half
                        row, token = begin + unit * 16 + row, first + part * EACH + token
                        here = (row < N) & (token < M)
                        scale = _scale(held, row, here, LENGTH, SPLIT)
                        _kept(value, held, scale, row, token, here, out, partial, M, N, SPLIT, BIAS, 1)
        if NATIVE:
            tl.debug_barrier()
            made = ()
            for i in tl.static_range(-(-SIZE // LANES)):
                place = i * LANES + local
                at = place_of(place // ROWS % EACH, place % 16, place % ROWS // 16) * 4
                made = made + (added_up(start + at.to(tl.uint32), STEP, WARPS * APART),)
            if CTAS > 1:
                planned(partial, M)
                made = exchanged(made, start + SUMS, mine, local, LANES, SIZE, CTAS)
            for i in tl.static_range(len(made)):
                value, place = made[i], i * LANES + local
                if TWIN:
                    value = _paired(value, local, True)
                row, token = begin + (own + place) % ROWS, first + part * EACH + (own + place) // ROWS
                here = (row < N) & (token < M) & (place < OWN)
                _kept(value, held, scales[i], row, token, here, out, partial, M, N, SPLIT, BIAS, CTAS)
