"""Running the uniform kernels: which blocks, what scratch memory, and the operators that torch.compile sees.

`matmul` multiplies by a weight in kernel order. Up to `UNPACK_FROM` tokens one kernel reads every weight byte once per
BM tokens; from there on the weight is unpacked, in slices of bounded size, and multiplied by torch (cuBLAS). Which of
the two is settled inside one torch operator, with a shape rule for `torch.compile` and a gradient: a traced model has
no guard on the number of tokens, and CUDA graphs record whatever ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.kernels.available import missing
from quant.kernels.blocks import Config, choose, is_skinny, step_columns, takes_skinny
from quant.kernels.counters import fresh_counters
from quant.kernels.integer import LONGEST, part, span
from quant.kernels.layouts import symmetric_zero
from quant.kernels.order import TILE, Arranged, tiles
from quant.kernels.reference import check_shape

UNPACK_FROM = 128
"""Tokens from which unpacking pays: at 96 the kernel takes 234 to 249 us of an H200 for 28672 x 8192 and unpacking 304
to 317, at 128 it is 298 to 336 and 307 to 322 (2 and 4 bits)."""

KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def refuses(x: Tensor, arranged: Arranged) -> str | None:
    """Why the kernels do not take these arguments; None where they do."""
    reason = refuses_place(x, arranged)
    if reason is None and x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernels multiply float16 and bfloat16"
    return reason


def refuses_place(x: Tensor, arranged: Arranged) -> str | None:
    """As `refuses`, whatever the dtype."""
    reason = missing(x)
    if reason is not None:
        return reason
    if x.device != arranged.device:
        return f"x is on {x.device}, the weight on {arranged.device}"
    width = arranged.spec.group_width(arranged.shape[1])
    if width % 8 and width != arranged.shape[1]:
        return f"groups of {width}: the kernels take multiples of 8"
    return None


def matmul(x: Tensor, arranged: Arranged, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`x` `[..., K]` float16 or bfloat16 times the weight `[N, K]` transposed, plus `bias` `[N]` and `residual`
    `[..., N]`: `[..., N]` in `x`'s dtype, accumulated in float32. Differentiable with respect to these three. Raises
    `ValueError` where the shapes do not fit."""
    check_shape(x, arranged)
    flat, rows = x.reshape(-1, x.shape[-1]), arranged.shape[0]
    out = torch.ops.bitwright.uniform_matmul(
        flat, arranged.weight, arranged.scales, arranged.zeros, bias,
        None if residual is None else residual.reshape(-1, rows), *sizes_of(arranged), x.dtype,
    )  # fmt: skip
    return out.view(*x.shape[:-1], rows)


def sizes_of(arranged: Arranged) -> tuple[int, int, int, int]:
    """Rows, columns, bits and the width of a group, as the operators take them."""
    return *arranged.shape, arranged.spec.bits, arranged.spec.group_width(arranged.shape[1])


@torch.library.custom_op("bitwright::uniform_matmul", mutates_args=())
def uniform_matmul(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    rows: int, columns: int, bits: int, width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`x` `[M, columns]` times a weight in kernel order: `[M, rows]` of `dtype`. `width`: columns of a group."""
    out = torch.empty((len(x), rows), dtype=dtype, device=x.device)
    if len(x) < UNPACK_FROM:
        launch(x, None, weight, scales, zeros, bias, residual, out, columns, bits, width, None)
        return out
    held, sizes = (weight, scales, zeros), (rows, columns, bits, width)
    multiply_unpacked(x, out, columns, lambda *part: uniform_dequantize(*held, *sizes, dtype, *part))
    for added in (bias, residual):
        if added is not None:
            out += added
    return out


def slices(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges to unpack at once."""
    step = max(64, (1 << 26) // columns)
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def multiply_unpacked(x: Tensor, out: Tensor, columns: int, unpack: Callable[[int, int], Tensor]) -> None:
    """Fills `out` `[M, rows]` with `x` `[M, columns]` times a weight of which `unpack(start, stop)` gives rows."""
    for start, stop in slices(out.shape[1], columns):
        torch.mm(x, unpack(start, stop).T, out=out[:, start:stop])


def input_gradient(grad: Tensor, columns: int, unpack: Callable[[int, int], Tensor]) -> Tensor:
    """`grad` `[M, rows]` times the weight, `[M, columns]`; the weight is unpacked again, slice after slice."""
    x_grad = grad.new_zeros((grad.shape[0], columns))
    for start, stop in slices(grad.shape[1], columns):
        x_grad = x_grad + grad[:, start:stop] @ unpack(start, stop)
    return x_grad


@uniform_matmul.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    rows, dtype = rest[5], rest[9]
    return x.new_empty((x.shape[0], rows), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.sizes, ctx.bias = inputs[6:10], inputs[4] if inputs[4] is None else inputs[4].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    unpack = lambda *part: uniform_dequantize(*ctx.saved_tensors, *ctx.sizes, grad.dtype, *part)  # noqa: E731
    x_grad = input_gradient(grad, ctx.sizes[1], unpack) if ctx.needs_input_grad[0] else None
    bias_grad = grad.sum(0).to(ctx.bias) if ctx.needs_input_grad[4] else None
    return (x_grad, *[None] * 3, bias_grad, grad if ctx.needs_input_grad[5] else None, *[None] * 5)


uniform_matmul.register_autograd(_backward, setup_context=_keep)


def launch(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, out: Tensor, columns: int, bits: int, width: int, config: Config | None,
) -> None:  # fmt: skip
    """Fills `out` `[M, N]`. `config`: None for the default one. `x_scale`: `x` are codes in float16 of tokens with
    these scales, `takes_skinny` the weight, and K is split as `integer.py` says."""
    from quant.kernels.tune import tuned  # it needs this module

    tokens, rows = out.shape
    if not out.numel():
        return
    x = x if x.stride(1) == 1 and x.stride(0) % 8 == 0 else x.contiguous()
    processors, narrow = processor(x.device)
    kind = KINDS[x.dtype]
    skinny = takes_skinny(rows, width, columns)
    if config is None and skinny:
        config = tuned(x.device, tokens, rows, columns, bits, kind, step_columns(bits))
    config = config or choose(tokens, rows, columns, processors, bits, narrow, skinny)
    skinny = skinny and is_skinny(config)
    step = step_columns(bits) if skinny else TILE
    count = -(-columns // step)
    each = -(-count // config.splits)
    if x_scale is not None:
        each = part(columns) // step
        config = replace(config, splits=-(-count // each))
    grid = (-(-rows // config.bn), config.splits, -(-tokens // config.bm))
    partial, counters = out, out
    if config.splits > 1:
        partial = torch.empty((config.splits, tokens, rows), dtype=torch.float32, device=x.device)
        counters = fresh_counters(grid[0] * grid[2], x.device)
    parts = (scales, scales if zeros is None else zeros, out if bias is None else bias.expand(rows).contiguous())
    parts += (out if residual is None else residual.contiguous(), out, partial, counters)
    sizes = (tokens, rows, columns, each)
    most = TILE if x_scale is None else LONGEST
    named = constants(bits, width, columns, zeros is not None, kind, most)
    named |= {"BM": config.bm, "SPLIT": config.splits > 1}
    named |= {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    with torch.cuda.device_of(x):
        if skinny:
            _run_skinny(grid, x, x_scale, weight, parts, count, sizes, named, config)
        else:
            _run(grid, x, weight, parts, count, sizes, named, config)


def run(x: Tensor, arranged: Arranged, config: Config, out: Tensor) -> None:
    """Fills `out` `[M, N]` with one configuration."""
    _, *sizes = sizes_of(arranged)
    launch(x, None, arranged.weight, arranged.scales, arranged.zeros, None, None, out, *sizes, config)


def _run(
    grid: tuple[int, ...], x: Tensor, weight: Tensor, parts: tuple[Tensor, ...], count: int,
    sizes: tuple[int, ...], named: dict[str, Any], config: Config,
) -> None:  # fmt: skip
    from quant.kernels.uniform import matmul_kernel

    tokens, rows, columns, each = sizes
    widen = x.device.type != "cuda" and x.dtype == torch.bfloat16
    matmul_kernel[grid](
        x, weight, *parts, tokens, rows, columns, x.stride(0), count, each,
        **named, BN=config.bn, EVEN=columns % TILE == 0, WIDEN=widen,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _run_skinny(
    grid: tuple[int, ...], x: Tensor, x_scale: Tensor | None, weight: Tensor, parts: tuple[Tensor, ...], count: int,
    sizes: tuple[int, ...], named: dict[str, Any], config: Config,
) -> None:  # fmt: skip
    from quant.kernels.skinny import skinny_kernel

    tokens, rows, columns, each = sizes
    x = aligned(x)
    skinny_kernel[grid](
        x, x if x_scale is None else x_scale, weight, *parts,
        tokens, rows, x.shape[1], x.stride(0), count, each, 0x10001,
        **named, TILES=config.bn // 16, EVEN=columns % step_columns(named["BITS"]) == 0, ROUNDED=x_scale is not None,
        NATIVE=x.device.type == "cuda",
        num_warps=1, num_stages=1, enable_fp_fusion=x_scale is None,  # see integer.py
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """`x` `[M, K]` with rows of a multiple of 8 columns, zeros at the end, each of which begins at a multiple of 16
    bytes: `x` itself if it is so."""
    if x.shape[1] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
    if x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def processor(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors of a GPU, and whether `choose` has to be narrow for it."""
    if device.type != "cuda":
        return 4, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major == 10


def constants(bits: int, width: int, columns: int, asymmetric: bool, kind: str, most: int = TILE) -> dict[str, Any]:
    """What the kernel is compiled for beside its blocks. `most`: see `span`."""
    return {
        "BITS": bits,
        "GROUP": 0 if width >= columns else width,
        "FLUSH": span(width, columns, most),
        "ZERO": -1.0 if asymmetric else symmetric_zero(bits),
        "KIND": kind,
    }


def dequantize(arranged: Arranged, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` as a plain matrix, the values of `PackedUniform.dequantize` bit for bit; of int8 see
    `codes.dequantize_kernel`."""
    held = arranged.weight, arranged.scales, arranged.zeros
    return uniform_dequantize(*held, *sizes_of(arranged), dtype, start, stop)


@torch.library.custom_op("bitwright::uniform_dequantize", mutates_args=())
def uniform_dequantize(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, rows: int, columns: int, bits: int, width: int,
    dtype: torch.dtype, start: int, stop: int,
) -> Tensor:  # fmt: skip
    """See `dequantize`."""
    from quant.kernels.codes import dequantize_kernel

    out = torch.empty((stop - start, columns), dtype=dtype, device=weight.device)
    chosen = constants(bits, width, columns, zeros is not None, "fp16")
    if out.numel():
        with torch.cuda.device_of(weight):
            dequantize_kernel[(-(-(stop - start) // 32) * tiles(columns),)](
                weight, scales, scales if zeros is None else zeros, out, start, stop, rows, columns,
                BITS=bits, GROUP=chosen["GROUP"], ZERO=chosen["ZERO"], BN=32, num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@uniform_dequantize.register_fake
def _(weight: Tensor, *rest: Any) -> Tensor:
    columns, dtype, start, stop = rest[3], rest[6], rest[7], rest[8]
    return weight.new_empty((stop - start, columns), dtype=dtype)
