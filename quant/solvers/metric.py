"""How much errors in the outputs of a weight count, each alone and two together.

A metric is float32 `[out, width]`: row `r` has an entry for each of the `width` rows beside which it lies,
`r - r % width` and those after it, 0 beyond the last one. So it is a matrix `A` of blocks along its diagonal, and the
error of a column is `eT A e`. A width of 1 is a weight for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def own(metric: Tensor) -> Tensor:
    """`[out]`: how much an error in each row counts by itself."""
    rows = torch.arange(len(metric), device=metric.device)
    return metric[rows, rows % metric.shape[1]]


def cut(metric: Tensor, length: int) -> Tensor:
    """`[blocks, length, length]`: `A` in blocks of as many rows, the last one filled up with zeros."""
    out, width = metric.shape
    count = -(-out // length)
    rows = torch.arange(count * length, device=metric.device).view(count, length)
    row, beside = rows[:, :, None], rows[:, None, :]
    known = (row // width == beside // width) & (row < out) & (beside < out)
    return torch.where(known, metric[row.clamp_max(out - 1), beside % width], 0.0)


def scaled(metric: Tensor, factors: Tensor) -> Tensor:
    """`A_ij f_i f_j`, `factors` `[out]`."""
    width = metric.shape[1]
    beside = pad(factors, (0, -len(factors) % width)).view(-1, 1, width).expand(-1, width, -1).flatten(0, 1)
    return factors[:, None] * beside[: len(factors)] * metric


def weighed(metric: Tensor, matrix: Tensor) -> Tensor:
    """`A` times `matrix` `[out, n]`."""
    width = metric.shape[1]
    parts = pad(matrix, (0, 0, 0, -len(matrix) % width)).view(-1, width, matrix.shape[1])
    return (cut(metric, width) @ parts).flatten(0, 1)[: len(matrix)]
