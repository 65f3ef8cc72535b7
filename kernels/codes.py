"""Triton functions that take codes in kernel order (`order.py`) apart, and the kernel that unpacks a weight with them.

For one chunk of 32 columns they give the codes of BN rows as they came out of memory, two per register, as numbers that
a tensor core multiplies without a conversion:

- float16: a code `c` in the low bits of a half is the subnormal number `c 2^-24`; nothing but a mask is needed.
- bfloat16: `0x4300 | c` is `128 + c`, exactly; 8-bit codes are two planes of 4 bits, the high one `2048 + 16 c`.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF059, SIM108
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _split(words, BN: tl.constexpr, W: tl.constexpr):
    """Words `[BN, 4, W]` as W tensors `[BN, 4]` (the first two again where W is 2)."""
    if W == 2:
        first, second = tl.split(words)
        return first, second, first, second
    else:
        pairs = tl.permute(tl.reshape(words, (BN, 4, 2, 2)), (0, 1, 3, 2))
        low, high = tl.split(pairs)
        w0, w1 = tl.split(low)
        w2, w3 = tl.split(high)
        return w0, w1, w2, w3


@triton.jit
def _piece(weight, start, rows, inside, BN: tl.constexpr, W: tl.constexpr):
    """The words of one piece for some rows."""
    lane = tl.arange(0, 4)[None, :, None] * W
    offsets = rows[:, None, None] * (4 * W) + lane + tl.arange(0, W)[None, None, :]
    words = tl.load(weight + start + offsets, mask=inside[:, None, None], other=0, eviction_policy="evict_first")
    return _split(words, BN, W)


@triton.jit
def _slots(words, CHUNK: tl.constexpr, PLANE: tl.constexpr, FIRST: tl.constexpr):
    """One plane of chunk CHUNK, `[BN, 4, r, e]` int32 with a code in each half; `words`: those from word FIRST on."""
    EACH: tl.constexpr = 4 // PLANE
    INDEX: tl.constexpr = CHUNK // EACH - FIRST
    AT: tl.constexpr = (CHUNK % EACH) * 4 * PLANE
    MASK: tl.constexpr = ((1 << PLANE) - 1) * 0x10001
    word = words[INDEX]
    first = tl.join(word >> AT, word >> (AT + 2 * PLANE))
    second = tl.join(word >> (AT + PLANE), word >> (AT + 3 * PLANE))
    return tl.join(first, second) & MASK


@triton.jit
def tile_words(weight, tile, N, rows, inside, BITS: tl.constexpr, BN: tl.constexpr):
    """All words of a tile: the pieces of the first and second plane of 4 bits, of the planes of 2 and of 1."""
    start = tl.cast(tile, tl.int64) * (8 * BITS * N)
    none = (rows, rows, rows, rows)
    four_a = none
    four_b = none
    high_a = none
    high_b = none
    two = none
    one = none
    if BITS >= 4:
        four_a = _piece(weight, start, rows, inside, BN, 4)
        four_b = _piece(weight, start + 16 * N, rows, inside, BN, 4)
        start += 32 * N
    if BITS == 8:
        high_a = _piece(weight, start, rows, inside, BN, 4)
        high_b = _piece(weight, start + 16 * N, rows, inside, BN, 4)
    if BITS % 4 >= 2:
        two = _piece(weight, start, rows, inside, BN, 4)
        start += 16 * N
    if BITS % 2 == 1:
        one = _piece(weight, start, rows, inside, BN, 2)
    return four_a, four_b, high_a, high_b, two, one


@triton.jit
def chunk_codes(words, CHUNK: tl.constexpr, BITS: tl.constexpr):
    """The codes of one chunk, `[BN, 4, r, e]` int32 with one in each half; of 8 bits the low four."""
    four_a, four_b, high_a, high_b, two, one = words
    if BITS >= 4:
        if CHUNK < 4:
            codes = _slots(four_a, CHUNK, 4, 0)
        else:
            codes = _slots(four_b, CHUNK, 4, 4)
        if BITS % 4 >= 2:
            codes |= _slots(two, CHUNK, 2, 0) << 4
        if BITS == 5:
            codes |= _slots(one, CHUNK, 1, 0) << 4
        if BITS == 7:
            codes |= _slots(one, CHUNK, 1, 0) << 6
    elif BITS >= 2:
        codes = _slots(two, CHUNK, 2, 0)
        if BITS == 3:
            codes |= _slots(one, CHUNK, 1, 0) << 2
    else:
        codes = _slots(one, CHUNK, 1, 0)
    return codes


@triton.jit
def high_codes(words, CHUNK: tl.constexpr):
    """The high four bits of 8-bit codes."""
    four_a, four_b, high_a, high_b, two, one = words
    if CHUNK < 4:
        codes = _slots(high_a, CHUNK, 4, 0)
    else:
        codes = _slots(high_b, CHUNK, 4, 4)
    return codes


@triton.jit
def operand(codes, BN: tl.constexpr, KIND: tl.constexpr):
    """Two codes per int32 `[BN, 4, r, e]` as the operand `[BN, 32]` of a product, its columns in the order of
    `_inputs`."""
    low = codes.to(tl.int16)
    high = (codes >> 16).to(tl.int16)
    if KIND == "fp16":
        numbers = tl.join(low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True))
    else:
        numbers = tl.join(low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True))
    return tl.reshape(tl.permute(numbers, (0, 2, 1, 3, 4)), (BN, 32))


@triton.jit
def inputs(some, BM: tl.constexpr):
    """A chunk of `x` `[32, BM]` (lane, r, e, p) in the order (r, lane, e, p): four neighbours of this order are the
    registers of one thread, and a register holds two halves."""
    some = tl.reshape(some, (4, 2, 2, 2, BM))
    return tl.reshape(tl.permute(some, (1, 0, 2, 3, 4)), (32, BM))


@triton.jit
def dot(weight, some, total, WIDEN: tl.constexpr):
    """A product; WIDEN for Triton's interpreter, which takes bfloat16 for the integers that it stores it as."""
    if WIDEN:
        return tl.dot(weight.to(tl.float32), some.to(tl.float32), total)
    else:
        return tl.dot(weight, some, total, out_dtype=total.dtype)


@triton.jit
def unit_words(weight, N, ONE: tl.constexpr):
    """Two ones in every int32 `[16, 4, 2, 2]`, made from a load as the weight is: only then does the compiler choose
    the same layout of `x` for both products. That nothing of the load matters it sees later, and drops it."""
    at = tl.arange(0, 16)[:, None] * 4 + tl.arange(0, 4)[None, :]
    word = (tl.load(weight + at, mask=at < N, other=0) & 1) >> 1 | ONE
    return tl.join(tl.join(word, word), tl.join(word, word))


@triton.jit(do_not_specialize=("first", "stop"))
def dequantize_kernel(
    weight, scales, zeros, out, first, stop, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`out` `[stop - first, K]`: these rows of the weight, as `PackedUniform.dequantize` gives them bit for bit, or, as
    int8, the codes less their zero points (of 8 bits that have some less 128, of 1 bit without them twice that); one
    program per BN rows and tile, the tiles of the same rows one after the other, so that what is stored at a time lies
    together."""
    INTEGER: tl.constexpr = out.dtype.element_ty == tl.int8
    tiles = tl.cdiv(K, 256)
    rows = first + tl.program_id(0) // tiles * BN + tl.arange(0, BN)
    tile = tl.program_id(0) % tiles
    inside = rows < stop
    words = tile_words(weight, tile, N, rows, inside, BITS, BN)
    for chunk in tl.static_range(8):
        codes = chunk_codes(words, chunk, BITS)
        if BITS == 8:
            codes |= high_codes(words, chunk) << 4
        values = tl.join((codes & 0xFFFF).to(tl.float32), ((codes >> 16) & 0xFFFF).to(tl.float32))
        values = tl.reshape(values, (BN, 32))
        k = tile * 256 + chunk * 32 + tl.arange(0, 32)
        here = inside[:, None] & (k < K)[None, :]
        if GROUP % 32 > 0:
            at = (k // GROUP)[None, :] * N + rows[:, None]
            known = here
        else:  # a chunk's columns share a group
            at = rows[:, None]
            if GROUP > 0:
                at += tl.minimum(tile * 256 + chunk * 32, K - 1) // GROUP * N
            known = inside[:, None]
        if ZERO >= 0:
            values -= ZERO
            if INTEGER and BITS == 1:
                values *= 2
        elif INTEGER and BITS == 8:
            values -= 128
        else:
            values -= tl.load(zeros + at, mask=known, other=0).to(tl.float32)
        if not INTEGER:
            values *= tl.load(scales + at, mask=known, other=0.0).to(tl.float32)
        places = out + (rows - first)[:, None].to(tl.int64) * K + k[None, :]
        tl.store(places, values.to(out.dtype.element_ty), mask=here)
