"""How the Triton kernels read trellis weights in kernel order (`trellis_order.py`): from words of a unit to the words
that hold its values. What the words are, `trellis_product.py` tells.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels import trellis
from quant.kernels.warp import byte_sum, load_words

MAC = tl.constexpr(trellis.MAC)

FLIP = tl.constexpr(0x7E99C4A0)  # times `inst`'s first mask is its second, 0x3b603b60, modulo 2^32


@triton.jit
def pieces(at, size, BITS: tl.constexpr, SIDE: tl.constexpr, NATIVE: tl.constexpr, NOW: tl.constexpr = False):
    """The words of one side of a unit, four columns each, from where a lane's four of its chunk's first piece lie."""
    words = load_words(at + (SIDE * size if BITS > 1 else 0), 4, True, NATIVE, NOW)
    if BITS > 2:
        words = words + load_words(at + (2 if BITS == 3 else 2 + SIDE) * size, 4, True, NATIVE, NOW)
    return words


@triton.jit
def chunk_words(
    weight, chunk, size, pair, after, t, BITS: tl.constexpr, NATIVE: tl.constexpr, NOW: tl.constexpr = False
):
    """All words of a chunk, per side those of `pieces` of both units of a pair and of the unit that comes after."""
    start = weight + chunk * (BITS * size) + t * 4
    words = ()
    for side in tl.static_range(2):
        for half in tl.static_range(2):
            words = words + pieces(start + pair * 32 + half * 16, size, BITS, side, NATIVE, NOW)
        words = words + load_words(start + after * 16 + (side * size if BITS > 1 else 0), 4, True, NATIVE, NOW)
    return words


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


@triton.constexpr_function
def plain_code(code: str) -> str:
    """A code without how it is multiplied."""
    return code.removesuffix("_halves")


@triton.constexpr_function
def is_halves(code: str) -> bool:
    """Whether bytes are added up and multiplied as float16."""
    return code.endswith("_halves")


@triton.jit
def _scattered(state, SHIFT: tl.constexpr, CODE: tl.constexpr):
    """The integer whose bytes make the values of `mac` (`twin`, where it has two) and `sum`; `state` is shifted left by
    SHIFT, which the multiplier of `mac`, a multiple of 8, leaves room for."""
    if plain_code(CODE) == "sum":
        return (state * 89226354 + 64248484) & 0x3F3F3F3F
    else:
        TIMES: tl.constexpr = MAC[0] >> SHIFT
        return state * TIMES + MAC[1]


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
def room_of(code: str) -> int:
    """By how many bits a state may be shifted left before it is multiplied."""
    return 3 if plain_code(code) in ("mac", "twin") else 0


@triton.constexpr_function
def vector_of(code: str) -> int:
    """Values of a state."""
    return 2 if plain_code(code) in ("twin", "hyb") else 1


@triton.constexpr_function
def _partner(number: int, code: str, bits: int, window: int) -> int:
    """How many states on (or back, below 0) is the one that ends the 32 bits that this one begins (or begins those that
    it ends); 0 where a unit has none. A state may be `room_of` bits from where they begin."""
    step = bits * vector_of(code)
    rest = (32 - window) % step
    apart, first = (32 - window - rest) // step, -(-rest // step)
    if rest > room_of(code) or number < first:
        return 0
    if (number - first) // apart % 2:
        return -apart
    return apart if number + apart < 16 // vector_of(code) else 0


@triton.constexpr_function
def state_at(index: int, code: str, bits: int, window: int) -> int:
    """In which order the states of a unit are decoded: partners one after the other, since they share a register."""
    if plain_code(code) not in ("mac", "sum", "twin"):
        return index
    order = list[int]()
    for number in range(16 // vector_of(code)):
        if number not in order:
            apart = _partner(number, code, bits, window)
            order += [number, number + apart] if apart > 0 else [number]
    return order[index]


@triton.constexpr_function
def row_of(index: int, code: str, bits: int, window: int) -> int:
    """The row of a unit that product number `index` is of, of `twin` the first of two."""
    if code == "twin":
        return 2 * state_at(index, code, bits, window)
    vector = vector_of(code)
    return state_at(index // vector, code, bits, window) * vector + index % vector


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
def integer_word(
    streams, J: tl.constexpr, BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, NATIVE: tl.constexpr
):
    """State J of a unit as the integer whose bytes are multiplied. Two states that are partners take three shifts and
    masks, one that begins up to `room_of` bits after a whole byte one or two, one that lies in a word a product and a
    shift, and any other two."""
    STEP: tl.constexpr = BITS * vector_of(CODE)
    MASK: tl.constexpr = (1 << WINDOW) - 1
    REST: tl.constexpr = (32 - WINDOW) % STEP
    PARTNER: tl.constexpr = _partner(J, CODE, BITS, WINDOW)
    SHIFT: tl.constexpr = J * STEP % 16
    ROOM: tl.constexpr = room_of(CODE)
    if PARTNER > 0:
        return _scattered(_bits(streams, J * STEP - REST) & (MASK << REST), REST, CODE)
    elif PARTNER < 0:
        return _scattered(_bits(streams, (J + PARTNER) * STEP - REST) >> (32 - WINDOW), 0, CODE)
    elif J * STEP // 16 % 2 == 1 and J * STEP % 32 + WINDOW <= 32:
        return _scattered(state_of(streams[J * STEP // 32 * 2], J * STEP % 32, WINDOW, NATIVE), 0, CODE)
    elif SHIFT % 8 <= ROOM:
        word = streams[J * STEP // 16] >> (SHIFT // 8 * 8)
        return _scattered(word & (MASK << SHIFT % 8), SHIFT % 8, CODE)
    else:
        return _scattered(state_of(streams[J * STEP // 16], SHIFT, WINDOW, NATIVE), 0, CODE)


@triton.jit
def _word(
    streams, mask, flip, pairs, J: tl.constexpr,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What a code makes of state J of a unit: the two halves of `inst`, the two values of `hyb` (`pairs`: its table,
    2^TABLE words), else the integer."""
    if CODE != "inst" and CODE != "hyb":
        return integer_word(streams, J, BITS, WINDOW, CODE, NATIVE)
    else:
        BIT: tl.constexpr = J * BITS * vector_of(CODE)
        state = state_of(streams[BIT // 16], BIT % 16, WINDOW, NATIVE)
        if CODE == "inst":
            return ((state * 89226354 + 64248484) & mask) ^ flip
        else:
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


@triton.jit
def row_words(
    before, streams, mask, flip, pairs, J: tl.constexpr,
    BITS: tl.constexpr, WINDOW: tl.constexpr, CODE: tl.constexpr, TABLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Row J's words; `before`: those of the row before it, which are this one's too if two share a state, those of
    `hyb` in their other half."""
    if J % vector_of(CODE) == 1:
        return before >> 16 if CODE == "hyb" else before
    else:
        return _word(streams, mask, flip, pairs, J // vector_of(CODE), BITS, WINDOW, CODE, TABLE, NATIVE)


@triton.constexpr_function
def carry_of(code: str) -> int:
    """What the sum of an integer's bytes is more than its value."""
    return 126 if plain_code(code) == "sum" else 510


@triton.jit
def value_of(word, ODD: tl.constexpr, MORE: tl.constexpr, CODE: tl.constexpr, NATIVE: tl.constexpr):
    """The value that a code makes of an integer's bytes, and MORE: int32. ODD: of a row with an odd number."""
    if ODD and vector_of(CODE) == 2:
        return byte_sum(word, 0xFF01FF01, MORE, False, NATIVE)
    else:
        return byte_sum(word, 0x01010101, MORE - carry_of(CODE), False, NATIVE)


@triton.jit
def row_scales(scales, peaks, table, rows, inside, LENGTH: tl.constexpr):
    """Float32: `table[code] peak`, as `trellis.scale_values` does it."""
    code = tl.load(scales + rows, mask=inside, other=255).to(tl.int32)
    return tl.load(table + code) * tl.load(peaks + rows // LENGTH, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def neighbours(units, whole, total, LENGTH: tl.constexpr):
    """The units that come after `units`; `whole`: units of whole sequences, each of which is a circle."""
    TURN: tl.constexpr = LENGTH // 16
    after = tl.where((units % TURN == TURN - 1) & (units < whole), units + 1 - TURN, units + 1)
    return tl.minimum(after, total - 1)
