"""Packed weights: what a spec's tensors mean. The only thing that solvers and kernels share.

`uniform`, for a weight `[out, in]` of `bits` bits in `G = groups(in)` groups of `width` inputs (the last may be
shorter):

    tensor   dtype      shape                       content
    weight   uint8      [out * ceil(in*bits/8)]     row after row; a row is a dense bit stream of its codes, least
                                                    significant bit first, padded with zeros to a byte (`packing.py`)
    scales   f16/bf16   [out, G]                    finite; may be negative; 0 for a group of zeros
    zeros    uint8      [out, ceil(G*bits/8)]       asymmetric specs only: the zero points, packed like one row of codes

    weight[o, i] = scale[o, g] * (code[o, i] - zero[o, g]),  g = i // width

with `zero = 2^(bits-1)` in a symmetric spec (0.5 at 1 bit). Of a spec with activations of 8 bits they are the same; it
is multiplied by as `integer.py` tells. The product is taken in float32 and then cast: this file
defines the values and every kernel is measured against it. `weight` has one dimension so that no float parameter has
its shape. Rows are independent, so row ranges can be cut out (`dequantize(start, stop)`) and stacked (`concatenate`):
fused qkv and the experts of a stack need nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from quant.kernels.binary import PackedBinary
from quant.kernels.codebook import PackedCodebook
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.packed import LayoutError, Packed, rows_at_once
from quant.kernels.packing import pack, padding_is_zero, row_bytes, unpack
from quant.kernels.rotated import PackedRotated
from quant.kernels.smoothed import PackedSmoothed
from quant.kernels.spec import Spec, Uniform
from quant.kernels.trellis import PackedTrellis


@dataclass(frozen=True, eq=False)
class PackedUniform(Packed):
    """See the module: `weight` uint8 `[out * row_bytes]`, `scales` `[out, G]`, `zeros` uint8 `[out, ceil(G*bits/8)]` or
    None.
    """

    layout: ClassVar[str] = "uniform"

    spec: Uniform  # pyright: ignore[reportIncompatibleVariableOverride]  frozen: a narrower type is sound
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @classmethod
    def from_codes(
        cls, spec: Uniform, shape: tuple[int, int], codes: Tensor, scales: Tensor, zeros: Tensor | None = None
    ) -> Self:
        """From `codes` uint8 `[out, in]`, `scales` `[out, G]` in the spec's dtype and `zeros` uint8 `[out, G]`
        (asymmetric only).
        """
        if tuple(codes.shape) != tuple(shape):
            raise LayoutError(f"codes have shape {list(codes.shape)}; {list(shape)} is expected")
        tensors = {"weight": pack(codes, spec.bits).flatten(), "scales": scales}
        if zeros is not None:
            tensors["zeros"] = pack(zeros, spec.bits)
        return cls.from_tensors(spec, shape, tensors)

    def tensors(self) -> dict[str, Tensor]:
        stored = {"weight": self.weight, "scales": self.scales}
        return stored if self.zeros is None else {**stored, "zeros": self.zeros}

    def rows(self, index: Tensor) -> PackedUniform:
        """The weight of the rows `index` int64 `[n]`."""
        held = {**self.tensors(), "weight": self.weight.view(self.shape[0], -1)}
        taken = {name: part.index_select(0, index) for name, part in held.items()}  # which takes no -1 for the last
        taken["weight"] = taken["weight"].flatten()
        return PackedUniform(self.spec, (len(index), self.shape[1]), **taken)

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Codes uint8 `[stop - start, in]`."""
        length = row_bytes(self.shape[1], self.spec.bits)
        return unpack(self.weight.view(self.shape[0], length)[start:stop], self.spec.bits, self.shape[1])

    def zero_points(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Zero points float32 `[stop - start, G]`, of symmetric specs too."""
        scales = self.scales[start:stop]
        if self.zeros is None:
            return torch.full_like(scales, symmetric_zero(self.spec.bits), dtype=torch.float32)
        return unpack(self.zeros[start:stop], self.spec.bits, scales.shape[1]).float()

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        rows = range(self.shape[0])[start:stop]
        weight = torch.empty((len(rows), self.shape[1]), dtype=dtype, device=self.device)
        step = rows_at_once(self.device, self.shape[1])
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            weight[first : first + len(part)] = self._values(part.start, part.stop)
        return weight

    def _values(self, start: int, stop: int) -> Tensor:
        """Rows in float32, in place on the only float buffer."""
        values = self.codes(start, stop).float()
        scales, zeros = self.scales[start:stop].float(), self.zero_points(start, stop)
        width = self.spec.group_width(self.shape[1])
        whole = self.shape[1] // width
        parts = [(values[:, : whole * width].unflatten(1, (whole, width)), slice(0, whole))]
        if whole * width != self.shape[1]:  # the ragged last group
            parts.append((values[:, None, whole * width :], slice(whole, whole + 1)))
        for part, groups in parts:
            part.sub_(zeros[:, groups, None]).mul_(scales[:, groups, None])
        return values

    def validate(self) -> None:
        rows, columns = self.shape
        if not bool(torch.isfinite(self.scales).all()):
            count = int((~torch.isfinite(self.scales)).sum())
            raise LayoutError(f"scales: {count} of {self.scales.numel()} are not finite; every scale must be")
        length = row_bytes(columns, self.spec.bits)
        if not padding_is_zero(self.weight.view(rows, length), self.spec.bits, columns):
            raise LayoutError("weight: the padding bits at the end of a row are set; they must be zero")
        if self.zeros is not None and not padding_is_zero(self.zeros, self.spec.bits, self.scales.shape[1]):
            raise LayoutError("zeros: the padding bits at the end of a row are set; they must be zero")


def symmetric_zero(bits: int) -> float:
    """The zero point of a symmetric grid: its levels are `code - zero` times the scale."""
    return 2.0 ** (bits - 1) if bits > 1 else 0.5


LAYOUTS: dict[str, type[Packed]] = {
    kind.layout: kind
    for kind in (
        PackedUniform,
        PackedTrellis,
        PackedCodebook,
        PackedBinary,
        PackedRotated,
        PackedLowRank,
        PackedSmoothed,
    )
}
"""The only table from a name to a class: files on disk need names."""


def shared_names(spec: Spec | None) -> tuple[str, ...]:
    """The tensors that matrices stacked along the rows have in common, those of what the spec goes around included."""
    return () if spec is None else (*LAYOUTS[spec.layout].shared, *shared_names(getattr(spec, "base", None)))
