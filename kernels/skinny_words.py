"""From words in kernel order (`order.py`) to two codes in the halves of a register, as `skinny.py` multiplies them."""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.warp import load_words, masked


@triton.constexpr_function
def exponent(chunk: int, place: int, bits: int, kind: str) -> int:
    """`k` of the code at `place` `2 r + e` of a chunk."""
    if bits == 1:
        return (4 * (chunk % 4) + place) % (7 if kind == "bf16" else 3)
    return (4 * (chunk % 2) + place) % (3 if kind == "bf16" else 2) * 2 if bits <= 3 else 0


@triton.jit
def _moved(word, RIGHT: tl.constexpr):
    if RIGHT > 0:
        return word >> RIGHT
    elif RIGHT < 0:
        return word << -RIGHT
    else:
        return word


@triton.jit
def codes_of(
    words, mask, FIRST: tl.constexpr, CHUNK: tl.constexpr, PLACE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Two codes as numbers, one in each half; of 8 bits in bfloat16 the low four. FIRST: where the row's words begin.
    `mask`: a one in each half, which the compiler must not know; see `skinny_kernel`."""
    K: tl.constexpr = exponent(CHUNK, PLACE, BITS, KIND)
    MAGIC: tl.constexpr = 0x43004300 if KIND == "bf16" else 0
    AT_2: tl.constexpr = 2 * (4 * (CHUNK % 2) + PLACE)
    AT_1: tl.constexpr = 4 * (CHUNK % 4) + PLACE
    if BITS == 1:
        made = masked(_moved(words[FIRST + CHUNK // 4], AT_1 - K), mask * (1 << K), MAGIC, NATIVE)
    elif BITS <= 3:
        made = masked(_moved(words[FIRST + CHUNK // 2], AT_2 - K), mask * (3 << K), MAGIC, NATIVE)
        if BITS == 3:
            made = masked(_moved(words[FIRST + 4 + CHUNK // 4], AT_1 - K - 2), mask * (4 << K), made, NATIVE)
    else:
        made = masked(_moved(words[FIRST + CHUNK], 4 * PLACE), mask * 15, MAGIC, NATIVE)
        if BITS == 8:
            if KIND == "fp16":
                made = masked(_moved(words[FIRST + 4 + CHUNK], 4 * PLACE - 4), mask * 240, made, NATIVE)
        else:
            if BITS >= 6:
                made = masked(_moved(words[FIRST + 4 + CHUNK // 2], AT_2 - 4), mask * 48, made, NATIVE)
            if BITS == 5:
                made = masked(_moved(words[FIRST + 4], AT_1 - 4), mask * 16, made, NATIVE)
            if BITS == 7:
                made = masked(_moved(words[FIRST + 6], AT_1 - 6), mask * 64, made, NATIVE)
    return made


@triton.jit
def high_codes_of(words, mask, FIRST: tl.constexpr, CHUNK: tl.constexpr, PLACE: tl.constexpr, NATIVE: tl.constexpr):
    """The high four of 8 bits in bfloat16: `2048 + 16 c`."""
    return masked(_moved(words[FIRST + 4 + CHUNK], 4 * PLACE), mask * 15, 0x45004500, NATIVE)


@triton.jit
def _row_words(at, N, BITS: tl.constexpr, ROW: tl.constexpr, NATIVE: tl.constexpr):
    """The words of one step for row ROW of a lane; `at`: where of its first row the planes of 4, 2 and 1 bits begin."""
    words = ()
    if BITS >= 4:
        words = words + load_words(at[0] + ROW * 16, 4, False, NATIVE)
    if BITS == 8:
        words = words + load_words(at[0] + 32 * N + ROW * 16, 4, False, NATIVE)
    if BITS == 2 or BITS == 3:
        words = words + load_words(at[1] + ROW * 16, 4, False, NATIVE)
    if BITS == 6 or BITS == 7:
        words = words + load_words(at[1] + ROW * 16, 2, False, NATIVE)
    if BITS == 1 or BITS == 3:
        words = words + load_words(at[2] + ROW * 8, 2, False, NATIVE)
    if BITS == 5 or BITS == 7:
        words = words + load_words(at[2] + ROW * 8, 1, False, NATIVE)
    return words


@triton.jit
def step_words(weight, step, N, row, lane, BITS: tl.constexpr, ROWS: tl.constexpr, NATIVE: tl.constexpr):
    """All words of a step: ROWS rows of a lane, from `row` on."""
    PARTS: tl.constexpr = 2 if BITS >= 4 else 1
    half = step % PARTS
    start = tl.cast(step // PARTS, tl.int64) * (8 * BITS * N)
    wide = row * 16 + lane * 4
    FOURS: tl.constexpr = 0 if BITS < 4 else (64 if BITS == 8 else 32)
    TWOS: tl.constexpr = FOURS + (16 if BITS % 4 >= 2 else 0)
    first = weight + start + (half * 16 * N + wide)
    two = weight + start + (FOURS * N + wide + (half * 2 if BITS >= 4 else 0))
    one = weight + start + (TWOS * N + row * 8 + lane * 2 + (half if BITS >= 4 else 0))
    words = ()
    for i in tl.static_range(ROWS):
        words = words + _row_words((first, two, one), N, BITS, i, NATIVE)
    return words
