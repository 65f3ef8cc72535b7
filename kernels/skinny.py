"""The Triton kernel that multiplies a few tokens by uniform weights in kernel order (`order.py`): up to 16 at a time.

`out[M, N] = x[M, K] @ W[N, K]^T` where bytes decide. A program is one warp with 16 TILES rows and a part of K, and what
each of its threads holds is written down (`warp.py`): lane `(g, t)` has the rows `2 TILES g` to `2 TILES (g + 1)` of
its part, so that one load gives it their scales, and of a chunk of 32 columns the eight from `8 t` on, 16 bytes of `x`.
A step is the columns of which 16 bytes of a row's plane hold the codes, 256 or (from 4 bits on) 128; the next step's
words are on their way while this one's are multiplied.

No code is shifted into place that can be multiplied where it is: `c 2^k` times `x 2^-k` is `c x`, exactly. In bfloat16
`0x4300 | c << k` is `128 + c 2^k`, for 7 bits of `c << k`; in float16 `c << k` is the subnormal number `c 2^(k-24)`,
here with k up to 2, so that `x` keeps its bits down to 2^-12. So two codes cost one instruction, and one in three (or
two) a shift more. A product with ones gives `sum x 2^-k` in its upper rows and, from `2^k` times that, `sum x` in its
lower ones; with them 128 and zero points come off in float32 where a group ends.

Inputs that are rounded to 8 bits (`integer.py`) come as float16: their codes, and all sums of their products with codes
of a weight, are exact in it, so this is the product of integers, and few tokens are too few for integers to be faster.

Up to four tokens go to every second column of the product, so half of what a lane accumulates is left out. Splits of K
are gathered as in `uniform.py`.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RUF005, SIM102
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.skinny_words import codes_of, exponent, high_codes_of, step_words
from quant.kernels.uniform import collected, is_last, stored
from quant.kernels.warp import halved, load_inputs, load_words, nothing, numbers, product


@triton.jit
def _inputs(some, R: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """The operand of `x` for columns `4 R` to `4 R + 3` of each lane's eight."""
    b0 = halved(some[2 * R], exponent(CHUNK, 2 * R, BITS, KIND), KIND, NATIVE)
    return b0, halved(some[2 * R + 1], exponent(CHUNK, 2 * R + 1, BITS, KIND), KIND, NATIVE)


@triton.jit
def _one(mask, TIMES: tl.constexpr, KIND: tl.constexpr):
    """2^TIMES in both halves."""
    return mask * ((0x3F80 + TIMES * 0x80) if KIND == "bf16" else (0x3C00 + TIMES * 0x400))


@triton.jit
def _step(
    words, mask, some, dots, sums, CHUNK: tl.constexpr, R: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The products of 16 columns of a chunk, with ones and with all rows."""
    WORDS: tl.constexpr = BITS if BITS >= 4 else 2 * BITS
    one = _one(mask, 0, KIND)
    up0 = _one(mask, exponent(CHUNK, 2 * R, BITS, KIND), KIND)
    up1 = _one(mask, exponent(CHUNK, 2 * R + 1, BITS, KIND), KIND)
    fresh, added = (), ()
    for part in tl.static_range(PARTS):
        b = _inputs(some[part], R, CHUNK, BITS, KIND, NATIVE)
        added = added + (product(one, up0, one, up1, b[0], b[1], sums[part], KIND, NATIVE),)
    for tile in tl.static_range(TILES):
        a0 = codes_of(words, mask, 2 * tile * WORDS, CHUNK, 2 * R, BITS, KIND, NATIVE)
        a1 = codes_of(words, mask, 2 * tile * WORDS + WORDS, CHUNK, 2 * R, BITS, KIND, NATIVE)
        a2 = codes_of(words, mask, 2 * tile * WORDS, CHUNK, 2 * R + 1, BITS, KIND, NATIVE)
        a3 = codes_of(words, mask, 2 * tile * WORDS + WORDS, CHUNK, 2 * R + 1, BITS, KIND, NATIVE)
        for part in tl.static_range(PARTS):
            b = _inputs(some[part], R, CHUNK, BITS, KIND, NATIVE)
            made = product(a0, a1, a2, a3, b[0], b[1], dots[tile * PARTS + part], KIND, NATIVE)
            if BITS == 8 and KIND == "bf16":
                a4 = high_codes_of(words, mask, 2 * tile * WORDS, CHUNK, 2 * R, NATIVE)
                a5 = high_codes_of(words, mask, 2 * tile * WORDS + WORDS, CHUNK, 2 * R, NATIVE)
                a6 = high_codes_of(words, mask, 2 * tile * WORDS, CHUNK, 2 * R + 1, NATIVE)
                a7 = high_codes_of(words, mask, 2 * tile * WORDS + WORDS, CHUNK, 2 * R + 1, NATIVE)
                made = product(a4, a5, a6, a7, b[0], b[1], made, KIND, NATIVE)
            fresh = fresh + (made,)
    return fresh, added


@triton.jit
def _scales(at, COUNT: tl.constexpr, NATIVE: tl.constexpr):
    """2 COUNT neighbours, 16-bit numbers from pointers `at` on, as float32, a tensor each. COUNT: 2 or 4."""
    KIND: tl.constexpr = "bf16" if at.dtype.element_ty == tl.bfloat16 else "fp16"
    found = ()
    words = load_inputs(at, True, COUNT, True, NATIVE)
    for i in tl.static_range(COUNT):
        found = found + numbers(words[i], KIND)
    return found


@triton.jit
def _zeros(at, COUNT: tl.constexpr, NATIVE: tl.constexpr):
    """The same of bytes."""
    found = ()
    if NATIVE:
        words = load_words(at, COUNT // 2, False, NATIVE)
        for i in tl.static_range(2 * COUNT):
            number = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [words[i // 4], 0x4B000000, 0x7650 + i % 4], dtype=tl.uint32,
                is_pure=True, pack=1,
            )  # fmt: skip
            found = found + (number.to(tl.float32, bitcast=True) - 8388608.0,)
    else:
        for i in tl.static_range(2 * COUNT):
            found = found + (tl.load(at + i).to(tl.float32),)
    return found


@triton.jit
def _flush(
    acc, dots, sums, grids, group, N, row,
    ZERO: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
    EACH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Adds a group's products, with its scale on them and its zero point off."""
    scales, zeros = grids
    at = group * N + row
    scale = _scales(scales + at, TILES, NATIVE)
    if ZERO < 0:
        zero = _zeros(zeros + at, TILES, NATIVE)
    fresh = ()
    for tile in tl.static_range(TILES):
        for h in tl.static_range(2):
            for part in tl.static_range(PARTS):
                for i in tl.static_range(EACH):
                    value = dots[tile * PARTS + part][2 * h + i] * UNIT
                    if BASE > 0:
                        value -= BASE * sums[part][i]
                    if ZERO < 0:
                        value -= zero[2 * tile + h] * sums[part][2 + i]
                    else:
                        value -= ZERO * sums[part][2 + i]
                    old = acc[((2 * tile + h) * PARTS + part) * EACH + i]
                    fresh = fresh + (old + value * scale[2 * tile + h],)
    return fresh


@triton.jit(do_not_specialize=("M", "count", "each", "mask"))  # or 1 and multiples of 16 would be compiled once more
def skinny_kernel(
    x, x_scale, weight, scales, zeros, bias, residual, out, partial, counters,
    M, N, K, stride, count, each, mask,
    BITS: tl.constexpr, GROUP: tl.constexpr, FLUSH: tl.constexpr, ZERO: tl.constexpr, KIND: tl.constexpr,
    BM: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, ROUNDED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`x` `[M, K]` with rows `stride` apart, `K` and `stride` multiples of 8; `count` steps of K, `each` of them per
    split. BM: 4, 8 or 16 tokens; TILES: 2 or 4. `N` a multiple of 8. GROUP columns share a scale (0: all of them);
    FLUSH: columns after which a group may end. ROUNDED: `x` are codes whose tokens have scales `x_scale`, float32.
    `mask`: 0x00010001, an argument since an instruction holds one constant, and of two the assembler would load one
    again for each."""
    PARTS: tl.constexpr = 2 if BM == 16 else 1
    EACH: tl.constexpr = 1 if BM == 4 else 2
    HALVES: tl.constexpr = 2 if BITS >= 4 else 1
    CHUNKS: tl.constexpr = 8 // HALVES
    SPAN: tl.constexpr = FLUSH if FLUSH < 32 * CHUNKS else 32 * CHUNKS
    UNIT: tl.constexpr = 16777216.0 if KIND == "fp16" else 1.0
    BASE: tl.constexpr = (2176.0 if BITS == 8 else 128.0) if KIND == "bf16" else 0.0
    mask = tl.full((32,), 0, tl.uint32) + mask.to(tl.uint32)
    lanes = tl.arange(0, 32)
    g, t = lanes // 4, lanes % 4
    row = tl.program_id(0) * (16 * TILES) + g * (2 * TILES)
    inside = row < N
    row = tl.minimum(row, N - 2 * TILES)  # what is not there is computed again, and not stored
    token = tl.program_id(2) * BM + (g // 2 if BM == 4 else g)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, count)
    places = ()
    for part in tl.static_range(PARTS):
        places = places + (x + tl.minimum(token + part * 8, M - 1).to(tl.int64) * stride + t * 8,)
    acc = (tl.zeros((32,), tl.float32),) * (2 * TILES * PARTS * EACH)
    dots, sums = nothing(TILES * PARTS, False), nothing(PARTS, False)
    words = step_words(weight, begin, N, row, t, BITS, 2 * TILES, NATIVE)
    for step in range(begin, end):
        then = step_words(weight, tl.minimum(step + 1, count - 1), N, row, t, BITS, 2 * TILES, NATIVE)
        for chunk in tl.static_range(CHUNKS):
            k = step * (256 // HALVES) + chunk * 32
            some = ()
            for part in tl.static_range(PARTS):
                some = some + (load_inputs(places[part] + k, k + t * 8 < K, 4, EVEN, NATIVE),)
            for r in tl.static_range(2):
                dots, sums = _step(words, mask, some, dots, sums, chunk, r, BITS, KIND, TILES, PARTS, NATIVE)
            if (chunk * 32 + 32) % SPAN == 0:
                group = 0
                if GROUP > 0:
                    group = tl.minimum((k + 32 - SPAN) // GROUP, (K - 1) // GROUP)
                acc = _flush(
                    acc, dots, sums, (scales, zeros), group, N, row, ZERO, BASE, UNIT, TILES, PARTS, EACH, NATIVE
                )
                dots, sums = nothing(TILES * PARTS, False), nothing(PARTS, False)
        words = then
    token = tl.program_id(2) * BM + (t if BM == 4 else t * 2)
    _leave(
        acc, x_scale, bias, residual, out, partial, row, inside, token, M, N,
        TILES, PARTS, EACH, SPLIT, ROUNDED, BIAS, RESIDUAL,
    )  # fmt: skip
    if SPLIT:
        if is_last(counters):
            _finish(x_scale, bias, residual, out, partial, M, N, 16 * TILES, BM, ROUNDED, BIAS, RESIDUAL)


@triton.jit
def _leave(
    acc, x_scale, bias, residual, out, partial, row, inside, token, M, N,
    TILES: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr, SPLIT: tl.constexpr, ROUNDED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Stores what a lane has: as this program's part, or as the output."""
    for index in tl.static_range(2 * TILES * PARTS * EACH):
        mine = token + index // EACH % PARTS * 8 + index % EACH
        at = mine.to(tl.int64) * N + row + index // (PARTS * EACH)
        here = inside & (mine < M)
        value = acc[index]
        if SPLIT:
            tl.store(partial + tl.program_id(1).to(tl.int64) * M * N + at, value, mask=here)
        else:
            if ROUNDED:
                value *= tl.load(x_scale + mine, mask=here, other=0.0)
            if BIAS:
                value += tl.load(bias + row + index // (PARTS * EACH)).to(tl.float32)
            if RESIDUAL:
                value += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
            tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _finish(
    x_scale, bias, residual, out, partial, M, N,
    BN: tl.constexpr, BM: tl.constexpr, ROUNDED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The sum of all parts of this tile of the output, stored."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    inside, live = rows < N, tokens < M
    at = tokens[None, :].to(tl.int64) * N + rows[:, None]
    total = collected(partial, at, inside[:, None] & live[None, :], M, N, 4)
    stored(total, x_scale, bias, residual, out, rows, tokens, inside, live, N, ROUNDED, BIAS, RESIDUAL)
