"""The block Hadamard transform (`hadamard.py`) as one Triton kernel.

A program holds a tile of chunks, each as long as the power of two in the block, in the registers of one warp (more only
for large factors), so that nothing waits at a barrier. A round of sums and differences takes neighbours and leaves the
sums in the first half, the differences in the second (Pease, J. ACM 15, 1968): every round looks the same, and after
`log2` of them each value is back in its place. The factor comes first: row `i` of the tile gathers `+-` chunk `j`, as
the chunks are read one after another.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# Triton's language has no types that pyright could follow
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.kernels.available import early
from quant.kernels.warp import waited

ELEMENTS = 1024  # of a tile in one warp: 32 registers of each thread


@triton.jit
def _offsets(chunk, chunks, row, column, SIZE: tl.constexpr):
    """Where the values of some chunks lie in a matrix of `chunks` chunks per row, and their column."""
    place = (chunk % chunks) * SIZE + tl.arange(0, SIZE)
    return (chunk // chunks).to(tl.int64) * row + place.to(tl.int64) * column, place


@triton.jit
def hadamard_kernel(
    x, out, signs, table, total, chunks, row, column, scale,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, ROUNDS: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`total` chunks in all, `chunks` in a row of `x`, whose strides are `row` and `column`; `out` is contiguous.
    `table`: float32 `[FACTOR, FACTOR]`. BEFORE, AFTER: where the signs go."""
    line = tl.arange(0, ROWS)[:, None]
    program = tl.program_id(0)
    if EARLY:
        program += waited(program)
    if SIZE < 4:  # more chunks than int32 has numbers
        program = program.to(tl.int64)
    if FACTOR == 1:
        chunk = program * ROWS + line
        inside = chunk < total
        offsets, place = _offsets(chunk, chunks, row, column, SIZE)
        tile = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if BEFORE:
            tile *= tl.load(signs + place, mask=inside, other=0).to(tl.float32)
    else:
        chunk = program * FACTOR + line
        inside = line < FACTOR
        tile = tl.zeros((ROWS, SIZE), tl.float32)
        for j in range(FACTOR):
            offsets, place = _offsets(program * FACTOR + j, chunks, row, column, SIZE)
            part = tl.load(x + offsets).to(tl.float32)
            if BEFORE:
                part *= tl.load(signs + place).to(tl.float32)
            tile += tl.load(table + line * FACTOR + j, mask=inside, other=0.0) * part[None, :]
    for _ in tl.static_range(ROUNDS):
        even, odd = tl.split(tl.reshape(tile, (ROWS, SIZE // 2, 2)))
        tile = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, SIZE))
    tile *= scale
    offsets, place = _offsets(chunk, chunks, chunks * SIZE, 1, SIZE)
    if AFTER:
        tile *= tl.load(signs + place, mask=inside, other=0).to(tl.float32)
    tl.store(out + offsets, tile.to(out.dtype.element_ty), mask=inside)


def shape(size: int, factor: int) -> tuple[dict[str, int], int]:
    """The kernel's sizes and its warps."""
    rows = max(1, ELEMENTS // size) if factor == 1 else triton.next_power_of_2(factor)
    warps = 1 if factor == 1 else max(1, rows * size // ELEMENTS)
    return {"FACTOR": factor, "ROWS": rows, "SIZE": size, "ROUNDS": size.bit_length() - 1}, warps


def launch(x: Tensor, out: Tensor, size: int, table: Tensor | None, signs: Tensor | None, inverse: bool) -> None:
    """`x` `[rows, n]` with any strides into the contiguous `out` of as many elements."""
    factor = 1 if table is None else len(table)
    sizes, warps = shape(size, factor)
    chunks, total = x.shape[1] // size, x.numel() // size
    each = sizes["ROWS"] if factor == 1 else factor
    if total:
        with torch.cuda.device_of(x):
            hadamard_kernel[(triton.cdiv(total, each),)](
                x, out, signs, table, total, chunks, *x.stride(), (factor * size) ** -0.5, **sizes,
                BEFORE=signs is not None and not inverse, AFTER=signs is not None and inverse,
                num_warps=warps, enable_fp_fusion=True, **early(x.device),
            )  # fmt: skip
