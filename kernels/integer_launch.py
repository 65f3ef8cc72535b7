"""Running products with activations rounded to 8 bits on a GPU: what `integer.py` defines, to the last bit.

Few tokens are multiplied by `skinny.py`'s kernel, where bytes decide and integers would win nothing; from `UNPACK_FROM`
on, or where rows are no multiple of 8, the weight is unpacked to int8, in slices of bounded size, and multiplied by
`integer_product.py`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.kernels.available import hopper
from quant.kernels.blocks import takes_skinny
from quant.kernels.integer import LONGEST, part, round_tokens, span
from quant.kernels.launch import launch, refuses_place, sizes_of, slices, uniform_dequantize
from quant.kernels.order import CHUNK, Arranged
from quant.kernels.reference import check_shape

UNPACK_FROM = 80
"""Tokens from which unpacking pays: of 4 bits and 28672 x 8192 the one kernel takes 289 us of an H200 for 64 tokens and
565 for 128, unpacking and the other 357 and 361."""

STAGES = 4
"""Spans that are on their way at a time."""


def refuses(x: Tensor, arranged: Arranged) -> str | None:
    """Why the kernels do not take these arguments; None where they do. `x` may be float32 too: what is multiplied are
    its codes."""
    if x.requires_grad:
        return "x requires a gradient, and rounding to 8 bits has none"
    width = arranged.spec.group_width(arranged.shape[1])
    if width % CHUNK and width != arranged.shape[1]:
        return f"groups of {width}: the int8 kernel takes multiples of {CHUNK}"
    return refuses_place(x, arranged)


def matmul(x: Tensor, arranged: Arranged, bias: Tensor | None = None) -> Tensor:
    """As `launch.matmul` with activations rounded to 8 bits, token by token. The weight's groups hold multiples of 32
    columns, or all of them."""
    check_shape(x, arranged)
    codes, scale = round_tokens(x.reshape(-1, x.shape[-1]))
    out = torch.ops.bitwright.rounded_matmul(
        codes, scale, arranged.weight, arranged.scales, arranged.zeros, bias, *sizes_of(arranged), x.dtype
    )
    return out.view(*x.shape[:-1], arranged.shape[0])


@torch.library.custom_op("bitwright::rounded_matmul", mutates_args=())
def rounded_matmul(
    x: Tensor, x_scale: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    rows: int, columns: int, bits: int, width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Codes `x` int8 `[M, columns]` with scales `x_scale` float32 `[M]` times a weight in kernel order: `[M, rows]` of
    `dtype`. `width`: columns of a group."""
    out = torch.empty((len(x), rows), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    x = x.contiguous()
    if bias is not None:
        bias = bias.expand(rows).contiguous()
    if len(x) < UNPACK_FROM and takes_skinny(rows, width, columns):
        launch(x.half(), x_scale, weight, scales, zeros, bias, None, out, columns, bits, width, None)
        return out
    for start, stop in slices(rows, columns):
        unpacked = uniform_dequantize(weight, scales, zeros, rows, columns, bits, width, torch.int8, start, stop)
        multiply(x, x_scale, unpacked, scales, zeros, bias, out, start, bits, width)
    return out


@rounded_matmul.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    rows, dtype = rest[5], rest[9]
    return x.new_empty((x.shape[0], rows), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.bias = inputs[5] if inputs[5] is None else inputs[5].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bias_grad = grad.sum(0).to(ctx.bias) if ctx.needs_input_grad[5] else None
    return (*[None] * 5, bias_grad, *[None] * 5)


rounded_matmul.register_autograd(_backward, setup_context=_keep)


def multiply(
    x: Tensor, x_scale: Tensor, unpacked: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    out: Tensor, start: int, bits: int, width: int,
) -> None:  # fmt: skip
    """Fills the columns of `out` `[M, N]` from `start` on with `x` times rows `unpacked` int8 `[n, K]`."""
    from quant.kernels.integer_product import integer_kernel

    (tokens, rows), (count, columns) = out.shape, unpacked.shape
    step = span(width, columns, LONGEST)
    carried = zeros is not None and bits == 8
    unit = 0.5 if zeros is None and bits == 1 else 1.0
    bm, bn, warps = blocks(tokens, hopper(x.device))
    with torch.cuda.device_of(x):
        integer_kernel[(-(-tokens // bm), -(-count // bn))](
            x, x_scale, sums(x, step) if carried else x, unpacked, scales, scales if zeros is None else zeros,
            out if bias is None else bias, out, tokens, rows, columns, start, count,
            GROUP=0 if width >= columns else width, SPAN=step, PART=part(columns), SUMS=carried, UNIT=unit,
            BIAS=bias is not None, BM=bm, BN=bn, num_warps=warps, num_stages=STAGES, enable_fp_fusion=False,
        )  # fmt: skip


def sums(x: Tensor, step: int) -> Tensor:
    """Of each span of `x` `[M, K]`: int32 `[spans, M]`."""
    whole = pad(x, (0, -x.shape[1] % step)).view(len(x), -1, step)
    return whole.sum(2, dtype=torch.int32).T.contiguous()


def blocks(tokens: int, hopper: bool) -> tuple[int, int, int]:
    """Tokens and rows of a program, and its warps. `hopper`: of compute capability 9.0, whose product takes its
    operands from shared memory; elsewhere they want registers."""
    return (16 if tokens <= 16 else 32 if tokens <= 32 else 64), 64, 4 if hopper or tokens <= 32 else 8
