"""Poisoned outputs between guard bands: what a kernel leaves unwritten is NaN, what it writes outside is seen."""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 64  # elements before and after a buffer


def guarded(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A poisoned matrix and the buffer with its guard bands."""
    buffer = torch.full((shape[0] * shape[1] + 2 * GUARD,), torch.nan, dtype=dtype)
    buffer[:GUARD] = buffer[-GUARD:] = 7.0
    return buffer[GUARD:-GUARD].view(shape), buffer


def intact(buffer: Tensor) -> bool:
    """Whether both bands are as they were."""
    return bool((buffer[:GUARD] == 7).all() and (buffer[-GUARD:] == 7).all())
