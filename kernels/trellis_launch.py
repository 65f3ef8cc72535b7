"""Running the trellis kernels: which blocks, and the operators that torch.compile sees.

As `launch.py` for uniform weights, whose scratch memory and counters it shares: up to `UNPACK_FROM` tokens one kernel
decodes every weight once per 2, 4, 8 or 16 tokens; from there on the weight is decoded once, in slices of bounded size,
and multiplied by torch (cuBLAS).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.kernels.available import clusters, early, missing
from quant.kernels.blocks import Config, even_splits
from quant.kernels.counters import fresh_counters
from quant.kernels.hadamard import hadamard
from quant.kernels.launch import KINDS, aligned, input_gradient, multiply_unpacked, processor
from quant.kernels.reference import Weight, check_shape
from quant.kernels.rotated import IDENTITY, Rotation
from quant.kernels.scales import scale_table
from quant.kernels.trellis_blocks import (
    INTEGER,
    MOST,
    alone,
    apart_of,
    blocks_of,
    busy,
    choose,
    compiled_code,
    turns,
    turns_of,
)
from quant.kernels.trellis_order import CHUNK, UNIT, ArrangedTrellis, chunks, units

UNPACK_FROM = 96
"""Tokens from which decoding once pays: of 2 and 4 bits and 28672 x 8192 the kernel takes 345 and 430 us of an H200 for
96 tokens and 412 and 539 for 128, decoding and cuBLAS 386 to 410."""

DECODED = 8
"""Chunks that a program decodes when a whole weight is: its rows' scales are read once."""

MASK = 0x8FFF8FFF - (1 << 32)
"""Of `inst`; an argument of the kernels, see `trellis_product.py`."""


def refuses(x: Tensor, arranged: Weight) -> str | None:
    """Why the kernels do not take these arguments; None where they do."""
    reason = missing(x)
    if reason is not None:
        return reason
    if x.device != arranged.device:
        return f"x is on {x.device}, the weight on {arranged.device}"
    if isinstance(arranged, ArrangedTrellis) and arranged.weight.numel() >> 31:
        return "the weight has 2^31 words or more; the kernels count to that"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernels multiply float16 and bfloat16"
    return None


def matmul(x: Tensor, arranged: ArrangedTrellis, bias: Tensor | None = None, rotation: Rotation = IDENTITY) -> Tensor:
    """`x` `[..., K]` float16 or bfloat16, `rotation` applied, times the weight `[N, K]` transposed, plus `bias` `[N]`:
    `[..., N]` in `x`'s dtype, accumulated in float32. Differentiable with respect to both. Raises `ValueError` where
    the shapes do not fit."""
    check_shape(x, arranged)
    flat = x.reshape(-1, x.shape[-1])
    out = torch.ops.bitwright.trellis_matmul(
        flat, *_held(arranged), bias, *_sizes(arranged), x.dtype, rotation.signs, rotation.block
    )
    return out.view(*x.shape[:-1], arranged.shape[0])


def dequantize(arranged: ArrangedTrellis, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` as a plain matrix, the values of `PackedTrellis.dequantize` bit for bit."""
    return trellis_dequantize(*_held(arranged), *_sizes(arranged), dtype, start, stop)


def _held(arranged: ArrangedTrellis) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return arranged.weight, arranged.scales, arranged.peaks, arranged.table


def _sizes(arranged: ArrangedTrellis) -> tuple[int, int, int, int, str, int, int]:
    """As the operators take them."""
    spec = arranged.spec
    return *arranged.shape, spec.bits, spec.window, spec.code, spec.table_bits, spec.length


@torch.library.custom_op("bitwright::trellis_matmul", mutates_args=())
def trellis_matmul(
    x: Tensor, weight: Tensor, scales: Tensor, peaks: Tensor, table: Tensor | None, bias: Tensor | None, rows: int,
    columns: int, bits: int, window: int, code: str, table_bits: int, length: int, dtype: torch.dtype,
    signs: Tensor | None, block: int,
) -> Tensor:  # fmt: skip
    """`x` `[M, columns]`, with `signs` in blocks of `block` rotated, times a weight in kernel order: `[M, rows]` of
    `dtype`."""
    out = torch.empty((len(x), rows), dtype=dtype, device=x.device)
    held, sizes = (weight, scales, peaks, table), (rows, columns, bits, window, code, table_bits, length)
    if len(x) < UNPACK_FROM:
        launch(x, *held, bias, out, *sizes, None, signs, block)
        return out
    if signs is not None:
        x = hadamard(x, block, signs)
    multiply_unpacked(x, out, columns, lambda *part: trellis_dequantize(*held, *sizes, dtype, *part))
    if bias is not None:
        out += bias
    return out


@trellis_matmul.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    rows, dtype = rest[5], rest[12]
    return x.new_empty((x.shape[0], rows), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5], inputs[14])
    ctx.sizes, ctx.block = inputs[6:13], inputs[15]
    ctx.bias = inputs[5] if inputs[5] is None else inputs[5].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *held, signs = ctx.saved_tensors
    unpack = lambda *part: trellis_dequantize(*held, *ctx.sizes, grad.dtype, *part)  # noqa: E731
    x_grad = input_gradient(grad, ctx.sizes[1], unpack) if ctx.needs_input_grad[0] else None
    if x_grad is not None and signs is not None:
        x_grad = hadamard(x_grad, ctx.block, signs, inverse=True)
    bias_grad = grad.sum(0).to(ctx.bias) if ctx.needs_input_grad[5] else None
    return (x_grad, None, None, None, None, bias_grad, *[None] * 10)


trellis_matmul.register_autograd(_backward, setup_context=_keep)


def launch(
    x: Tensor, weight: Tensor, scales: Tensor, peaks: Tensor, table: Tensor | None, bias: Tensor | None, out: Tensor,
    rows: int, columns: int, bits: int, window: int, code: str, table_bits: int, length: int, config: Config | None,
    signs: Tensor | None = None, block: int = 1,
) -> None:  # fmt: skip
    """Fills `out` `[M, N]`. `config`: None for the default one. `signs`, `block`: how `x` is rotated first, or by the
    product itself."""
    from quant.kernels.trellis_product import trellis_kernel
    from quant.kernels.tune import tuned  # it needs this module

    tokens = len(out)
    if not out.numel():
        return
    name, processors, count = compiled_code(code, bits), processor(x.device)[0], chunks(columns)
    if config is None:
        config = tuned(x.device, tokens, rows, columns, bits, f"{code}-{KINDS[x.dtype]}", CHUNK)
        config = config if config is None or busy(config, count) else None  # it may be of more columns
    config = config or choose(tokens, rows, columns, processors, name, clusters=clusters(x.device))
    if code in INTEGER:  # a tuned one may be of fewer columns
        least = -(-columns // (MOST * config.warps))
        if config.splits < least:
            config = replace(config, splits=even_splits(columns, least, CHUNK * config.warps))
    whole, total = units(rows, length)
    if config.bn < 16 * UNIT and not alone(tokens, name, config, count):
        config = replace(config, bn=16 * UNIT)
    apart, each = apart_of(config), turns_of(config, count)
    if signs is not None and not (
        turns(tokens, name, config, block, count)
        and columns % block == 0 and signs.shape == (columns,) and signs.dtype == torch.int8
        and signs.is_contiguous() and signs.data_ptr() % 8 == 0
    ):  # fmt: skip
        x, signs = hadamard(x, block, signs), None
    block = block if signs is not None else int(alone(tokens, name, config, count))
    if bias is not None:
        bias = bias.expand(rows).contiguous()
    x = aligned(x)
    if tokens * x.stride(0) >> 31:
        x = x.contiguous()
    partial, counters = out, out
    ctas = blocks_of(config, tokens, rows, name, processors, clusters(x.device))
    splits = config.splits // ctas
    grid = (-(-rows // config.bn), splits, -(-tokens // config.bm))
    if splits > 1:
        partial = torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
        counters = fresh_counters(grid[0] * grid[2], x.device)
    with torch.cuda.device_of(x):
        trellis_kernel[grid](
            x, x if signs is None else signs, weight, scales, peaks,
            weight if table is None else table.view(torch.int32), scale_table(x.device),
            out if bias is None else bias, out, partial, counters,
            tokens, rows, x.shape[1], x.stride(0), count, each, total, whole, MASK,
            **constants(bits, window, code, table_bits, length, x.device, config.bm),
            BM=config.bm, APART=apart, WARPS=config.warps, CTAS=ctas, ONE=tokens == 1, SPLIT=splits > 1,
            EVEN=columns == CHUNK * each * apart * config.splits * config.warps, BLOCK=block,
            STEPS=-(-each * apart // 8) if block else 1, BIAS=bias is not None,
            num_warps=config.warps, num_ctas=ctas, num_stages=1, enable_fp_fusion=True, **early(x.device),
        )  # fmt: skip


def run(x: Tensor, arranged: ArrangedTrellis, config: Config, out: Tensor, turn: Rotation = IDENTITY) -> None:
    """Fills `out` `[M, N]` with one configuration."""
    launch(x, *_held(arranged), None, out, *_sizes(arranged), config, turn.signs, turn.block)


def constants(
    bits: int, window: int, code: str, table_bits: int, length: int, device: torch.device, tokens: int = 1
) -> dict[str, Any]:
    """What the kernels are compiled for beside their blocks; `tokens`: of a product."""
    name = compiled_code(code, bits, tokens)
    known = {"BITS": bits, "WINDOW": window, "CODE": name, "TABLE": table_bits, "LENGTH": length}
    return {**known, "NATIVE": device.type == "cuda"}


@torch.library.custom_op("bitwright::trellis_dequantize", mutates_args=())
def trellis_dequantize(
    weight: Tensor, scales: Tensor, peaks: Tensor, table: Tensor | None, rows: int, columns: int, bits: int,
    window: int, code: str, table_bits: int, length: int, dtype: torch.dtype, start: int, stop: int,
) -> Tensor:  # fmt: skip
    """See `dequantize`."""
    from quant.kernels.trellis_unpack import decode_kernel

    out = torch.empty((stop - start, columns), dtype=dtype, device=weight.device)
    if out.numel():
        (whole, total), count = units(rows, length), chunks(columns)
        grid = (-(-(-(-stop // UNIT) - start // UNIT) // 8) * -(-count // DECODED),)
        with torch.cuda.device_of(weight):
            decode_kernel[grid](
                weight, scales, peaks, weight if table is None else table.view(torch.int32),
                scale_table(weight.device), out, start, stop, columns, total, whole, MASK, count,
                **constants(bits, window, code, table_bits, length, weight.device), EACH=DECODED, num_warps=1,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out


@trellis_dequantize.register_fake
def _(weight: Tensor, *rest: Any) -> Tensor:
    columns, dtype, start, stop = rest[4], rest[10], rest[11], rest[12]
    return weight.new_empty((stop - start, columns), dtype=dtype)
