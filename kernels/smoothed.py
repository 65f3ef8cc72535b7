"""A packed weight whose inputs are each multiplied by a factor of their own, and how to multiply by it.

`smoothed` holds the tensors of its base and

    smooth   f16   [in]   the factors m, positive

    W = Q diag(m)

with `Q` the base, so `W x = Q (m x)`: the activations are multiplied instead of the weight, in float32, and rounded
back to their dtype. Factors are stored for each weight, though weights that read the same tensor could share them: 16
bits per input are `16 / out` bits per weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.packed import LayoutError, PackedAround
from quant.kernels.spec import Smoothed


@dataclass(frozen=True, eq=False)
class PackedSmoothed(PackedAround):
    """See the module."""

    layout: ClassVar[str] = "smoothed"
    shared: ClassVar[tuple[str, ...]] = ("smooth",)

    spec: Smoothed  # pyright: ignore[reportIncompatibleVariableOverride]  frozen: a narrower type is sound
    smooth: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {**self.base.tensors(), "smooth": self.smooth}

    def inputs(self, x: Tensor) -> Tensor:
        """`m x` for `x` `[..., in]`, in `x`'s dtype."""
        return (x * self.smooth.float()).to(x.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        return self.base.dequantize(torch.float32, start, stop).mul_(self.smooth.float()).to(dtype)

    def validate(self) -> None:
        self.base.validate()
        if not bool(torch.isfinite(self.smooth).all() and (self.smooth > 0).all()):
            raise LayoutError("smooth: every factor must be finite and above 0")
