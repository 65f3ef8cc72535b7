"""Packed weights: what a spec's tensors mean. The only thing that solvers and kernels share.

`uniform`, for a weight `[out, in]` of `bits` bits in `G = groups(in)` groups of `width` inputs (the last may be
shorter):

    tensor   dtype      shape                       content
    weight   uint8      [out * ceil(in*bits/8)]     row after row; a row is a dense bit stream of its codes, least
                                                    significant bit first, padded with zeros to a byte (`packing.py`)
    scales   f16/bf16   [out, G]                    finite; may be negative; 0 for a group of zeros
    zeros    uint8      [out, ceil(G*bits/8)]       asymmetric specs only: the zero points, packed like one row of codes

    weight[o, i] = scale[o, g] * (code[o, i] - zero[o, g]),  g = i // width

with `zero = 2^(bits-1)` in a symmetric spec (0.5 at 1 bit). The product is taken in float32 and then cast: this file
defines the values and every kernel is measured against it. `weight` has one dimension so that no float parameter has
its shape. Rows are independent, so row ranges can be cut out (`dequantize(start, stop)`) and stacked (`concatenate`):
fused qkv and the experts of a stack need nothing more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from quant.kernels.packing import pack, padding_is_zero, row_bytes, unpack
from quant.kernels.spec import DTYPES, Spec, Uniform


class LayoutError(ValueError):
    """Tensors that are not what their spec promises; names the tensor, what came and what was expected."""


@dataclass(frozen=True, eq=False)
class Packed(ABC):
    """A packed weight of `shape` `[out, in]`, stored as `spec` promises."""

    layout: ClassVar[str]

    spec: Spec
    shape: tuple[int, int]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, named, typed and shaped exactly as `spec.tensors(shape)`."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows `start` to `stop` as a plain matrix `[stop - start, in]`."""

    @abstractmethod
    def validate(self) -> None:
        """Raises `LayoutError` unless every value is one that the layout allows."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`. Raises `LayoutError` on a missing, extra or misshapen tensor."""

    def to(self, device: torch.device | str) -> Self:
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return type(self).from_tensors(self.spec, self.shape, moved)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device


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
    def from_tensors(cls, spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        if not isinstance(spec, Uniform):
            raise LayoutError(f"layout 'uniform' stores a Uniform spec; {type(spec).__name__} came")
        check_tensors(spec, shape, tensors)
        return cls(spec, (shape[0], shape[1]), tensors["weight"], tensors["scales"], tensors.get("zeros"))

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


def rows_at_once(device: torch.device, columns: int) -> int:
    """Rows to dequantize together. A million weights stay in a CPU's cache (whole matrices take nine times as long per
    weight, most of it page faults); an accelerator wants fewer, larger steps."""
    return max(1, (1 << 20 if device.type == "cpu" else 1 << 26) // max(1, columns))


def check_tensors(spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    """Raises `LayoutError` unless names, dtypes and shapes are exactly what `spec` promises for a weight of `shape`."""
    expected = spec.tensors(shape)
    for name in tensors:
        if name not in expected:
            raise LayoutError(
                f"{name}: a tensor that layout {spec.layout!r} does not have; it has {', '.join(expected)}"
            )
    for name, promise in expected.items():
        if name not in tensors:
            raise LayoutError(f"{name}: missing; {promise.dtype} {list(promise.shape)} is expected")
        came = tensors[name]
        if came.dtype != DTYPES[promise.dtype] or tuple(came.shape) != promise.shape:
            found = f"{str(came.dtype).removeprefix('torch.')} {list(came.shape)}"
            raise LayoutError(f"{name}: {found} came; {promise.dtype} {list(promise.shape)} is expected")


def concatenate(parts: Sequence[PackedUniform]) -> PackedUniform:
    """The parts stacked along the rows. They share spec and columns, or `LayoutError` says which does not."""
    first = parts[0]
    for part in parts[1:]:
        if part.spec != first.spec or part.shape[1] != first.shape[1]:
            raise LayoutError(
                f"cannot stack {part.spec} of {part.shape[1]} columns on {first.spec} of {first.shape[1]}; "
                "parts must share spec and columns"
            )
    return replace(
        first,
        shape=(sum(part.shape[0] for part in parts), first.shape[1]),
        weight=torch.cat([part.weight for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=None if first.zeros is None else torch.cat([part.zeros for part in parts if part.zeros is not None]),
    )


LAYOUTS: dict[str, type[Packed]] = {kind.layout: kind for kind in (PackedUniform,)}
"""The only table from a name to a class: files on disk need names."""
