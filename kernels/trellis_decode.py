"""How the Triton kernels read trellis weights in kernel order (`trellis_order.py`): from words of a unit to the words
that hold its values, and the kernel that decodes a weight. What the words are, `trellis_product.py` tells.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

FLIP = tl.constexpr(0x7E99C4A0)  # times `inst`'s first mask is its second, 0x3b603b60, modulo 2^32


@triton.jit
def _piece(weight, start, units, inside):
    """Words uint32 `[units, 4 lanes, 2, 2]` of one piece."""
    at = units[:, None, None] * 16 + tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    words = tl.load(weight + start + at, mask=inside[:, None, None], other=0, eviction_policy="evict_first")
    return tl.reshape(words.to(tl.uint32, bitcast=True), (units.shape[0], 4, 2, 2))


@triton.jit
def _middle(low, high):
    return low >> 16 | high << 16


@triton.jit
def load_streams(weight, start, size, units, after, inside, SIDE: tl.constexpr, BITS: tl.constexpr):
    """32 bits of the streams from every half word on, BITS registers `[units, 4 lanes, 2, 2]`; `after`: the units that
    come after `units`, `size`: words of a piece."""
    if BITS == 1:
        word = _piece(weight, start, units, inside)
        then = _piece(weight, start, after, inside)
        if SIDE == 0:
            return ((word & 0xFFFF) | then << 16,)
        else:
            return (word >> 16 | (then & 0xFFFF0000),)
    else:
        word = _piece(weight, start + SIDE * size, units, inside)
        then = _piece(weight, start + SIDE * size, after, inside)
        if BITS == 2:
            return word, _middle(word, then)
        elif BITS == 4:
            more = _piece(weight, start + (2 + SIDE) * size, units, inside)
            return word, _middle(word, more), more, _middle(more, then)
        else:
            odd = _piece(weight, start + 2 * size, units, inside)
            if SIDE == 0:
                return word, _middle(word, odd), (odd & 0xFFFF) | then << 16
            else:
                return word, word >> 16 | (odd & 0xFFFF0000), _middle(odd, then)


@triton.jit
def scattered(state, CODE: tl.constexpr):
    """The four bytes whose sum is the integer of `mac` and `sum`."""
    if CODE == "mac":
        return state * 2687280969 + 1714943582
    else:
        return (state * 89226354 + 64248484) & 0x3F3F3F3F


@triton.jit
def state_of(stream, SHIFT: tl.constexpr, WINDOW: tl.constexpr, NATIVE: tl.constexpr):
    """The state at bit SHIFT of its register. The left shift is a multiplication: see `trellis_product.py`."""
    if NATIVE:
        LEFT: tl.constexpr = 1 << (32 - WINDOW - SHIFT)
        top = tl.inline_asm_elementwise(
            "mul.lo.u32 $0, $1, $2;", "=r,r,r", [stream, LEFT], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        top = stream << (32 - WINDOW - SHIFT)
    return top >> (32 - WINDOW)


@triton.jit
def _word(
    stream, mask, flip, pairs,
    SHIFT: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What a code makes of the state at bit SHIFT of its register: the two halves of `inst`, the two values of `hyb`
    (`pairs`: its table, 2^TABLE words), else the integer."""
    state = state_of(stream, SHIFT, WINDOW, NATIVE)
    if CODE == "inst":
        return ((state * 89226354 + 64248484) & mask) ^ flip
    elif CODE == "hyb":
        word = state * state + state
        place = (word >> (15 - TABLE)) & ((1 << TABLE) - 1)
        if NATIVE:  # a plain load would be given a buffer in shared memory ahead of time, as if it came from far
            pair = tl.inline_asm_elementwise(
                "{.reg .u64 at; mad.wide.u32 at, $1, 4, $2; ld.global.nc.b32 $0, [at];}", "=r,r,l",
                [place, pairs.to(tl.int64)], dtype=tl.uint32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            pair = tl.load(pairs + place.to(tl.int32)).to(tl.uint32, bitcast=True)
        return pair ^ (word & 0x8000)
    else:
        word = scattered(state, CODE)
        if NATIVE:
            return tl.inline_asm_elementwise(
                "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [word, 0x01010101, 0], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            pairs = (word & 0x00FF00FF) + (word >> 8 & 0x00FF00FF)
            return (pairs & 0xFFFF) + (pairs >> 16)


@triton.jit
def row_words(
    before, streams, mask, flip, pairs, J: tl.constexpr,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Row J's words; `before`: those of the row before it, which hold this one's in their other half if two share a
    state."""
    if CODE == "hyb" and J % 2 == 1:
        return before >> 16
    else:
        return _word(streams[J * BITS // 16], mask, flip, pairs, J * BITS % 16, WINDOW, CODE, TABLE, NATIVE)


@triton.jit
def row_scales(scales, peaks, table, rows, inside, LENGTH: tl.constexpr):
    """Float32: `table[code] peak`, as `trellis.scale_values` does it."""
    code = tl.load(scales + rows, mask=inside, other=255).to(tl.int32)
    return tl.load(table + code) * tl.load(peaks + rows // LENGTH, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def neighbours(units, whole, LENGTH: tl.constexpr):
    """The units that come after `units`; `whole`: units of whole sequences, each of which is a circle."""
    TURN: tl.constexpr = LENGTH // 16
    return tl.where((units % TURN == TURN - 1) & (units < whole), units + 1 - TURN, units + 1)


@triton.jit(do_not_specialize=("first", "stop", "total", "whole", "mask"))
def decode_kernel(
    weight, scales, peaks, pairs, table, out, first, stop, K, total, whole, mask,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, LENGTH: tl.constexpr,
    BU: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`out` `[stop - first, K]`: these rows of the weight, as `PackedTrellis.dequantize` gives them bit for bit; one
    program per BU units and chunk."""
    units = first // 16 + tl.program_id(0) * BU + tl.arange(0, BU)
    chunk = tl.program_id(1)
    inside = units * 16 < stop
    after = neighbours(units, whole, LENGTH)
    start = chunk.to(tl.int64) * (BITS * total * 16)
    mask = mask.to(tl.uint32, bitcast=True)
    flip = mask * FLIP
    columns = chunk * 32 + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 4)[None, :]
    for side in tl.static_range(2):
        streams = load_streams(weight, start, total * 16, units, after, inside, side, BITS)
        held = mask
        for j in tl.static_range(16):
            held = row_words(held, streams, mask, flip, pairs, j, BITS, WINDOW, CODE, TABLE, NATIVE)
            word = tl.reshape(held, (BU, 4, 4))
            if CODE == "hyb":
                value = word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            elif CODE == "inst":
                low = word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                high = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                value = (low + high).to(tl.float16).to(tl.float32)
            else:
                value = word.to(tl.float32) - (510.0 if CODE == "mac" else 126.0)
            rows = units * 16 + j
            fits = (rows >= first) & (rows < stop)
            scale = row_scales(scales, peaks, table, rows, fits, LENGTH)[:, None, None]
            places = out + (rows - first)[:, None, None].to(tl.int64) * K + (columns + side * 4)[None, :, :]
            here = fits[:, None, None] & (columns + side * 4 < K)[None, :, :]
            tl.store(places, (value * scale).to(out.dtype.element_ty), mask=here)
