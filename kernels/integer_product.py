"""The Triton kernel that multiplies many tokens of 8 bits by a weight that was unpacked to int8 (`integer_launch.py`).

A tensor core product of int8 over each span of columns, then that span's scales, in float32; every step as `integer.py`
defines it. Operands lie in memory as the instruction wants them, so nothing is left to a compiler's choice of layouts:
a kernel that made its operand of the packed codes was right under the interpreter and with Triton 3.9, and wrong on an
H200 with Triton 3.6.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("M", "first", "count"))
def integer_kernel(
    x, x_scale, sums, weight, scales, zeros, bias, out, M, N, K, first, count,
    GROUP: tl.constexpr, SPAN: tl.constexpr, PART: tl.constexpr, SUMS: tl.constexpr, UNIT: tl.constexpr,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`out` `[M, N]`, its columns `first` to `first + count`: `x` int8 `[M, K]` times `weight` int8 `[count, K]`
    transposed. `scales` and `zeros` `[groups, N]`; GROUP columns share one (0: all of them), SPAN columns are summed as
    integers, PART by themselves. SUMS: the weight carries 128 less its zero points, and `sums` int32 `[spans, M]` are
    those of `x`. UNIT: what the weight counts, a power of two."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    mine = tl.program_id(1) * BN + tl.arange(0, BN)
    row, k = first + mine, tl.arange(0, SPAN)
    live, inside = tokens < M, mine < count
    some = x + tl.minimum(tokens, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    codes = weight + tl.minimum(mine, count - 1).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for part in range(0, K, PART):
        acc = tl.zeros((BM, BN), tl.float32)
        for begin in range(part, tl.minimum(part + PART, K), SPAN):
            here = begin + k < K
            left = tl.load(some + begin, mask=here[None, :], other=0)
            right = tl.load(codes + begin, mask=here[:, None], other=0)
            value = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32) * UNIT
            group = begin // GROUP if GROUP > 0 else 0
            if SUMS:
                zero = tl.load(zeros + group * N + row, mask=inside, other=0).to(tl.float32) - 128.0
                carried = tl.load(sums + begin // SPAN * M + tokens, mask=live, other=0).to(tl.float32)
                value -= zero[None, :] * carried[:, None]
            scale = tl.load(scales + group * N + row, mask=inside, other=0.0).to(tl.float32)
            acc += value * scale[None, :]
        total += acc
    total *= tl.load(x_scale + tokens, mask=live, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = out + tokens.to(tl.int64)[:, None] * N + row[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])
