"""A packed weight with a low-rank branch beside it, and how to multiply by both.

`lowrank` holds the tensors of its base and

    lora_a   f16/bf16   [r, in]     r = spec.width(shape), the rank but never more than the matrix has
    lora_b   f16/bf16   [out, r]

    W = Q + B A

with `Q` the base: in a rotated basis or not, the branch works on the plain one. So `W x = Q x + B (A x)`; the base
looks for its own kernel and the branch costs two thin products. The names are those of a LoRA adapter of scale 1, which
the branch can be saved as (`quant/checkpoint/adapter.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from quant.kernels.packed import LayoutError, PackedAround
from quant.kernels.spec import LowRank


@dataclass(frozen=True, eq=False)
class PackedLowRank(PackedAround):
    """See the module."""

    layout: ClassVar[str] = "lowrank"
    shared: ClassVar[tuple[str, ...]] = ("lora_a",)

    spec: LowRank  # pyright: ignore[reportIncompatibleVariableOverride]  frozen: a narrower type is sound
    lora_a: Tensor
    lora_b: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {**self.base.tensors(), "lora_a": self.lora_a, "lora_b": self.lora_b}

    def branch(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` times `(B A)^T`, in `x`'s dtype."""
        return linear(linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        rows = range(self.shape[0])[start:stop]
        weight = self.base.dequantize(torch.float32, rows.start, rows.stop)
        return weight.addmm_(self.lora_b[rows.start : rows.stop].float(), self.lora_a.float()).to(dtype)

    def validate(self) -> None:
        self.base.validate()
        for name, factor in (("lora_a", self.lora_a), ("lora_b", self.lora_b)):
            if not bool(torch.isfinite(factor).all()):
                raise LayoutError(f"{name}: not every value is finite; every one must be")
