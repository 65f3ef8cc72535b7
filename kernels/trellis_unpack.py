"""The Triton kernel that decodes a trellis weight in kernel order (`trellis_order.py`), for many tokens."""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.trellis_decode import FLIP, neighbours, pieces, row_scales, row_words, streams_of, value_of
from quant.kernels.warp import load_words


@triton.jit
def _number(word, ODD: tl.constexpr, CODE: tl.constexpr, NATIVE: tl.constexpr):
    """The value of one of `row_words`, float32; ODD: of a row with an odd number."""
    if CODE == "hyb":
        return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif CODE == "inst":
        low = word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return (low + high).to(tl.float16).to(tl.float32)
    else:
        return value_of(word, ODD, 0, CODE, NATIVE).to(tl.float32)


@triton.jit(do_not_specialize=("first", "stop", "total", "whole", "mask", "count"))
def decode_kernel(
    weight, scales, peaks, pairs, table, out, first, stop, K, total, whole, mask, count,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, LENGTH: tl.constexpr,
    EACH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`out` `[stop - first, K]`: these rows of the weight, as `PackedTrellis.dequantize` gives them bit for bit; a warp
    per 8 units and EACH of the `count` chunks, those of the same units one after the other, so that what is stored at a
    time lies together. Lane `(g, t)` (`warp.py`) has unit `g`, and of a chunk the eight columns from `8 t` on, which it
    stores together."""
    lanes = tl.arange(0, 32)
    g, t = lanes // 4, lanes % 4
    parts = tl.cdiv(count, EACH)
    unit = first // 16 + tl.program_id(0) // parts * 8 + g
    held = tl.minimum(unit, total - 1)  # what is not there is not stored
    after = neighbours(held, whole, total, LENGTH)
    size = total * 16
    mask = tl.full((32,), 0, tl.uint32) + mask.to(tl.uint32, bitcast=True)
    flip = mask * FLIP
    known = ()
    for j in tl.static_range(16):
        row = unit * 16 + j
        known = known + (row_scales(scales, peaks, table, row, (row >= first) & (row < stop), LENGTH),)
    begin = tl.program_id(0) % parts * EACH
    for chunk in range(begin, tl.minimum(begin + EACH, count)):
        start = weight + tl.cast(chunk, tl.int64) * (BITS * size)
        streams, words = (), (mask,) * 8
        for side in tl.static_range(2):
            mine = pieces(start + held * 16 + t * 4, size, BITS, side, NATIVE)
            then = load_words(start + after * 16 + t * 4 + (side * size if BITS > 1 else 0), 4, True, NATIVE)
            for i in tl.static_range(4):
                streams = streams + (streams_of(mine + then, 0, i, side, BITS),)
        column = chunk * 32 + t[:, None] * 8 + tl.arange(0, 8)[None, :]
        for j in tl.static_range(16):
            fresh = ()
            for i in tl.static_range(8):
                fresh = fresh + (
                    row_words(words[i], streams[i], mask, flip, pairs, j, BITS, WINDOW, CODE, TABLE, NATIVE),
                )
            words = fresh
            low = tl.join(tl.join(words[0], words[4]), tl.join(words[2], words[6]))
            high = tl.join(tl.join(words[1], words[5]), tl.join(words[3], words[7]))
            value = _number(tl.reshape(tl.join(low, high), (32, 8)), j % 2 == 1, CODE, NATIVE) * known[j][:, None]
            row = unit * 16 + j
            places = out + (row - first).to(tl.int64)[:, None] * K + column
            here = ((row >= first) & (row < stop))[:, None] & (column < K)
            tl.store(places, value.to(out.dtype.element_ty), mask=here)
