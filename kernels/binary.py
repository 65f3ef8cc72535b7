"""Signs, and a few columns of 4 bits: 1.6 bits per weight (PTQ1.61, arXiv 2502.13179), the spec and the packed weight.

`binary`, for a weight `[out, in]` of which `n = salient(in)` columns have codes of 4 bits, the same columns for each
`rows` rows (the last ones may be fewer):

    tensor    dtype   shape                  content
    weight    uint8   [out * bytes]          row after row: the codes of the salient columns in ascending order, then
                                             the signs of the others (1: positive), each packed to whole bytes
    scales    uint8   [out, 2]               each row's scale for signs, and for codes: peak * 2^(-scales / 16);
                                             255 means 0
    columns   uint8   [groups, in]           each column's scale, the same way
    salient   uint8   [groups, ceil(in/8)]   bit i % 8 of byte i // 8 is 1 where column i has codes, n of them
    peaks     f16     [groups, 3]            the largest row scale for signs and for codes, and column scale; finite

    weight[o, i] = column[i] * row[o, 0] * (1 or -1),  or  column[i] * row[o, 1] * (code - 8)  where i is salient

So the scales of each kind have rank 1. A kernel scales the inputs by `column` and parts them by the mask, once for all
rows; what is left is a product of signs and one of 4 bits. The paper's row offset `mu` is not stored: at its 8 bits per
row it took off 1 to 4 % of the error, and as many bits in salient columns take off more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from quant.kernels.packed import LayoutError, Packed
from quant.kernels.packing import pack, padding_is_zero, row_bytes, unpack
from quant.kernels.promise import Spec, SpecError, TensorSpec, check_number, check_whole
from quant.kernels.scales import scale_values


@dataclass(frozen=True)
class Binary(Spec):
    """Signs, and codes of 4 bits in the `share` of the columns with the largest inputs; column scales and the choice of
    columns anew for each `rows` rows. `share` None: as many as fit into `bits` bits per weight, all included.
    """

    layout: ClassVar[str] = "binary"

    bits: float = 1.61
    share: float | None = None
    rows: int = 4096

    def __post_init__(self) -> None:
        check_number(self, "signs take", bits=16, **({} if self.share is None else {"share": 1}))
        check_whole(self, "signs take", rows=(1, 1 << 20))

    @property
    def unit(self) -> int:
        return self.rows

    def chosen(self, shape: tuple[int, int]) -> Binary:
        return _chosen(self, (shape[0], shape[1]))

    def salient(self, columns: int) -> int:
        """How many columns have codes."""
        assert self.share is not None
        return max(1, round(self.share * columns))

    def widths(self, columns: int) -> tuple[int, int]:
        """Bytes of a row's codes, and of its signs."""
        count = self.salient(columns)
        return row_bytes(count, 4), row_bytes(columns - count, 1)

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        if self.share is None:
            return self.chosen(shape).tensors(shape)
        rows, columns = shape
        groups = math.ceil(rows / self.rows)
        return {
            "weight": TensorSpec("uint8", (rows * sum(self.widths(columns)),)),
            "scales": TensorSpec("uint8", (rows, 2)),
            "columns": TensorSpec("uint8", (groups, columns)),
            "salient": TensorSpec("uint8", (groups, math.ceil(columns / 8))),
            "peaks": TensorSpec("float16", (groups, 3)),
        }


@cache
def _chosen(spec: Binary, shape: tuple[int, int]) -> Binary:
    if spec.share is not None:
        return spec
    shares = (replace(spec, share=n / shape[1]) for n in range(shape[1], 0, -1))  # whole bytes: sizes are not in order
    found = next((one for one in shares if one.bits_per_weight(shape) <= spec.bits), None)
    if found is None:
        raise SpecError(f"signs for a weight of {list(shape)} do not fit in {spec.bits:g} bits per weight")
    return found


@dataclass(frozen=True, eq=False)
class PackedBinary(Packed):
    """See the module."""

    layout: ClassVar[str] = "binary"

    spec: Binary  # pyright: ignore[reportIncompatibleVariableOverride]  frozen: a narrower type is sound
    weight: Tensor
    scales: Tensor
    columns: Tensor
    salient: Tensor
    peaks: Tensor

    @classmethod
    def from_levels(
        cls, spec: Binary, levels: Tensor, scales: Tensor, columns: Tensor, salient: Tensor, peaks: Tensor
    ) -> Self:
        """From `levels` `[out, in]`, -8 to 7 where `salient` bool `[groups, in]` and -1 or 1 elsewhere, and the other
        tensors as stored."""
        mask = salient.repeat_interleave(spec.rows, 0)[: len(levels)]
        codes = (levels[mask] + 8).to(torch.uint8).view(len(levels), -1)
        signs = (levels[~mask] > 0).to(torch.uint8).view(len(levels), -1)
        weight = torch.cat([pack(codes, 4), pack(signs, 1)], 1).flatten()
        tensors = {"weight": weight, "scales": scales, "columns": columns, "peaks": peaks}
        tensors["salient"] = pack(salient.to(torch.uint8), 1)
        return cls.from_tensors(spec, (levels.shape[0], levels.shape[1]), tensors)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.spec.tensors(self.shape)}

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        rows, columns = torch.arange(self.shape[0], device=self.device)[start:stop], self.shape[1]
        group = rows // self.spec.rows
        codes, signs = self._streams(start, stop)
        count = self.spec.salient(columns)
        mask = unpack(self.salient, 1, columns).bool()[group]
        levels = torch.empty(mask.shape, device=self.device)
        levels[mask] = unpack(codes, 4, count).float().sub_(8).flatten()
        levels[~mask] = unpack(signs, 1, columns - count).float().mul_(2).sub_(1).flatten()
        scales = scale_values(self.scales[start:stop], self.peaks[group, :2])
        wide = scale_values(self.columns, self.peaks[:, 2:])[group]
        return levels.mul_(torch.where(mask, scales[:, 1:], scales[:, :1])).mul_(wide).to(dtype)

    def validate(self) -> None:
        if not bool((torch.isfinite(self.peaks) & (self.peaks >= 0)).all()):
            raise LayoutError("peaks: every one must be finite and at least 0")
        columns, count = self.shape[1], self.spec.salient(self.shape[1])
        counts = unpack(self.salient, 1, columns).sum(1)
        if not padding_is_zero(self.salient, 1, columns) or bool((counts != count).any()):
            raise LayoutError(f"salient: {counts.tolist()} are marked; {count} of {columns} must be in each group")
        codes, signs = self._streams(0, None)
        if not padding_is_zero(codes, 4, count) or not padding_is_zero(signs, 1, columns - count):
            raise LayoutError("weight: the padding bits at the end of a row are set; they must be zero")

    def _streams(self, start: int, stop: int | None) -> tuple[Tensor, Tensor]:
        """The rows' packed codes and signs."""
        widths = self.spec.widths(self.shape[1])
        rows = self.weight.view(self.shape[0], sum(widths))[start:stop]
        return rows[:, : widths[0]], rows[:, widths[0] :]
