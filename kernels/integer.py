"""Products with activations rounded to 8 bits, token by token: what they are, in plain torch, to the last bit.

Each token `x` `[K]` gets a scale `s = max |x| / 127` and codes `round(x / s)`, as ViDiT-Q's dynamic quantization
(arXiv 2406.02540, section 3.2). Codes are summed as integers over a span of columns: a group, cut into at most 128.
Then, in float32, every operation rounded once and in this order,

    acc = acc + (sum c x - z sum x) * scale,   out = acc * s + bias

span after span. `acc` begins with 0 in every part of K, `part(K)` columns, and the parts are added up in their order.
Integers below 2^24 are exact in float32, so a float32 matrix product of one span is the integer one whatever order it
sums in: a CPU and the Triton kernels (`integer_launch.py`), of which several programs share K, give the same bits,
whatever the GPU and however many tokens (but for compute capability 10 and above with Triton 3.6, which fuses products
and sums there though it is told not to).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from quant.kernels.layouts import PackedUniform
from quant.kernels.order import Arranged, plain
from quant.kernels.reference import MAX_BYTES, check_shape, row_chunks, straight_through

LEVELS = 127
LONGEST = 128
"""Columns of the longest span."""


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[M, K]` and scales float32 `[M]` of tokens `x` `[M, K]`; the same on every device."""
    # times 1 / 127: CUDA divides by a number so, and a CPU does not
    scale = (x.float().abs().amax(1) * (1 / LEVELS)).clamp_min(torch.finfo(torch.float32).tiny)
    return (x.float() / scale[:, None]).round_().to(torch.int8), scale


def rounded(x: Tensor) -> Tensor:
    """What the tokens `x` `[..., K]` are rounded to, float32."""
    codes, scale = round_tokens(x.reshape(-1, x.shape[-1]))
    return codes.float().mul_(scale[:, None]).view(x.shape)


def span(width: int, columns: int, most: int = 256) -> int:
    """Columns summed up at once, for groups of `width`."""
    if width >= columns:
        return most
    return next((size for size in (256, 128, 64, 32) if size <= most and width % size == 0), 0)


def part(columns: int) -> int:
    """Columns that are added up by themselves: about 1024, whole tiles of 256."""
    tiles = math.ceil(columns / 256)
    return math.ceil(tiles / math.ceil(tiles / 4)) * 256


def matmul(x: Tensor, packed: PackedUniform | Arranged, bias: Tensor | None = None) -> Tensor:
    """`x` `[..., K]` rounded to 8 bits times the weight `[N, K]` transposed, plus `bias` `[N]`: `[..., N]` in `x`'s
    dtype. Its gradient is that of the unrounded product (arXiv 1308.3432). Raises `ValueError` where the shapes do not
    fit.
    """
    check_shape(x, packed)
    if x.requires_grad:
        out = straight_through(x, packed, lambda x: matmul(x, packed))
        return out if bias is None else out + bias.to(out.dtype)
    packed = plain(packed) if isinstance(packed, Arranged) else packed
    codes, scale = round_tokens(x.reshape(-1, x.shape[-1]))
    out = x.new_empty((len(codes), packed.shape[0]))
    for start, stop in row_chunks(packed, torch.float32, MAX_BYTES):
        with torch.autocast(x.device.type, enabled=False):
            acc = _accumulated(codes, packed, start, stop).mul_(scale[:, None])
        out[:, start:stop] = acc if bias is None else acc.add_(bias[start:stop].float())
    return out.view(*x.shape[:-1], packed.shape[0])


def _accumulated(codes: Tensor, packed: PackedUniform, start: int, stop: int) -> Tensor:
    """`acc` float32 `[M, stop - start]` before the tokens' scales."""
    columns = packed.shape[1]
    width = packed.spec.group_width(columns)
    weight, zeros = packed.codes(start, stop), packed.zero_points(start, stop)
    scales = packed.scales[start:stop].float()
    total = codes.new_zeros((len(codes), stop - start), dtype=torch.float32)
    each = part(columns)
    for first in range(0, columns, each):
        acc, step = torch.zeros_like(total), span(width, columns, LONGEST)
        for begin in range(first, min(first + each, columns), step):
            some, group = slice(begin, min(begin + step, columns)), begin // width
            shifted = weight[:, some].float() - zeros[:, group, None]
            acc.add_(linear(codes[:, some].float(), shifted).mul_(scales[:, group]))
        total = acc if first == 0 else total.add_(acc)
    return total
