"""Running the trellis kernels: which blocks, and the operators that torch.compile sees.

As `launch.py` for uniform weights, whose scratch memory and counters it shares: up to `UNPACK_FROM` tokens one kernel
decodes every weight once per 2, 4, 8 or 16 tokens; from there on the weight is decoded once, in slices of bounded size,
and multiplied by torch (cuBLAS).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant.kernels.available import missing
from quant.kernels.launch import (
    KINDS,
    Config,
    aligned,
    even_splits,
    fresh_counters,
    input_gradient,
    multiply_unpacked,
    processor,
)
from quant.kernels.reference import Weight, check_shape
from quant.kernels.trellis import scale_values
from quant.kernels.trellis_order import CHUNK, UNIT, ArrangedTrellis, chunks, units

UNPACK_FROM = 96
"""Tokens from which decoding once pays: of 2 bits and 28672 x 8192 the kernel takes 567 us of an H200 for 64 tokens and
1077 for 128, decoding and cuBLAS 860; decoding has become faster since, by what no GPU has measured."""

DECODED = 8
"""Chunks that a program decodes when a whole weight is: its rows' scales are read once."""

MASK = 0x8FFF8FFF - (1 << 32)
"""Of `inst`; an argument of the kernels, see `trellis_product.py`."""


INTEGER = ("mac", "sum")
"""Codes that are multiplied as integers, with two or four columns of a product to a token."""

MOST = 16384
"""Columns of which a program of such a code may sum 32 bits: `1020 * 127 * MOST < 2^31`."""


def choose(
    tokens: int, rows: int, columns: int, processors: int, code: str = "twin", warps: int = 0, most: int = 0
) -> Config:
    """The configuration without a tuned one: a warp and 256 rows per program, K split until every multiprocessor has
    about so many `warps`, into `most` parts; 0: what was fastest on an H200 (`README.md`). Multiples of four go best: a
    multiprocessor has four schedulers. `code`: as `compiled_code` names it."""
    if code == "twin":
        bm = next(size for size in (2, 4, 8) if tokens <= size or size == 8)
    else:
        bm = (4 if tokens <= 4 else 8) if code in INTEGER else 8 if tokens <= 8 or code == "hyb" else 16
    passes = -(-tokens // bm)
    programs = -(-rows // (16 * UNIT)) * passes
    most = most or ((64 if programs < 8 else 32) if tokens == 1 else max(1, 16 // passes))
    few = (tokens == 1 and code != "mac") or (tokens == 2 and code == "twin")
    wanted = min(most, processors * (warps or (12 if few else 8)) // programs)
    return Config(bm, 16 * UNIT, 1, 1, even_splits(columns, max(wanted, -(-columns // MOST)), CHUNK))


def compiled_code(code: str, bits: int) -> str:
    """What the kernels call a code: `mac` is `twin` where a state has two values."""
    return "twin" if code == "mac" and bits <= 2 else code


def candidates(tokens: int, rows: int, columns: int, processors: int, code: str = "twin") -> list[Config]:
    """Configurations worth timing: how K is split."""
    made = [choose(tokens, rows, columns, processors, code, warps, 64) for warps in (4, 6, 8, 10, 12, 16, 20, 24)]
    return list(dict.fromkeys(made))


def refuses(x: Tensor, arranged: Weight) -> str | None:
    """Why the kernels do not take these arguments; None where they do."""
    reason = missing(x)
    if reason is not None:
        return reason
    if x.device != arranged.device:
        return f"x is on {x.device}, the weight on {arranged.device}"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernels multiply float16 and bfloat16"
    return None


def matmul(x: Tensor, arranged: ArrangedTrellis, bias: Tensor | None = None) -> Tensor:
    """`x` `[..., K]` float16 or bfloat16 times the weight `[N, K]` transposed, plus `bias` `[N]`: `[..., N]` in `x`'s
    dtype, accumulated in float32. Differentiable with respect to both. Raises `ValueError` where the shapes do not fit.
    """
    check_shape(x, arranged)
    flat = x.reshape(-1, x.shape[-1])
    out = torch.ops.bitwright.trellis_matmul(flat, *_held(arranged), bias, *_sizes(arranged), x.dtype)
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
) -> Tensor:  # fmt: skip
    """`x` `[M, columns]` times a weight in kernel order: `[M, rows]` of `dtype`."""
    out = torch.empty((len(x), rows), dtype=dtype, device=x.device)
    held, sizes = (weight, scales, peaks, table), (rows, columns, bits, window, code, table_bits, length)
    if len(x) < UNPACK_FROM:
        launch(x, *held, bias, out, *sizes, None)
        return out
    multiply_unpacked(x, out, columns, lambda *part: trellis_dequantize(*held, *sizes, dtype, *part))
    if bias is not None:
        out += bias
    return out


@trellis_matmul.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    rows, dtype = rest[5], rest[12]
    return x.new_empty((x.shape[0], rows), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.sizes, ctx.bias = inputs[6:13], inputs[5] if inputs[5] is None else inputs[5].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    unpack = lambda *part: trellis_dequantize(*ctx.saved_tensors, *ctx.sizes, grad.dtype, *part)  # noqa: E731
    x_grad = input_gradient(grad, ctx.sizes[1], unpack) if ctx.needs_input_grad[0] else None
    bias_grad = grad.sum(0).to(ctx.bias) if ctx.needs_input_grad[5] else None
    return (x_grad, None, None, None, None, bias_grad, *[None] * 8)


trellis_matmul.register_autograd(_backward, setup_context=_keep)


def launch(
    x: Tensor, weight: Tensor, scales: Tensor, peaks: Tensor, table: Tensor | None, bias: Tensor | None, out: Tensor,
    rows: int, columns: int, bits: int, window: int, code: str, table_bits: int, length: int, config: Config | None,
) -> None:  # fmt: skip
    """Fills `out` `[M, N]`. `config`: None for the default one."""
    from quant.kernels.trellis_product import trellis_kernel
    from quant.kernels.tune import tuned  # it needs this module

    tokens = len(out)
    if not out.numel():
        return
    x = aligned(x)
    config = config or tuned(x.device, tokens, rows, columns, bits, f"{code}-{KINDS[x.dtype]}", CHUNK)
    config = config or choose(tokens, rows, columns, processor(x.device)[0], compiled_code(code, bits))
    if code in INTEGER:  # a tuned one may be of fewer columns
        config = replace(config, splits=even_splits(columns, max(config.splits, -(-columns // MOST)), CHUNK))
    grid = (-(-rows // (16 * UNIT)), config.splits, -(-tokens // config.bm))
    partial, counters = out, out
    if config.splits > 1:
        partial = torch.empty((config.splits, tokens, rows), dtype=torch.float32, device=x.device)
        counters = fresh_counters(grid[0] * grid[2], x.device)
    count, (whole, total) = chunks(columns), units(rows, length)
    with torch.cuda.device_of(x):
        trellis_kernel[grid](
            x, weight, scales, peaks, weight if table is None else table.view(torch.int32), scale_table(x.device),
            out if bias is None else bias, out, partial, counters,
            tokens, rows, x.shape[1], x.stride(0), count, -(-count // config.splits), total, whole, MASK,
            **constants(bits, window, code, table_bits, length, x.device),
            BM=config.bm, ONE=tokens == 1, SPLIT=config.splits > 1, EVEN=columns % CHUNK == 0, BIAS=bias is not None,
            num_warps=1, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip


def run(x: Tensor, arranged: ArrangedTrellis, config: Config, out: Tensor) -> None:
    """Fills `out` `[M, N]` with one configuration."""
    launch(x, *_held(arranged), None, out, *_sizes(arranged), config)


def constants(bits: int, window: int, code: str, table_bits: int, length: int, device: torch.device) -> dict[str, Any]:
    """What the kernels are compiled for beside their blocks."""
    known = {"BITS": bits, "WINDOW": window, "CODE": compiled_code(code, bits), "TABLE": table_bits, "LENGTH": length}
    return {**known, "NATIVE": device.type == "cuda"}


@cache
def scale_table(device: torch.device) -> Tensor:
    """The scale of each of the 256 codes where the peak is 1, float32."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    return scale_values(codes, torch.ones(256, device=device))


@torch.library.custom_op("bitwright::trellis_dequantize", mutates_args=())
def trellis_dequantize(
    weight: Tensor, scales: Tensor, peaks: Tensor, table: Tensor | None, rows: int, columns: int, bits: int,
    window: int, code: str, table_bits: int, length: int, dtype: torch.dtype, start: int, stop: int,
) -> Tensor:  # fmt: skip
    """See `dequantize`."""
    from quant.kernels.trellis_decode import decode_kernel

    out = torch.empty((stop - start, columns), dtype=dtype, device=weight.device)
    if out.numel():
        (whole, total), count = units(rows, length), chunks(columns)
        grid = (-(-(-(-stop // UNIT) - start // UNIT) // 8), -(-count // DECODED))
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
