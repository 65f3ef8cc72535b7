"""How the trellis product takes `x`: scaled, and as the tensor core's right operand. See `trellis_product.py`."""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.uniform import inverse, power
from quant.kernels.warp import load_inputs, numbers, shuffled

LEVELS = tl.constexpr(32512.0)
"""The largest `x` of an integer code, so that both of its bytes have a sign: `127 * 256`."""


@triton.constexpr_function
def is_integer(code: str) -> bool:
    """Whether the tensor core multiplies bytes."""
    return code in ("mac", "twin", "sum")


@triton.jit
def _doubled(number):
    """A float32 as float16, in both halves."""
    half = number.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return half | half << 16


@triton.jit
def _joined(low, high):
    low, high = low.to(tl.float16).to(tl.uint16, bitcast=True), high.to(tl.float16).to(tl.uint16, bitcast=True)
    return low.to(tl.uint32) | high.to(tl.uint32) << 16


@triton.jit
def _byte(number, times, add, right, where, NATIVE: tl.constexpr):
    """One of the two bytes of a float32 as an integer, `number times` to the nearest, plus `add`, shifted `right`: four
    times, or of `twin` in two of four places. `where`: an operand of `prmt`, which says in which."""
    shifted = tl.math.fma(number, times, 12582912.0).to(tl.uint32, bitcast=True) + add >> right
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [shifted, where], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        everywhere = (shifted & 255) * 0x01010101
        return tl.where(where == 0, everywhere, everywhere & tl.where(where == 0x4040, 0x00FF00FF, 0xFF00FF00))


@triton.jit
def operand_x(some, scale, add, right, where, KIND: tl.constexpr, CODE: tl.constexpr, NATIVE: tl.constexpr):
    """Four columns of `x` (two words) as the right operands of a side: four words, of `hyb` two."""
    x0, x1 = numbers(some[0], KIND)
    x2, x3 = numbers(some[1], KIND)
    if is_integer(CODE):
        first = _byte(x0, scale, add, right, where, NATIVE), _byte(x1, scale, add, right, where, NATIVE)
        return first + (_byte(x2, scale, add, right, where, NATIVE), _byte(x3, scale, add, right, where, NATIVE))
    elif CODE == "hyb":
        return _joined(x0 * scale, x1 * scale), _joined(x2 * scale, x3 * scale)
    else:
        return _doubled(x0 * scale), _doubled(x1 * scale), _doubled(x2 * scale), _doubled(x3 * scale)


@triton.jit
def _largest(place, begin, end, K, lanes, STEP: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """The largest `|x|` of each lane's token in these chunks, NaN if there is one. `place`: the lane's first of 8
    columns of a chunk; STEP lanes, 4, 8 or 32 in a row, share a token and take its chunks in turn."""
    largest = tl.zeros((32,), tl.float32)
    turn = lanes % STEP // 4
    for chunk in range(begin, end, STEP // 4):
        k = (chunk + turn) * 32
        words = load_inputs(place + k, (chunk + turn < end) & (k + lanes % 4 * 8 < K), 4, False, NATIVE)
        for i in tl.static_range(4):
            low, high = numbers(words[i], KIND)
            either = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
            largest = tl.maximum(largest, either, propagate_nan=tl.PropagateNan.ALL)
    other = 1
    for _ in tl.static_range(5 if STEP == 32 else 4 if STEP == 16 else 3 if STEP == 8 else 2):
        partner = shuffled(largest, lanes ^ other, NATIVE)
        largest = tl.maximum(largest, partner, propagate_nan=tl.PropagateNan.ALL)
        other *= 2
    return largest


@triton.jit
def tokens_of(
    x, first, M, K, stride, begin, end, lanes,
    INTEGER: tl.constexpr, ONE: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Of each part, EACH (2, 4 or 8) tokens from `first` on: where a lane's token has its first eight columns, by what
    `x` is multiplied, and what undoes it for the tokens of a lane's results."""
    g, t = lanes // 4, lanes % 4
    places, scale, down = (), (), ()
    for part in tl.static_range(PARTS):
        token = first + part * EACH + g // (8 // EACH)
        place = x + tl.minimum(token, M - 1).to(tl.int64) * stride + t * 8
        places = places + (place,)
        if INTEGER:
            largest = _largest(place, begin, end, K, lanes, 32 if ONE else 32 // EACH, KIND, NATIVE)
            most = tl.maximum(largest, 2.0**-108)  # or the quotient were infinite
            scale = scale + (tl.where(largest > 0, LEVELS / most, 0.0),)
            down = down + (shuffled(largest * (1 / LEVELS), t * 8, NATIVE),)
        else:
            up = tl.full((32,), 1.0, tl.float32)
            if KIND == "bf16":
                up = power(_largest(place, begin, end, K, lanes, 32 if ONE else 4, KIND, NATIVE))
            scale = scale + (up,)
            back = inverse(up)
            down = down + ((shuffled(back, t * 8, NATIVE), shuffled(back, t * 8 + 4, NATIVE)),)
    return places, scale, down
