"""`x` of one token, rotated by the product itself (`trellis_product.py`): signs and a block Hadamard matrix, see
`hadamard.py`, of codes that are multiplied as integers.

A program rotates the columns of its part of K: lane `l` of warp `w` has the eight columns from `256 w + 8 l` on, and
those `256 WARPS` further on. Three rounds of sums and differences are the lane's own, the others a shuffle and a
multiply-add each, in the order of `hadamard.py`'s reference. The largest of the program's values comes through shared
memory, and the integers go there, where every warp finds its own chunks. It is all done in the time that the first
weights need to come: a launch of its own takes 1.4 to 2.2 us of an H200, this 0 to 0.6.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.shared import get, put, put_one
from quant.kernels.trellis_inputs import LEVELS, inputs_of, rounded, tokens_of
from quant.kernels.warp import largest_of, load_inputs, numbers, shuffled


@triton.constexpr_function
def rounds(size: int) -> int:
    return size.bit_length() - 1


@triton.jit
def _eight(x, signs, k, here, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Eight columns from `k` on, with their signs."""
    words = load_inputs(x + k, here, 4, False, NATIVE)
    flips = load_inputs((signs + k).to(tl.pointer_type(tl.int16)), here, 2, False, NATIVE)
    made = ()
    for i in tl.static_range(4):
        for half in tl.static_range(2):
            number = numbers(words[i], KIND)[half].to(tl.uint32, bitcast=True)
            flip = flips[i // 2] << (24 - 8 * (2 * (i % 2) + half)) & 0x80000000
            made = made + ((number ^ flip).to(tl.float32, bitcast=True),)
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
def _program_largest(number, at, lanes, WARPS: tl.constexpr, NATIVE: tl.constexpr):
    """The largest of all lanes. `at`: the address of a number for each warp that nothing else is stored to."""
    number = largest_of(number, lanes, 5 if NATIVE else 5 + rounds(WARPS), NATIVE)
    if NATIVE:
        put_one(at + (lanes // 32 * 4).to(tl.uint32), number)
        tl.debug_barrier()
        number = largest_of(get(at + (lanes % WARPS * 4).to(tl.uint32)), lanes, rounds(WARPS), True)
    return number


@triton.jit
def turned(
    x, signs, start, begin, end, lanes,
    STEPS: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The integers of a program's columns, `begin` to `end`, from address `start` on in shared memory, 64 bytes a
    chunk; here, for the interpreter, which has none: four words of each of STEPS steps of each lane; and what undoes
    their scale."""
    values, largest = (), tl.zeros(lanes.shape, tl.float32)
    for step in tl.static_range(STEPS):
        k = begin + lanes * 8 + step * (256 * WARPS)
        eight = _butterflies(_eight(x, signs, k, k < end, KIND, NATIVE), lanes, BLOCK, NATIVE)
        for i in tl.static_range(8):
            largest = tl.maximum(largest, tl.abs(eight[i]), propagate_nan=tl.PropagateNan.ALL)
        values = values + eight
    largest = _program_largest(largest, start + STEPS * WARPS * 512, lanes, WARPS, NATIVE)
    scale = tl.where(largest > 0, LEVELS / tl.maximum(largest, 2.0**-108), 0.0)
    words = ()
    for i in tl.static_range(4 * STEPS):
        words = words + (rounded(values[2 * i], scale) | rounded(values[2 * i + 1], scale) << 16,)
    if NATIVE:
        for step in tl.static_range(STEPS):
            at = start + (step * (512 * WARPS) + lanes * 16).to(tl.uint32)
            put(at, (words[4 * step], words[4 * step + 1], words[4 * step + 2], words[4 * step + 3]))
        tl.debug_barrier()
    return words, largest * (BLOCK**-0.5 / LEVELS)


@triton.jit
def kept(words, chunk, lanes, STEPS: tl.constexpr, WARPS: tl.constexpr):
    """Of `turned`'s words, those of a lane's eight columns of the program's chunk number `chunk`; for the
    interpreter."""
    lane = chunk % (8 * WARPS) * 4 + lanes % 4
    found = ()
    for i in tl.static_range(4):
        word = lane.to(tl.uint32) * 0
        for step in tl.static_range(STEPS):
            word = word | tl.where(chunk // (8 * WARPS) == step, tl.gather(words[4 * step + i], lane, 0), 0)
        found = found + (word,)
    return found


@triton.jit
def taken(
    x, signs, start, first, M, K, stride, begin, end, each, zero, lanes,
    INTEGER: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, ONE: tl.constexpr,
    BM: tl.constexpr, EACH: tl.constexpr, AHEAD: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What `turned` or `tokens_of` say of `x`, and where a warp has its integers in shared memory."""
    warp = lanes // 32
    if BLOCK > 0:
        first = tl.program_id(1) * each * (32 * WARPS)
        last = tl.minimum(K, first + each * (32 * WARPS))
        integers, down = turned(x, signs, start, first + zero, last, lanes, STEPS, WARPS, BLOCK, KIND, NATIVE)
        return integers, (0,), (down,), (down,), start + (warp * each * 64).to(tl.uint32)
    else:
        places, scale, down = tokens_of(
            x, first, M, K, stride, begin, end, each, lanes, INTEGER, ONE, EACH, BM // EACH, KIND, NATIVE
        )
        size = AHEAD * 64 * (1 if ONE else BM)
        return (), places, scale, down, start + (warp * size).to(tl.uint32)


@triton.jit
def chunk_inputs(
    integers, x, start, places, scale, chunk, which, inside, K, lanes,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, ONE: tl.constexpr, EACH: tl.constexpr,
    PARTS: tl.constexpr, HALVES: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What a lane's eight columns of `x` are multiplied as, four words for each part. `which`: the chunk's number among
    its warp's in shared memory, `inside`: in the program's part of K."""
    if BLOCK > 0 and not NATIVE:
        return kept(integers, inside, lanes, STEPS, WARPS)
    else:
        some = ()
        for part in tl.static_range(PARTS):
            some = some + inputs_of(
                x, start, places[part], scale[part], chunk, which, part, K, lanes, ONE, EACH, PARTS, HALVES, KIND,
                NATIVE,
            )  # fmt: skip
        return some
