"""The inner loop of GPTQ as one Triton kernel: round a column, let the block's later columns make up for its error.

In torch each column costs a dozen launches; here a launch takes up to 128 columns of any number of matrices of one
shape (experts; q, k and v share a Hessian and are one matrix with more rows). Rows never mix, so a program takes a slab
of rows with all the block's columns in registers and goes through the columns in order:

    Q_i = round(W_i),   E_i = W_i - Q_i,   W_j -= V_ij E_i   for j > i.

A sweep of coordinate descent (`quant/solvers/descent.py`) is the same loop: what is kept up to date is the slope, the
value to round is `Q_i + slope_i / H_ii`, and the change of `Q_i` takes the place of the error.

Division and rounding are those of torch (IEEE; half to even), and `(code - zero) scale` is exact in float32. The update
is a fused multiply-add and torch's perhaps not, so the two may choose differently where a value lies within rounding of
the middle between two levels. The next line of `V` is read while this one is worked on.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# Triton's language has no types that pyright could follow
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 128  # columns in one launch
ELEMENTS = 2048  # of a slab, in the registers of one warp: no step waits at a barrier


@triton.jit
def columns_kernel(
    work, lines, scales, zeros, held, share, rounded, errors, codes,
    rows, columns, top, work_batch, line_batch, line_stride, scale_batch, scale_stride, held_batch,
    rounded_batch, error_batch, code_batch,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DESCENT: tl.constexpr,
):  # fmt: skip
    """Tensors as in `round_columns`, each contiguous but for what has a stride here. COLUMNS: a power of two."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside, within = row < rows, column < columns
    lines += batch * line_batch + column
    scales += batch * scale_batch + row
    zeros += batch * scale_batch + row
    here = column[:, None] * rows + row[None, :]
    tile = tl.load(work + batch * work_batch + here, mask=within[:, None] & inside[None, :], other=0.0)
    next_line = tl.load(lines, mask=within, other=0.0)
    next_scale = tl.load(scales, mask=inside, other=0.0)
    next_zero = tl.load(zeros, mask=inside, other=0.0)
    for i in range(columns):
        line, scale, zero = next_line, next_scale, next_zero
        after = tl.minimum(i + 1, columns - 1)
        next_line = tl.load(lines + after * line_stride, mask=within, other=0.0)
        next_scale = tl.load(scales + after * scale_stride, mask=inside, other=0.0)
        next_zero = tl.load(zeros + after * scale_stride, mask=inside, other=0.0)
        at = i * rows + row
        value = tl.sum(tl.where(column[:, None] == i, tile, 0.0), 0)
        if DESCENT:
            kept = tl.load(held + batch * held_batch + at, mask=inside, other=0.0)
            value = kept + value * tl.load(share + i)
        code = tl.div_rn(value, tl.where(scale == 0, 1.0, scale)) + zero
        code = tl.minimum(tl.maximum(code, 0.0), top) + 12582912.0  # 1.5 x 2^23: the sum is rounded to a whole number
        code -= 12582912.0
        level = (code - zero) * scale
        error = level - kept if DESCENT else value - level
        tile -= line[:, None] * error[None, :]
        tl.store(rounded + batch * rounded_batch + at, level, mask=inside)
        tl.store(errors + batch * error_batch + at, error, mask=inside)
        tl.store(codes + batch * code_batch + at, code.to(tl.uint8), mask=inside)


def shape(columns: int) -> tuple[dict[str, int], int]:
    """The kernel's sizes for so many columns, and its warps."""
    padded = max(16, triton.next_power_of_2(columns))
    return {"COLUMNS": padded, "ROWS": ELEMENTS // padded}, 1


def round_columns(
    work: Tensor, lines: Tensor, scales: Tensor, zeros: Tensor, bits: int, rounded: Tensor, errors: Tensor,
    codes: Tensor, held: Tensor | None = None, share: Tensor | None = None,
) -> None:  # fmt: skip
    """Rounds `k` columns of `b` matrices in turn into `rounded`, `errors` and `codes` (uint8).

    All float32 but the codes. `work`, `rounded`, `errors`, `codes` `[b, k, out]`, each matrix contiguous; `lines`
    `[b, k, k]`: `V`, or the Hessian; `scales`, `zeros` `[b, k, out]`, the grid of each column, perhaps
    expanded. With `held` `[b, k, out]` (each matrix contiguous) and `share` `[k]`, `1 / diagonal`, it is a sweep of
    descent: `work` is the slope, `held` what was chosen before, `errors` by how much that changes. `work` is left as it
    is. Raises `ValueError` on matrices that are not contiguous or not all of one shape.
    """
    for tensor in (work, rounded, errors, codes, held):
        if tensor is not None and (tensor.shape != work.shape or not tensor[0].is_contiguous()):
            raise ValueError(f"{list(tensor.shape)} came for {list(work.shape)}, or matrices that are not contiguous")
    if lines.stride(2) != 1:  # a triangular solve gives columns
        lines = lines.contiguous()
    if zeros.stride() != scales.stride() or scales.stride(2) != 1:
        scales, zeros = scales.contiguous(), zeros.contiguous()
    for start in range(0, work.shape[1], LONGEST):
        if start:
            past = slice(start - LONGEST, start)
            work = torch.baddbmm(work[:, LONGEST:], lines[:, past, start:].mT, errors[:, past], alpha=-1)
        part = slice(start, start + LONGEST)
        _launch(
            work[:, :LONGEST], lines[:, part, part], scales[:, part], zeros[:, part],
            None if held is None else held[:, part], None if share is None else share[part],
            rounded[:, part], errors[:, part], codes[:, part], 2.0**bits - 1,
        )  # fmt: skip


def _launch(
    work: Tensor, lines: Tensor, scales: Tensor, zeros: Tensor, held: Tensor | None, share: Tensor | None,
    rounded: Tensor, errors: Tensor, codes: Tensor, top: float,
) -> None:  # fmt: skip
    batch, columns, rows = work.shape
    sizes, warps = shape(columns)
    with torch.cuda.device_of(work):
        columns_kernel[(triton.cdiv(rows, sizes["ROWS"]), batch)](
            work, lines, scales, zeros, held, share, rounded, errors, codes,
            rows, columns, top, work.stride(0), lines.stride(0), lines.stride(1), scales.stride(0),
            scales.stride(1), 0 if held is None else held.stride(0),
            rounded.stride(0), errors.stride(0), codes.stride(0),
            **sizes, DESCENT=held is not None, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
