"""The Triton kernel that multiplies by uniform weights in kernel order (`order.py`).

It computes `out[M, N] = x[M, K] @ W[N, K]^T` for any M, wherever `skinny.py`'s kernel does not: for groups of fewer
than 32 columns and rows whose number is no multiple of 8. Block sizes decide whether it reads every
weight byte once (BM 8 to 64, one warp, K split over programs) or is a tensor core GEMM (BM from 64, four or eight
warps). What the codes are multiplied as is told in `codes.py`; what every code carries beyond itself (128 in
bfloat16) and the unit of float16's subnormal numbers, `2^-24`, come off in float32 at the end of a group.

Zero points come off once per group: `sum (c - z) x = sum c x - z sum x`, and the tensor core that idles computes
`sum x` too, as a product with ones. Accumulation is in float32, group by group; a group's scale enters as one fused
multiply-add. Groups of fewer than 32 columns have their scale put on the weight instead.

With K split, each program leaves its float32 part in `partial`; the last one to arrive at a tile of the output, whoever
it is, adds the parts in their order. So results do not depend on timing. It also puts the counter back to zero.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.codes import chunk_codes, dot, high_codes, inputs, operand, tile_words, unit_words
from quant.kernels.warp import numbers


@triton.jit
def _grid(scales, zeros, group, N, rows, inside, ZERO: tl.constexpr):
    """Scale and zero point float32 `[BN]` of one group; ZERO is that of a symmetric spec, or below 0."""
    scale = tl.load(scales + group * N + rows, mask=inside, other=0.0).to(tl.float32)
    if ZERO >= 0:
        zero = tl.full(scale.shape, ZERO, tl.float32)
    else:
        zero = tl.load(zeros + group * N + rows, mask=inside, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def _scaled(codes, scales, zeros, k, N, K, rows, inside, GROUP: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """The weights themselves, `(c - z) s`, where only the 8 columns of a lane are sure to share a group: `[BN, r, 4, e,
    p]` in the order of `operand`."""
    lanes = tl.minimum((k + tl.arange(0, 4) * 8) // GROUP, (K - 1) // GROUP)
    at = lanes[None, :] * N + rows[:, None]
    scale = tl.load(scales + at, mask=inside[:, None], other=0.0).to(tl.float32)[:, :, None, None, None]
    if ZERO >= 0:
        zero = ZERO
    else:
        zero = tl.load(zeros + at, mask=inside[:, None], other=0).to(tl.float32)[:, :, None, None, None]
    values = tl.join((codes & 0xFFFF).to(tl.float32), ((codes >> 16) & 0xFFFF).to(tl.float32))
    return tl.permute(((values - zero) * scale).to(DTYPE), (0, 2, 1, 3, 4))


@triton.jit
def larger(most, words, KIND: tl.constexpr):
    """The larger of `most` and the largest number by size in words of two of them; NaN if there is one."""
    for i in tl.static_range(len(words)):
        low, high = numbers(words[i], KIND)
        either = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
        most = tl.maximum(most, either, propagate_nan=tl.PropagateNan.ALL)
    return most


@triton.jit
def power(largest):
    """The power of two that puts a float32 between 2^14 and 2^15."""
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15), 254)
    return (268 - exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse(up):
    """Of a power of two."""
    return ((254 << 23) - up.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def leave(acc, partial, at, here, M, N):
    """Puts this program's part where the last one finds it."""
    tl.store(partial + tl.program_id(1).to(tl.int64) * M * N + at, acc, mask=here)


@triton.jit
def is_last(counters):
    """Whether all other programs of this tile of the output have left their parts."""
    tl.debug_barrier()
    counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(1) - 1
    if last:
        tl.debug_barrier()
        tl.store(counter, 0)
    return last


@triton.jit
def collected(partial, at, here, M, N, AHEAD: tl.constexpr):
    """The sum of all parts, in their order. AHEAD of them are on their way at a time."""
    acc = tl.zeros(at.shape, tl.float32)
    splits = tl.num_programs(1)
    for first in range(0, splits, AHEAD):
        for part in tl.static_range(AHEAD):
            mine = partial + tl.cast(first + part, tl.int64) * M * N + at
            acc += tl.load(
                mine,
                mask=here & (tl.full(here.shape, first + part, tl.int32) < splits),
                other=0.0,
                cache_modifier=".cg",
            )
    return acc


@triton.jit
def gathered(acc, partial, counters, at, here, M, N):
    """Leaves this program's part; the sum of all parts and True for the last program to come."""
    leave(acc, partial, at, here, M, N)
    last = is_last(counters)
    if last:
        acc = collected(partial, at, here, M, N, 4)
    return acc, last


@triton.jit
def _flush(
    acc, dots, sums, scales, zeros, group, N, rows, inside, ZERO: tl.constexpr, BASE: tl.constexpr, UNIT: tl.constexpr
):
    """Adds a group's products, with its scale on them and its zero point off."""
    scale, zero = _grid(scales, zeros, group, N, rows, inside, ZERO)
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    total = tl.broadcast_to(sums[None], (BN // 16, 16, BM)).reshape(BN, BM)
    return acc + (dots * UNIT - (zero + BASE)[:, None] * total) * scale[:, None]


@triton.jit
def stored(
    acc, x_scale, bias, residual, out, rows, tokens, inside, live, N,
    ROUNDED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """`x_scale` of ROUNDED: the tokens' scales, float32."""
    at = tokens[None, :].to(tl.int64) * N + rows[:, None]
    here = inside[:, None] & live[None, :]
    if ROUNDED:
        acc *= tl.load(x_scale + tokens, mask=live, other=0.0)[None, :]
    if BIAS:
        acc += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        acc += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=("M", "count", "each"))  # or 1 and multiples of 16 would be compiled once more
def matmul_kernel(
    x, weight, scales, zeros, bias, residual, out, partial, counters,
    M, N, K, stride, count, each,
    BITS: tl.constexpr, GROUP: tl.constexpr, FLUSH: tl.constexpr, ZERO: tl.constexpr, KIND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`x` `[M, K]` with rows `stride` apart; `count` tiles of K, `each` of them per split. GROUP columns share a scale
    (0: all of them). FLUSH: columns after which a group may end, 0 where groups are smaller than a chunk. BASE is what
    every code carries beyond itself."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    tokens = tl.program_id(2) * BM + tl.arange(0, BM)
    inside, live = rows < N, tokens < M
    UNIT: tl.constexpr = 16777216.0 if KIND == "fp16" else 1.0
    MAGIC: tl.constexpr = 0x43004300 if KIND == "bf16" else 0
    ONE: tl.constexpr = 0x3C003C00 if KIND == "fp16" else 0x3F803F80
    BASE: tl.constexpr = (2176.0 if BITS == 8 else 128.0) if KIND == "bf16" else 0
    acc = tl.zeros((BN, BM), tl.float32)
    dots = tl.zeros((BN, BM), tl.float32)
    sums = tl.zeros((16, BM), tl.float32)
    places = x + tokens[None, :].to(tl.int64) * stride + tl.arange(0, 32)[:, None]
    for tile in range(split * each, tl.minimum(split * each + each, count)):
        words = tile_words(weight, tile, N, rows, inside, BITS, BN)
        ones = operand(unit_words(weight, N, ONE), 16, KIND)
        for chunk in tl.static_range(8):
            k = tile * 256 + chunk * 32
            here = live[None, :] if EVEN else live[None, :] & (k + tl.arange(0, 32) < K)[:, None]
            some = inputs(tl.load(places + k, mask=here, other=0.0), BM)
            codes = chunk_codes(words, chunk, BITS)
            if FLUSH == 0:  # a lane's 8 columns share a group: (c - z) s in the weight
                if BITS == 8:
                    codes |= high_codes(words, chunk) << 4
                numbers = _scaled(codes, scales, zeros, k, N, K, rows, inside, GROUP, ZERO, some.dtype)
                acc = dot(tl.reshape(numbers, (BN, 32)), some, acc, WIDEN)
            else:
                if BITS == 8:
                    if KIND == "bf16":
                        dots = dot(operand(high_codes(words, chunk) | 0x45004500, BN, KIND), some, dots, WIDEN)
                    else:
                        codes |= high_codes(words, chunk) << 4
                dots = dot(operand(codes | MAGIC, BN, KIND), some, dots, WIDEN)
                sums = dot(ones, some, sums, WIDEN)
                if (chunk * 32 + 32) % FLUSH == 0:
                    group = 0
                    if GROUP > 0:
                        group = tl.minimum((k + 32 - FLUSH) // GROUP, (K - 1) // GROUP)
                    acc = _flush(acc, dots, sums, scales, zeros, group, N, rows, inside, ZERO, BASE, UNIT)
                    dots = tl.zeros((BN, BM), tl.float32)
                    sums = tl.zeros((16, BM), tl.float32)
    at = tokens[None, :].to(tl.int64) * N + rows[:, None]
    here = inside[:, None] & live[None, :]
    last = not SPLIT
    if SPLIT:
        acc, last = gathered(acc, partial, counters, at, here, M, N)
    if last:
        stored(acc, x, bias, residual, out, rows, tokens, inside, live, N, False, BIAS, RESIDUAL)
