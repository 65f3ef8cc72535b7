"""How the kernel of codebooks in shared memory (`codebook_shared.py`) takes `x`: scaled, and as the tensor core's right
operand."""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.shared import put, together
from quant.kernels.uniform import larger, power
from quant.kernels.warp import joined, largest_of, load_inputs, numbers, permuted


@triton.jit
def _unit_inputs(place, unit, end, K, t, EVEN: tl.constexpr, NATIVE: tl.constexpr):
    """16 columns of `x` of a unit, in eight words; zero from unit `end` and from column K on."""
    k = unit // 2 * 128 + unit % 2 * 16
    first = load_inputs(place + k, (unit < end) & (k + t * 32 < K), 4, EVEN, NATIVE)
    return first + load_inputs(place + k + 8, (unit < end) & (k + t * 32 + 8 < K), 4, EVEN, NATIVE)


@triton.jit
def all_inputs(places, unit, end, K, t, PARTS: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr):
    """Those of each part."""
    made = ()
    for part in tl.static_range(PARTS):
        made = made + (_unit_inputs(places[part], unit, end, K, t, EVEN, NATIVE),)
    return made


@triton.jit
def _sided(word, left, HIGH: tl.constexpr, NATIVE: tl.constexpr):
    """The high or the low half of a word, in the low half or, where `left`, the high one, beside zero."""
    select = tl.where(left, 0x3244 if HIGH else 0x1044, 0x4432 if HIGH else 0x4410)  # 4: a byte of zero
    return permuted(word, 0, select, NATIVE)


@triton.jit
def operand(word, up, left, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Two columns of `x` as the right operand of a product."""
    if KIND == "bf16":
        x0, x1 = numbers(word, KIND)
        word = joined(x0 * up, x1 * up, NATIVE)
    return _sided(word, left, False, NATIVE), _sided(word, left, True, NATIVE)


@triton.jit
def powers_of(places, begin, end, each, K, lanes, PARTS: tl.constexpr, ONE: tl.constexpr, NATIVE: tl.constexpr):
    """By what the token of a lane is multiplied in each part, so that the largest `|x|` of its warp's units fits. All
    `g` have the one token, or two of them the same, and take the units in turn."""
    TURNS: tl.constexpr = 8 if ONE else 2
    found = (tl.zeros(lanes.shape, tl.float32),) * PARTS
    for i in range(0, each, TURNS):
        unit = begin + i + lanes // 4 % TURNS
        fresh = ()
        for part in tl.static_range(PARTS):
            words = _unit_inputs(places[part], unit, end, K, lanes % 4, False, NATIVE)
            fresh = fresh + (larger(found[part], words, "bf16"),)
        found = fresh
    powers = ()
    for part in tl.static_range(PARTS):
        powers = powers + (power(largest_of(found[part], lanes, 5 if ONE else 3, NATIVE)),)
    return powers


@triton.jit
def taken_inputs(x, start, begin, end, lanes, STEPS: tl.constexpr, KIND: tl.constexpr):
    """Puts columns `begin` to `end` of one token, a warp's, into shared memory, from address `start` on, as float16; by
    what they were multiplied."""
    up = tl.full(lanes.shape, 1.0, tl.float32)
    held = ()
    for step in tl.static_range(STEPS):
        k = begin + step * 256 + lanes % 32 * 8
        held = held + load_inputs(x + k, k < end, 4, False, True)
    if KIND == "bf16":
        up = power(largest_of(larger(tl.zeros(lanes.shape, tl.float32), held, KIND), lanes, 5, True))
        made = ()
        for i in tl.static_range(4 * STEPS):
            low, high = numbers(held[i], KIND)
            made = made + (joined(low * up, high * up, True),)
        held = made
    for step in tl.static_range(STEPS):
        at = start + (step * 512 + lanes % 32 * 16).to(tl.uint32)
        put(at, (held[4 * step], held[4 * step + 1], held[4 * step + 2], held[4 * step + 3]))
    together(lanes)
    return up
