"""How the trellis product takes `x`: scaled, and as the tensor core's right operand. See `trellis_product.py`."""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.shared import get_four, put, together
from quant.kernels.trellis_decode import is_halves
from quant.kernels.uniform import inverse, larger, power
from quant.kernels.warp import joined, largest_of, load_inputs, numbers, permuted, shuffled

LEVELS = tl.constexpr(32512.0)
"""The largest `x` of an integer code, so that both of its bytes have a sign: `127 * 256`."""


@triton.constexpr_function
def is_integer(code: str) -> bool:
    """Whether the tensor core multiplies bytes."""
    return code in ("mac", "twin", "sum")


@triton.constexpr_function
def ahead_of(code: str) -> int:
    """Chunks of each warp of which `x` is in shared memory at a time."""
    return 8 if is_halves(code) else 16


@triton.jit
def _doubled(number):
    """A float32 as float16, in both halves."""
    half = number.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return half | half << 16


@triton.jit
def operand_x(some, scale, KIND: tl.constexpr, CODE: tl.constexpr, NATIVE: tl.constexpr):
    """Four columns of `x` (two words) as the right operands of a side, of codes that are not integers: four words, of
    `hyb` two."""
    x0, x1 = numbers(some[0], KIND)
    x2, x3 = numbers(some[1], KIND)
    if CODE == "hyb":
        return joined(x0 * scale, x1 * scale, NATIVE), joined(x2 * scale, x3 * scale, NATIVE)
    else:
        return _doubled(x0 * scale), _doubled(x1 * scale), _doubled(x2 * scale), _doubled(x3 * scale)


@triton.jit
def rounded(number, scale):
    """`number scale` to the nearest integer, as two bytes with signs, the higher one times 256: 16 bits."""
    whole = tl.math.fma(number, scale, 12582912.0).to(tl.uint32, bitcast=True)
    return (whole + 128) & 0xFF00 | whole & 0xFF


@triton.jit
def _scaled(words, scale, HALVES: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Four words of two numbers as words of two integers, or HALVES: of two float16."""
    made = ()
    for i in tl.static_range(4):
        low, high = numbers(words[i], KIND)
        if HALVES:
            made = made + (joined(low * scale, high * scale, NATIVE),)
        else:
            made = made + (rounded(low, scale) | rounded(high, scale) << 16,)
    return made


@triton.jit
def places_of(g, CODE: tl.constexpr):
    """Operands of `prmt`: where a lane wants the byte of an integer that is in the lower half of its word, and in the
    upper. A lane with an even `g` has the higher bytes; they stand in four places, of `twin` in two of four."""
    byte = 1 - (g % 2).to(tl.uint32)
    if CODE == "twin":
        first = g // 2 % 2 == 0
        each = tl.where(first, 0x0101, 0x1010).to(tl.uint32)
        lower = tl.where(first, 0x4040, 0x0404).to(tl.uint32) + byte * each
    else:
        each = byte * 0 + 0x1111
        lower = byte * each
    return lower, lower + 2 * each


@triton.jit
def operand_integers(words, FIRST: tl.constexpr, where, NATIVE: tl.constexpr):
    """Four columns of integers, two words from FIRST on, as the right operands of a side: four words."""
    made = ()
    for i in tl.static_range(4):
        made = made + (permuted(words[FIRST + i // 2], 0, where[i % 2], NATIVE),)
    return made


@triton.jit
def leave_inputs(
    x, start, places, scale, chunk, end, K, lanes,
    ONE: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr, HALVES: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Puts what COUNT chunks of `x` are multiplied as into shared memory, 64 bytes for a chunk and a token. Loaded from
    memory chunk by chunk, `x` would come behind the weights that were asked for before it: loads return in order."""
    TURNS: tl.constexpr = 8 if ONE else 8 // EACH
    TOKENS: tl.constexpr = 1 if ONE else EACH * PARTS
    g, t = lanes // 4 % 8, lanes % 4
    together(lanes)
    for part in tl.static_range(PARTS):
        for turn in tl.static_range(COUNT // TURNS):
            mine = turn * TURNS + g % TURNS
            k = (chunk + mine) * 32
            words = load_inputs(x + (places[part] + k), (chunk + mine < end) & (k + t * 8 < K), 4, False, True)
            token = 0 if ONE else part * EACH + g // TURNS
            at = start + ((mine * TOKENS + token) * 64 + t * 16).to(tl.uint32)
            put(at, _scaled(words, scale[part], HALVES, KIND, True))
    together(lanes)


@triton.jit
def inputs_of(
    x, start, place, scale, chunk, which, PART: tl.constexpr, K, lanes,
    ONE: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """What a lane's eight columns of a chunk are multiplied as, which is number `which` in shared memory; four words.
    The interpreter has no shared memory and makes them anew."""
    t = lanes % 4
    if NATIVE:
        TURNS: tl.constexpr = 8 if ONE else 8 // EACH
        TOKENS: tl.constexpr = 1 if ONE else EACH * PARTS
        token = 0 if ONE else PART * EACH + lanes // 4 % 8 // TURNS
        return get_four(start + ((which * TOKENS + token) * 64 + t * 16).to(tl.uint32))
    else:
        words = load_inputs(x + (place + chunk * 32), chunk * 32 + t * 8 < K, 4, False, False)
        return _scaled(words, scale, HALVES, KIND, False)


@triton.jit
def _largest(x, place, begin, end, each, K, lanes, STEP: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """The largest `|x|` of each lane's token in its warp's chunks, NaN if there is one. `place`: the lane's first of 8
    columns of a chunk; STEP lanes, 4, 8, 16 or 32 in a row, share a token and take its chunks in turn. Four loads are
    on their way at a time."""
    largest = tl.zeros(lanes.shape, tl.float32)
    TURNS: tl.constexpr = STEP // 4
    for several in range(0, each, 4 * TURNS):
        words = ()
        for i in tl.static_range(4):
            chunk = begin + several + i * TURNS + lanes % STEP // 4
            here = (chunk < end) & (chunk * 32 + lanes % 4 * 8 < K)
            words = words + load_inputs(x + (place + chunk * 32), here, 4, False, NATIVE)
        largest = larger(largest, words, KIND)
    return largest_of(largest, lanes, 5 if STEP == 32 else 4 if STEP == 16 else 3 if STEP == 8 else 2, NATIVE)


@triton.jit
def tokens_of(
    x, first, M, K, stride, begin, end, each, lanes,
    INTEGER: tl.constexpr, ONE: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Of each part, EACH (2, 4 or 8) tokens from `first` on: where a lane's token has its first eight columns, by what
    `x` is multiplied, and what undoes it for the tokens of a lane's results."""
    g, t, warp = lanes // 4 % 8, lanes % 4, lanes // 32 * 32
    places, scale, down = (), (), ()
    for part in tl.static_range(PARTS):
        token = first + part * EACH + g // (8 // EACH)
        place = tl.minimum(token, M - 1) * stride + t * 8
        places = places + (place,)
        if INTEGER:
            largest = _largest(x, place, begin, end, each, K, lanes, 32 if ONE else 32 // EACH, KIND, NATIVE)
            most = tl.maximum(largest, 2.0**-108)  # or the quotient were infinite
            scale = scale + (tl.where(largest > 0, LEVELS / most, 0.0),)
            down = down + (shuffled(largest * (1 / LEVELS), warp + t * 8, NATIVE),)
        else:
            up = tl.full(lanes.shape, 1.0, tl.float32)
            if KIND == "bf16":
                up = power(_largest(x, place, begin, end, each, K, lanes, 32 if ONE else 4, KIND, NATIVE))
            scale = scale + (up,)
            back = inverse(up)
            down = down + ((shuffled(back, warp + t * 8, NATIVE), shuffled(back, warp + t * 8 + 4, NATIVE)),)
    return places, scale, down
