"""The search of `viterbi.py` as Triton kernels: one program per sequence, all its states at once.

A step takes the costs `[2^L]` of all states to those of the next row: the least of the `2^K` neighbours `u 2^K + k` is
what leads into the states `w 2^(L-K) + u`. Up to `2^LARGEST` states stay in registers, and from step to step only the
least costs go through shared memory, 4 KB at L = 12 and K = 2; more states go through a scratch buffer in the
second-level cache, `CHUNK` at a time. Which neighbour it was goes to `came`, one byte per group of states and row, and
the path is read from there, backwards. A column of a matrix has few sequences, so time is the latency of a step, and
each has eight warps: 137 instructions and four barriers at L = 12 and K = 2 (SASS, sm_90).

The float32 operations are those of `viterbi.reference`, in the same order and not fused, and ties go to the first
state: the same states, on any GPU. (Triton 3.6 fuses for compute capability 10 and above, also where it is told not to:
there paths are found that are as good, and may be others.)
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 13  # bits of a window whose costs stay in registers: 32 per thread
CHUNK = 1 << 13  # states of a step at a time, of larger windows
MEMORY = 1 << 28  # bytes of `came` and scratch, in one launch


def best(x: Tensor, weight: Tensor, values: Tensor, bits: int, seam: Tensor) -> Tensor:
    """States int32 `[n, T]` of the best path; see `viterbi.reference`."""
    n, (vector, states) = len(x), values.shape
    length = x.shape[1] // vector
    x, weight, values = x.contiguous(), weight.contiguous(), values.contiguous()
    seam = seam.to(torch.int32).contiguous()
    found = torch.empty((n, length), dtype=torch.int32, device=x.device)
    groups, small = states >> bits, states <= 1 << LARGEST
    each = length * groups + (0 if small else 8 * states)
    step = max(1, MEMORY // each)
    for start in range(0, n, step):
        part = slice(start, min(n, start + step))
        count = part.stop - part.start
        came = torch.empty((count, length, groups), dtype=torch.uint8, device=x.device)
        arguments = x[part], weight[part], values, seam[part], came, found[part]
        # fused, a product and its sum would be rounded once, and costs would not be the reference's
        named: Any = {"STATES": states, "BITS": bits, "VECTOR": vector, "num_warps": 8, "enable_fp_fusion": False}
        with torch.cuda.device_of(x):
            if small:
                small_kernel[(count,)](*arguments, length, **named)
            else:
                scratch = torch.empty((count, 2, states), dtype=torch.float32, device=x.device)
                large_kernel[(count,)](*arguments, scratch, length, GROUPS=CHUNK >> bits, **named)
    return found


@triton.jit
def _leave(least, first, second, x, weight, t, VECTOR: tl.constexpr):
    """Costs `[ways, groups]` of the states that `least` `[groups]` leads into at step `t`, from their values."""
    off = tl.load(x + t * VECTOR) - first
    cost = least[None, :] + tl.load(weight + t * VECTOR) * (off * off)
    if VECTOR == 2:
        off = tl.load(x + t * 2 + 1) - second
        cost += tl.load(weight + t * 2 + 1) * (off * off)
    return cost


@triton.jit
def _values(values, number, STATES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.load(values + number), tl.load(values + (VECTOR - 1) * STATES + number)


@triton.jit
def _begin(seam, group):
    return tl.where((seam < 0) | (group == seam), 0.0, 1e30)


@triton.jit
def _trace(state, came, states, length, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Writes the path that ends in `state`, from its end."""
    for back in range(length - 1):
        t = length - 1 - back
        tl.store(states + t, state)
        low = state & (GROUPS - 1)
        state = low << BITS | tl.load(came + t * GROUPS + low).to(tl.int32)
    tl.store(states, state)


@triton.jit
def small_kernel(
    x, weight, values, seam, came, states, length, STATES: tl.constexpr, BITS: tl.constexpr, VECTOR: tl.constexpr
):
    """All costs in registers."""
    row = tl.program_id(0).to(tl.int64)
    GROUPS: tl.constexpr = STATES >> BITS
    WAYS: tl.constexpr = 1 << BITS
    x += row * length * VECTOR
    weight += row * length * VECTOR
    came += row * length * GROUPS
    group = tl.arange(0, GROUPS)
    number = tl.arange(0, WAYS)[:, None] * GROUPS + group[None, :]
    first, second = _values(values, number, STATES, VECTOR)
    held = tl.load(seam + row)
    cost = _leave(_begin(held, group), first, second, x, weight, 0, VECTOR)
    for t in range(1, length):
        least, way = tl.min(tl.reshape(cost, (GROUPS, WAYS)), 1, return_indices=True)
        tl.store(came + t * GROUPS + group, way.to(tl.uint8))
        cost = _leave(least, first, second, x, weight, t, VECTOR)
    cost = tl.where((held < 0) | (number >> BITS == held), cost, float("inf"))
    # not argmin of a reshape: Triton 3.6 lets it reorder the costs, but not their numbers
    least = tl.min(tl.min(cost, 0), 0)
    state = tl.min(tl.min(tl.where(cost == least, number, STATES - 1), 0), 0)  # of costs that are NaN the last one
    tl.debug_barrier()  # what other threads know of `came`
    _trace(state, came, states + row * length, length, GROUPS, BITS)


@triton.jit
def large_kernel(
    x, weight, values, seam, came, states, scratch, length,
    STATES: tl.constexpr, BITS: tl.constexpr, VECTOR: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Costs in `scratch` `[2, STATES]`, the old ones in one half and the new ones in the other; GROUPS at a time."""
    row = tl.program_id(0).to(tl.int64)
    ALL: tl.constexpr = STATES >> BITS
    WAYS: tl.constexpr = 1 << BITS
    x += row * length * VECTOR
    weight += row * length * VECTOR
    came += row * length * ALL
    scratch += row * 2 * STATES
    held = tl.load(seam + row)
    way = tl.arange(0, WAYS)
    for first in range(0, ALL, GROUPS):
        group = first + tl.arange(0, GROUPS)
        number = way[:, None] * ALL + group[None, :]
        one, two = _values(values, number, STATES, VECTOR)
        cost = _leave(_begin(held, group), one, two, x, weight, 0, VECTOR)
        tl.store(scratch + number, cost)
    for t in range(1, length):
        tl.debug_barrier()
        old = scratch + (t - 1) % 2 * STATES
        new = scratch + t % 2 * STATES
        for first in range(0, ALL, GROUPS):
            group = first + tl.arange(0, GROUPS)
            number = way[:, None] * ALL + group[None, :]
            least, came_by = tl.min(tl.load(old + group[:, None] * WAYS + way[None, :]), 1, return_indices=True)
            tl.store(came + t * ALL + group, came_by.to(tl.uint8))
            one, two = _values(values, number, STATES, VECTOR)
            tl.store(new + number, _leave(least, one, two, x, weight, t, VECTOR))
    tl.debug_barrier()
    final = scratch + (length - 1) % 2 * STATES
    least = float("inf")
    state = 0
    for first in range(0, STATES, GROUPS):
        number = first + tl.arange(0, GROUPS)
        cost = tl.where((held < 0) | (number >> BITS == held), tl.load(final + number), float("inf"))
        found, place = tl.min(cost, 0, return_indices=True)
        state = tl.where(found < least, first + place, state)
        least = tl.minimum(found, least)
    _trace(state, came, states + row * length, length, ALL, BITS)
