"""Running the codebook kernels: which blocks, and the operators that torch.compile sees.

As `launch.py` for uniform weights, whose scratch memory and counters it shares: up to `UNPACK_FROM` tokens one kernel
looks every vector up once per 4, 8 or 16 tokens; from there on the weight is decoded once, in slices of bounded size,
and multiplied by torch (cuBLAS).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant.kernels.available import clusters, early
from quant.kernels.blocks import Config, even_splits
from quant.kernels.codebook import FAST, Codebook
from quant.kernels.codebook_order import ROWS, TILE, ArrangedCodebook, column_tiles, row_tiles, width
from quant.kernels.counters import fresh_counters
from quant.kernels.launch import KINDS, aligned, input_gradient, multiply_unpacked, processor
from quant.kernels.reference import check_shape
from quant.kernels.scales import scale_table
from quant.kernels.trellis_launch import refuses as refuses

UNPACK_FROM = 64
"""Tokens from which decoding once pays. A guess from the arithmetic (`README.md`) until a GPU has measured it."""


def is_shared(length: int, bits: int, second_bits: int) -> bool:
    """Whether the table is looked up in shared memory, by `codebook_shared.py`'s kernel."""
    return (length, bits) == FAST and not second_bits


def choose(tokens: int, rows: int, columns: int, length: int, processors: int, shared: bool = False) -> Config:
    """The configuration without a tuned one: K split until every multiprocessor has about 16 warps, as many as their
    registers let run. They hide each other's latency, so no copies are kept on the way: shared memory would take room
    from the first-level cache. Vectors of more than 8 leave registers for 8 tokens only. `shared`: see `is_shared`."""
    if shared:
        return choose_shared(tokens, rows, columns, processors)
    bm = 8 if tokens <= 8 or length > 8 else 16
    programs = -(-rows // (ROWS * length)) * -(-tokens // bm)
    return Config(bm, ROWS * length, 1, 1, even_splits(columns, min(32, processors * 16 // programs), TILE))


@cache
def choose_shared(tokens: int, rows: int, columns: int, processors: int, bn: int = 0, warps: int = 4) -> Config:
    """Of `codebook_shared.py`'s kernel. A program's beginning and end are worth about 4 units of 64 columns of each of
    its warps, and fewer than 12 warps of a multiprocessor take longer, 4 of them 1.8 times (so that the choice is what
    was fastest on an H200). K is split so that the multiprocessor with most programs is done soonest: shared memory
    bounds them all together. One token's is split by a power of two; of more a multiprocessor has 12 warps at least."""
    bm = next((size for size in (4, 8) if tokens <= size), 16)
    bn = bn or 128
    programs, count = -(-rows // bn) * -(-tokens // bm), -(-columns // (64 * warps))

    def takes(splits: int) -> float:
        several = -(-programs * splits // processors)
        return several * (4 + -(-count // splits) * (1 + max(0, 12 - several * warps) / 10))

    if tokens == 1:
        units, most = 2 * column_tiles(columns), 8 if programs * 8 <= processors else 32  # blocks of a cluster: 8
        some = [1 << i for i in range(6) if 1 << i <= min(count, most) and busy(units, 1 << i, warps)]
        return Config(bm, bn, warps, 1, min(some, key=takes))
    least = min(count, 32, -(-processors * 12 // (programs * warps)))
    best = min(range(least, min(count, 32) + 1), key=takes)
    return Config(bm, bn, warps, 1, even_splits(columns, best, 64 * warps))


def blocks_of(config: Config, programs: int, processors: int, clusters: bool) -> int:
    """Blocks of a program, each with a part of K: all parts, where there are `clusters` and it was faster."""
    fits = config.splits == 2 or (config.splits in (4, 8) and programs * config.splits <= processors)
    return config.splits if clusters and config.bm == 4 and fits else 1


def candidates(
    tokens: int, rows: int, columns: int, length: int, processors: int, shared: bool = False
) -> list[Config]:
    """Configurations worth timing: how K is split, and, where tables are `shared`, rows and warps of a program."""
    if shared:
        sizes = [choose_shared(tokens, rows, columns, processors, bn, warps) for bn in (64, 128) for warps in (4, 8)]
        made = [
            replace(size, splits=even_splits(columns, count, 64 * size.warps))
            for size in sizes
            for count in (size.splits, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        ]
        return list(dict.fromkeys(made))
    default = choose(tokens, rows, columns, length, processors)
    programs = -(-rows // default.bn) * -(-tokens // default.bm)
    wanted = {even_splits(columns, min(64, processors * warps // programs), TILE) for warps in (4, 8, 12, 16, 24, 32)}
    return [Config(default.bm, default.bn, 1, 1, count) for count in sorted(wanted)]


def matmul(x: Tensor, arranged: ArrangedCodebook, bias: Tensor | None = None) -> Tensor:
    """`x` `[..., K]` float16 or bfloat16 times the weight `[N, K]` transposed, plus `bias` `[N]`: `[..., N]` in `x`'s
    dtype, accumulated in float32. Differentiable with respect to both. Raises `ValueError` where the shapes do not fit.
    """
    check_shape(x, arranged)
    flat = x.reshape(-1, x.shape[-1])
    out = torch.ops.bitwright.codebook_matmul(flat, *_held(arranged), bias, *_sizes(arranged), x.dtype)
    return out.view(*x.shape[:-1], arranged.shape[0])


def dequantize(arranged: ArrangedCodebook, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` as a plain matrix, the values of `PackedCodebook.dequantize` bit for bit."""
    return codebook_dequantize(*_held(arranged), *_sizes(arranged), dtype, start, stop)


def _held(arranged: ArrangedCodebook) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    codebooks = arranged.codebook, arranged.second, arranged.columns
    return arranged.weight, *codebooks, arranged.scales, arranged.peaks


def _sizes(arranged: ArrangedCodebook) -> tuple[int, int, int, int, int, int, int]:
    """As the operators take them."""
    spec, columns = arranged.spec, arranged.shape[1]
    return *arranged.shape, spec.length, spec.index_bits, spec.second_bits, spec.finer(columns), spec.rows


@torch.library.custom_op("bitwright::codebook_matmul", mutates_args=())
def codebook_matmul(
    x: Tensor, weight: Tensor, codebook: Tensor, second: Tensor | None, columns: Tensor | None, scales: Tensor,
    peaks: Tensor, bias: Tensor | None, rows: int, inputs: int, length: int, bits: int, second_bits: int, finer: int,
    group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`x` `[M, inputs]` times a weight in kernel order: `[M, rows]` of `dtype`. `group`: rows that share a codebook."""
    out = torch.empty((len(x), rows), dtype=dtype, device=x.device)
    held, sizes = (weight, codebook, second, columns, scales, peaks), (length, bits, second_bits, finer, group)
    if len(x) < UNPACK_FROM:
        launch(x, *held, bias, out, rows, inputs, *sizes, None)
        return out
    multiply_unpacked(x, out, inputs, lambda *part: codebook_dequantize(*held, rows, inputs, *sizes, dtype, *part))
    if bias is not None:
        out += bias
    return out


@codebook_matmul.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    rows, dtype = rest[7], rest[14]
    return x.new_empty((x.shape[0], rows), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.sizes, ctx.bias = inputs[8:15], inputs[7] if inputs[7] is None else inputs[7].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    unpack = lambda *part: codebook_dequantize(*ctx.saved_tensors, *ctx.sizes, grad.dtype, *part)  # noqa: E731
    x_grad = input_gradient(grad, ctx.sizes[1], unpack) if ctx.needs_input_grad[0] else None
    bias_grad = grad.sum(0).to(ctx.bias) if ctx.needs_input_grad[7] else None
    return (x_grad, *[None] * 6, bias_grad, *[None] * 8)


codebook_matmul.register_autograd(_backward, setup_context=_keep)


def launch(
    x: Tensor, weight: Tensor, codebook: Tensor, second: Tensor | None, columns: Tensor | None, scales: Tensor,
    peaks: Tensor, bias: Tensor | None, out: Tensor, rows: int, inputs: int, length: int, bits: int, second_bits: int,
    finer: int, group: int, config: Config | None,
) -> None:  # fmt: skip
    """Fills `out` `[M, N]`. `config`: None for the default one."""
    from quant.kernels.codebook_product import codebook_kernel
    from quant.kernels.tune import tuned  # it needs this module

    tokens = len(out)
    if not out.numel():
        return
    if is_shared(length, bits, second_bits):
        launch_shared(x, weight, codebook, scales, peaks, bias, out, rows, inputs, group, config)
        return
    x = x if x.stride(1) == 1 and x.stride(0) % 8 == 0 else x.contiguous()
    bias = None if bias is None else bias.expand(rows).contiguous()
    config = config or tuned(x.device, tokens, rows, inputs, bits, kind(length, second_bits, KINDS[x.dtype]), TILE)
    config = config or choose(tokens, rows, inputs, length, processor(x.device)[0])
    tiles, per, count, fine = _tiles(rows, inputs, length, finer, group)
    grid = (tiles, config.splits, -(-tokens // config.bm))
    partial, counters = out, out
    if config.splits > 1:
        size = grid[0] * grid[2] * config.splits * length * config.bm * ROWS
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = fresh_counters(grid[0] * grid[2], x.device)
    with torch.cuda.device_of(x):
        codebook_kernel[grid](
            x, weight, codebook, codebook if second is None else second, weight if columns is None else columns, scales,
            peaks, scale_table(x.device), out if bias is None else bias, out, partial, counters,
            tokens, rows, inputs, x.stride(0), count, -(-count // config.splits), finer, -(-fine // config.splits), per,
            **constants(bits, second_bits, length, group, columns is not None, x.device),
            BM=config.bm, SPLIT=config.splits > 1, EVEN=inputs % TILE == 0, BIAS=bias is not None,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip


def launch_shared(
    x: Tensor, weight: Tensor, codebook: Tensor, scales: Tensor, peaks: Tensor, bias: Tensor | None, out: Tensor,
    rows: int, inputs: int, group: int, config: Config | None,
) -> None:  # fmt: skip
    """As `launch`, of `codebook_shared.py`'s kernel."""
    from quant.kernels.codebook_shared import codebook_shared_kernel
    from quant.kernels.tune import tuned

    tokens, x, processors = len(out), aligned(x), processor(x.device)[0]
    bias = None if bias is None else bias.expand(rows).contiguous()
    config = config or tuned(x.device, tokens, rows, inputs, FAST[1], kind(FAST[0], 0, KINDS[x.dtype]), TILE)
    config = config or choose_shared(tokens, rows, inputs, processors)
    made, units = row_tiles(Codebook(length=FAST[0], index_bits=FAST[1], rows=group), rows), 2 * column_tiles(inputs)
    blocks = sum(-(-tiles * 64 // config.bn) for tiles in made)
    ctas = blocks_of(config, blocks, processors, clusters(x.device))
    splits = config.splits // ctas
    grid = (blocks, splits, -(-tokens // config.bm))
    partial, counters = out, out
    if splits > 1:
        size = grid[0] * grid[1] * grid[2] * config.bn * config.bm
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = fresh_counters(grid[0] * grid[2], x.device)
    each, steps = takes_of(tokens, units, config.splits, config.warps, x.device.type == "cuda")
    with torch.cuda.device_of(x):
        codebook_shared_kernel[grid](
            x, weight, codebook, scales, peaks, scale_table(x.device), out if bias is None else bias, out, partial,
            counters, tokens, rows, x.shape[1], x.stride(0), units, each, sum(made), made[0],
            GROUP=group, BM=config.bm, TILES=config.bn // 32, WARPS=config.warps, CTAS=ctas, STEPS=steps,
            ONE=tokens == 1, SPLIT=splits > 1, EVEN=inputs % TILE == 0 and units == each * config.splits * config.warps,
            BIAS=bias is not None, NATIVE=x.device.type == "cuda", num_warps=config.warps, num_ctas=ctas, num_stages=1,
            enable_fp_fusion=True, **early(x.device),
        )  # fmt: skip


def takes_of(tokens: int, units: int, splits: int, warps: int, native: bool = True) -> tuple[int, int]:
    """How many of the `units` of 64 columns a warp takes, and the steps in which it takes one token's inputs of them as
    a whole, where they have room within 48 KiB and pairs of units are not parted; or 0."""
    each = -(-units // (splits * warps))
    steps = -(-each // 4)
    if not native or tokens > 1 or steps > 8 or steps * warps > 24:
        return each, 0
    return each + each % 2, steps


def busy(units: int, splits: int, warps: int) -> bool:
    """Whether none of the parts of one token's K is without a unit."""
    return (splits - 1) * takes_of(1, units, splits, warps)[0] * warps < units


def run(x: Tensor, arranged: ArrangedCodebook, config: Config, out: Tensor) -> None:
    """Fills `out` `[M, N]` with one configuration."""
    launch(x, *_held(arranged), None, out, *_sizes(arranged), config)


def kind(length: int, second_bits: int, name: str) -> str:
    """Under which configurations stand, beside the bits of an index."""
    return f"codebook{length}{f'+{second_bits}' if second_bits else ''}-{name}"


def constants(bits: int, second_bits: int, length: int, group: int, few: bool, device: torch.device) -> dict[str, Any]:
    """What the kernels are compiled for beside their blocks."""
    made = {"BITS": bits, "SECOND": second_bits, "LENGTH": length, "WIDTH": width(length), "GROUP": group}
    return made | {"FEW": few, "NATIVE": device.type == "cuda"}


def _tiles(rows: int, columns: int, length: int, finer: int, group: int) -> tuple[int, int, int, int]:
    """Row tiles, those of a whole group, column tiles, and those of the finer columns."""
    made = row_tiles(Codebook(length=length, index_bits=1, rows=group), rows)
    return sum(made), made[0], column_tiles(columns), column_tiles(finer)


@torch.library.custom_op("bitwright::codebook_dequantize", mutates_args=())
def codebook_dequantize(
    weight: Tensor, codebook: Tensor, second: Tensor | None, columns: Tensor | None, scales: Tensor, peaks: Tensor,
    rows: int, inputs: int, length: int, bits: int, second_bits: int, finer: int, group: int, dtype: torch.dtype,
    start: int, stop: int,
) -> Tensor:  # fmt: skip
    """See `dequantize`."""
    from quant.kernels.codebook_decode import codebook_decode_kernel

    out = torch.empty((stop - start, inputs), dtype=dtype, device=weight.device)
    if out.numel():
        tiles, per, count, _ = _tiles(rows, inputs, length, finer, group)
        first, last = (row // group * per + row % group // length // ROWS for row in (start, stop - 1))
        with torch.cuda.device_of(weight):
            codebook_decode_kernel[((last - first + 1) * count,)](
                weight, codebook, codebook if second is None else second, weight if columns is None else columns,
                scales, peaks, scale_table(weight.device), out, start, stop, inputs, first, tiles, count, finer, per,
                **constants(bits, second_bits, length, group, columns is not None, weight.device),
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@codebook_dequantize.register_fake
def _(weight: Tensor, *rest: Any) -> Tensor:
    inputs, dtype, start, stop = rest[6], rest[12], rest[13], rest[14]
    return weight.new_empty((stop - start, inputs), dtype=dtype)
