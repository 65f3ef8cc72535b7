"""How the Triton kernels read trellis weights in kernel order (`trellis_order.py`): from words of a unit to the words
that hold its values, and the kernel that decodes a weight. What the words are, `trellis_product.py` tells.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.warp import load_words

FLIP = tl.constexpr(0x7E99C4A0)  # times `inst`'s first mask is its second, 0x3b603b60, modulo 2^32


@triton.jit
def pieces(at, size, BITS: tl.constexpr, SIDE: tl.constexpr, NATIVE: tl.constexpr):
    """The words of one side of a unit, four columns each, from where a lane's four of its chunk's first piece lie."""
    if BITS == 1:
        return load_words(at, 4, True, NATIVE)
    elif BITS == 2:
        return load_words(at + SIDE * size, 4, True, NATIVE)
    elif BITS == 3:
        return load_words(at + SIDE * size, 4, True, NATIVE) + load_words(at + 2 * size, 4, True, NATIVE)
    else:
        return load_words(at + SIDE * size, 4, True, NATIVE) + load_words(at + (2 + SIDE) * size, 4, True, NATIVE)


@triton.jit
def _middle(low, high):
    return low >> 16 | high << 16


@triton.jit
def streams_of(words, FIRST: tl.constexpr, COLUMN: tl.constexpr, SIDE: tl.constexpr, BITS: tl.constexpr):
    """32 bits of a column's stream from every half word on, and of 2 and 4 bits the next unit's first. `words`: from
    FIRST on those of `pieces`, and then the first piece of the unit that comes after."""
    word = words[FIRST + COLUMN]
    if BITS == 1:
        then = words[FIRST + 4 + COLUMN]
        if SIDE == 0:
            return ((word & 0xFFFF) | then << 16,)
        else:
            return (word >> 16 | (then & 0xFFFF0000),)
    elif BITS == 2:
        return word, _middle(word, words[FIRST + 4 + COLUMN]), words[FIRST + 4 + COLUMN]
    elif BITS == 4:
        more = words[FIRST + 4 + COLUMN]
        return word, _middle(word, more), more, _middle(more, words[FIRST + 8 + COLUMN]), words[FIRST + 8 + COLUMN]
    else:
        odd, then = words[FIRST + 4 + COLUMN], words[FIRST + 8 + COLUMN]
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


@triton.constexpr_function
def _partner(row: int, bits: int, window: int) -> int:
    """How many rows on (or back, below 0) is the row whose state ends the 32 bits that this row's begins (or begins
    those that it ends); 0 where a unit has none."""
    apart = (32 - window) // bits if (32 - window) % bits == 0 else 16
    if row // apart % 2:
        return -apart
    return apart if row + apart < 16 else 0


@triton.constexpr_function
def row_at(index: int, code: str, bits: int, window: int) -> int:
    """In which order rows are decoded: partners one after the other, since they share a register."""
    if code not in ("mac", "sum"):
        return index
    order, apart = list[int](), (32 - window) // bits if (32 - window) % bits == 0 else 16
    for row in range(16):
        if row not in order:
            order += [row, row + apart] if row + apart < 16 else [row]
    return order[index]


@triton.jit
def _bits(streams, FROM: tl.constexpr):
    """32 bits of a stream from bit FROM on."""
    WHOLE: tl.constexpr = FROM // 32 * 2
    low = streams[WHOLE]
    if FROM % 32 == 0:
        return low
    else:
        return low >> FROM % 32 | streams[WHOLE + 2] << (32 - FROM % 32)


@triton.jit
def integer_state(streams, J: tl.constexpr, BITS: tl.constexpr, WINDOW: tl.constexpr, NATIVE: tl.constexpr):
    """Row J's state. Two that are partners take three instructions, and others two each."""
    PARTNER: tl.constexpr = _partner(J, BITS, WINDOW)
    if PARTNER > 0:
        return _bits(streams, J * BITS) & ((1 << WINDOW) - 1)
    elif PARTNER < 0:
        return _bits(streams, (J + PARTNER) * BITS) >> (32 - WINDOW)
    else:
        return state_of(streams[J * BITS // 16], J * BITS % 16, WINDOW, NATIVE)


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


@triton.jit
def _number(word, CODE: tl.constexpr):
    """The value of one of `row_words`, float32."""
    if CODE == "hyb":
        return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif CODE == "inst":
        low = word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return (low + high).to(tl.float16).to(tl.float32)
    else:
        return word.to(tl.float32) - (510.0 if CODE == "mac" else 126.0)


@triton.jit(do_not_specialize=("first", "stop", "total", "whole", "mask", "count"))
def decode_kernel(
    weight, scales, peaks, pairs, table, out, first, stop, K, total, whole, mask, count,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, LENGTH: tl.constexpr,
    EACH: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`out` `[stop - first, K]`: these rows of the weight, as `PackedTrellis.dequantize` gives them bit for bit; a warp
    per 8 units and EACH of the `count` chunks. Lane `(g, t)` (`warp.py`) has unit `g`, and of a chunk the eight columns
    from `8 t` on, which it stores together."""
    lanes = tl.arange(0, 32)
    g, t = lanes // 4, lanes % 4
    unit = first // 16 + tl.program_id(0) * 8 + g
    held = tl.minimum(unit, total - 1)  # what is not there is not stored
    after = tl.minimum(neighbours(held, whole, LENGTH), total - 1)
    size = total * 16
    mask = tl.full((32,), 0, tl.uint32) + mask.to(tl.uint32, bitcast=True)
    flip = mask * FLIP
    known = ()
    for j in tl.static_range(16):
        row = unit * 16 + j
        known = known + (row_scales(scales, peaks, table, row, (row >= first) & (row < stop), LENGTH),)
    begin = tl.program_id(1) * EACH
    for chunk in range(begin, tl.minimum(begin + EACH, count)):
        start = weight + tl.cast(chunk, tl.int64) * (BITS * size)
        streams, words = (), ()
        for side in tl.static_range(2):
            mine = pieces(start + held * 16 + t * 4, size, BITS, side, NATIVE)
            then = load_words(start + after * 16 + t * 4 + (side * size if BITS > 1 else 0), 4, True, NATIVE)
            for i in tl.static_range(4):
                streams = streams + (streams_of(mine + then, 0, i, side, BITS),)
                words = words + (mask,)
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
            value = _number(tl.reshape(tl.join(low, high), (32, 8)), CODE) * known[j][:, None]
            row = unit * 16 + j
            places = out + (row - first).to(tl.int64)[:, None] * K + column
            here = ((row >= first) & (row < stop))[:, None] & (column < K)
            tl.store(places, value.to(out.dtype.element_ty), mask=here)
