"""`x @ weight.T` for a packed weight in plain torch: the slow truth that runs on any device.

Rows of the weight are dequantized in chunks of bounded size and multiplied, so the packed weight stays packed and the
extra memory does not grow with it. The backward pass dequantizes again instead of keeping the float weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from quant.kernels.available import transformed
from quant.kernels.codebook_order import ArrangedCodebook
from quant.kernels.layouts import Packed, rows_at_once
from quant.kernels.order import Arranged
from quant.kernels.trellis_order import ArrangedTrellis

Weight = Packed | Arranged | ArrangedTrellis | ArrangedCodebook
"""A weight in the order of the checkpoint or of the GPU kernels; rotated, smoothed and low-rank ones around either."""

Product = Callable[[Tensor], Tensor]
MAX_BYTES = 32 << 20


def matmul(x: Tensor, packed: Weight, bias: Tensor | None = None, max_bytes: int = MAX_BYTES) -> Tensor:
    """`x` `[..., in]` times the packed weight `[out, in]` transposed, plus `bias` `[out]`: `[..., out]` in `x`'s dtype.

    The weight is dequantized in `x`'s dtype, at most about `max_bytes` at a time (but never less than a row).
    Differentiable with respect to `x` and `bias`. Raises `ValueError` where the shapes or dtypes do not fit.
    """
    check_shape(x, packed)
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; a floating-point tensor is expected")
    forward = lambda x: _forward(x, packed, max_bytes)  # noqa: E731
    out = straight_through(x, packed, forward, max_bytes) if x.requires_grad else forward(x)
    return out if bias is None else out + bias.to(out.dtype)


def check_shape(x: Tensor, packed: Weight) -> None:
    if x.ndim == 0 or x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}; its last dimension must be {packed.shape[1]}")


def row_chunks(packed: Weight, dtype: torch.dtype, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Row ranges whose dequantization stays below `max_bytes`, the float32 values and the codes on the way included."""
    per_row = packed.shape[1] * (5 + (0 if dtype == torch.float32 else dtype.itemsize))
    step = max(1, min(max_bytes // max(1, per_row), rows_at_once(packed.device, packed.shape[1])))
    for start in range(0, packed.shape[0], step):
        yield start, min(start + step, packed.shape[0])


def _forward(x: Tensor, packed: Weight, max_bytes: int) -> Tensor:
    chunks = list(row_chunks(packed, x.dtype, max_bytes))
    if len(chunks) == 1:
        return linear(x, packed.dequantize(x.dtype))
    out = x.new_empty((*x.shape[:-1], packed.shape[0]))
    for start, stop in chunks:
        out[..., start:stop] = linear(x, packed.dequantize(x.dtype, start, stop))
    return out


def straight_through(x: Tensor, packed: Weight, forward: Product, max_bytes: int = MAX_BYTES) -> Tensor:
    """`forward(x)` with the gradient of the plain product."""
    return (_transformed if transformed() else _Matmul.apply)(x, packed, max_bytes, forward)


class _Matmul(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, packed: Weight, max_bytes: int, forward: Product) -> Tensor:
        return forward(x.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.packed, ctx.max_bytes, _ = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        grad_x = grad.new_zeros((*grad.shape[:-1], ctx.packed.shape[1]))
        for start, stop in row_chunks(ctx.packed, grad.dtype, ctx.max_bytes):
            grad_x += grad[..., start:stop] @ ctx.packed.dequantize(grad.dtype, start, stop)
        return grad_x, None, None, None


class _Transformed(_Matmul):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _forward(tangents[0], ctx.packed, ctx.max_bytes)


_transformed: Any = torch.compiler.disable(_Transformed.apply)  # Dynamo traces no `jvp`, or drops it
