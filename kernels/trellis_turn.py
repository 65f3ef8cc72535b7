"""`x` of one token, taken and rotated by the product itself (`trellis_product.py`), of codes that are multiplied as
integers: signs and a block Hadamard matrix, see `hadamard.py`; or, where blocks are of 1, `x` as it is.

Each warp takes the columns of its part of K: lane `l` has the eight columns from `8 l` on, and those 256 further on.
Three rounds of sums and differences are the lane's own, the others a shuffle and a multiply-add each, in the order of
`hadamard.py`'s reference. The integers go to shared memory, where the warp finds its chunks. It is all done in the time
that the first weights need to come: a launch of its own takes 1.4 to 2.2 us of an H200, this 0 to 0.6.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.shared import put, together
from quant.kernels.trellis_inputs import LEVELS, inputs_of, rounded, tokens_of
from quant.kernels.warp import largest_of, load_inputs, numbers, shuffled


@triton.constexpr_function
def rounds(size: int) -> int:
    return size.bit_length() - 1


@triton.jit
def _eight(x, signs, k, here, BLOCK: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Eight columns from `k` on, with their signs."""
    words = load_inputs(x + k, here, 4, False, NATIVE)
    flips = (0,)
    if BLOCK > 1:
        flips = load_inputs((signs + k).to(tl.pointer_type(tl.int16)), here, 2, False, NATIVE)
    made = ()
    for i in tl.static_range(4):
        for half in tl.static_range(2):
            number = numbers(words[i], KIND)[half]
            if BLOCK > 1:
                flip = flips[i // 2] << (24 - 8 * (2 * (i % 2) + half)) & 0x80000000
                number = (number.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
            made = made + (number,)
    return made


@triton.jit
def _butterflies(eight, lanes, BLOCK: tl.constexpr, NATIVE: tl.constexpr):
    """The rounds of sums and differences of blocks of BLOCK columns."""
    for step in tl.static_range(3):
        fresh = ()
        for i in tl.static_range(8):
            low, high = eight[i & ~(1 << step)], eight[i | 1 << step]
            fresh = fresh + (low + high if (i >> step) % 2 == 0 else low - high,)
        eight = fresh
    for step in tl.static_range(rounds(BLOCK) - 3):
        sign = tl.where((lanes >> step) % 2 == 0, 1.0, -1.0)
        fresh = ()
        for i in tl.static_range(8):
            fresh = fresh + (tl.math.fma(eight[i], sign, shuffled(eight[i], lanes ^ 1 << step, NATIVE)),)
        eight = fresh
    return eight


@triton.jit
def turned(
    x, signs, start, begin, end, lanes, STEPS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """The integers of a warp's columns, `begin` to `end`, from address `start` on in shared memory, 64 bytes a chunk;
    here, for the interpreter, which has none: four words of each of STEPS steps of each lane; and what undoes their
    scale."""
    values, largest = (), tl.zeros(lanes.shape, tl.float32)
    for step in tl.static_range(STEPS):
        k = begin + lanes % 32 * 8 + step * 256
        eight = _eight(x, signs, k, k < end, BLOCK, KIND, NATIVE)
        if BLOCK > 1:
            eight = _butterflies(eight, lanes, BLOCK, NATIVE)
        for i in tl.static_range(8):
            largest = tl.maximum(largest, tl.abs(eight[i]), propagate_nan=tl.PropagateNan.ALL)
        values = values + eight
    largest = largest_of(largest, lanes, 5, NATIVE)
    scale = tl.where(largest > 0, LEVELS / tl.maximum(largest, 2.0**-108), 0.0)
    words = ()
    for i in tl.static_range(4 * STEPS):
        words = words + (rounded(values[2 * i], scale) | rounded(values[2 * i + 1], scale) << 16,)
    if NATIVE:
        for step in tl.static_range(STEPS):
            at = start + (step * 512 + lanes % 32 * 16).to(tl.uint32)
            put(at, (words[4 * step], words[4 * step + 1], words[4 * step + 2], words[4 * step + 3]))
        together(lanes)
    return words, largest * (BLOCK**-0.5 / LEVELS)


@triton.jit
def _kept(words, which, lanes, STEPS: tl.constexpr):
    """Of `turned`'s words, those of a lane's eight columns of its warp's chunk number `which`; for the interpreter."""
    lane = lanes // 32 * 32 + which % 8 * 4 + lanes % 4
    found = ()
    for i in tl.static_range(4):
        word = lane.to(tl.uint32) * 0
        for step in tl.static_range(STEPS):
            word = word | tl.where(which // 8 == step, tl.gather(words[4 * step + i], lane, 0), 0)
        found = found + (word,)
    return found


@triton.jit
def taken(
    x, signs, start, first, M, K, stride, begin, end, each, lanes, warp,
    INTEGER: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, ONE: tl.constexpr,
    BM: tl.constexpr, EACH: tl.constexpr, AHEAD: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What `turned` or `tokens_of` say of `x`, and where a warp has its integers in shared memory."""
    if BLOCK > 0:
        start += (warp * (STEPS * 512)).to(tl.uint32)
        last = tl.minimum(K, end * 32)
        integers, down = turned(x, signs, start, begin * 32, last, lanes, STEPS, BLOCK, KIND, NATIVE)
        return integers, (0,), (down,), (down,), start
    else:
        places, scale, down = tokens_of(
            x, first, M, K, stride, begin, end, each, lanes, INTEGER, ONE, EACH, BM // EACH, KIND, NATIVE
        )
        size = AHEAD * 64 * (1 if ONE else BM)
        return (), places, scale, down, start + (warp * size).to(tl.uint32)


@triton.jit
def chunk_inputs(
    integers, x, start, places, scale, chunk, which, K, lanes,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, ONE: tl.constexpr, EACH: tl.constexpr, PARTS: tl.constexpr,
    HALVES: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What a lane's eight columns of `x` are multiplied as, four words for each part. `which`: the chunk's number among
    its warp's in shared memory."""
    if BLOCK > 0 and not NATIVE:
        return _kept(integers, which, lanes, STEPS)
    else:
        some = ()
        for part in tl.static_range(PARTS):
            some = some + inputs_of(
                x, start, places[part], scale[part], chunk, which, part, K, lanes, ONE, EACH, PARTS, HALVES, KIND,
                NATIVE,
            )  # fmt: skip
        return some
