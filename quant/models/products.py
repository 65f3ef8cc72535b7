"""What counts as a matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PRODUCTS = (
    *(getattr(place, name) for place in (torch, torch.Tensor) for name in ("matmul", "bmm", "mm")),
    torch.Tensor.__matmul__,
)
SUMS = (torch.addmm, torch.baddbmm)


def product(func: Any, args: Any) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
    """`(x, weight, transposed)` if this torch call is `x @ weight^T` (linear) or `x @ weight` (Conv1D, stacks)."""
    if func is nn.functional.linear:
        return args[0], args[1], False
    if func in SUMS:
        return args[1], args[2], True
    if func in PRODUCTS and all(isinstance(arg, torch.Tensor) for arg in args[:2]):
        return args[0], args[1], True
    return None
