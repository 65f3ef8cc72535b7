"""Codebooks: weights as indices into a table of vectors (VPTQ, arXiv 2409.17066), the spec and the packed weight.

`codebook`, for a weight `[out, in]` in vectors of `length` rows of one column, one codebook for each `rows` rows (the
last ones may be fewer; a vector that the end of its rows cuts short is stored whole):

    tensor    dtype   shape                              content
    weight    uint8   [vectors * bytes]                  vector row after vector row: the first indices of its `in`
                                                         vectors, then the second ones of its `finer` columns in
                                                         ascending order, each packed as rows of planes (`packing.py`)
    codebook  f16     [groups, 2^index_bits, length]     finite
    second    f16     [groups, 2^second_bits, length]    finite; only with `second_bits`
    columns   uint8   [groups, ceil(in/8)]               bit i % 8 of byte i // 8 is 1 where column i has a second
                                                         index, `finer(in)` of them; only with 0 < share < 1
    scales    uint8   [out]                              scale[o] = peak * 2^(-scales[o] / 16); 255 means 0
    peaks     f16     [groups]                           the largest scale in each group; finite

    weight[o, i] = scale[o] * (codebook[g, first[n, i], t] + second[g, second[n, i], t]),
    g = o // rows,  n the vector row and t the place in it of o, counted in its group

The second codebook is a residual stage if it serves all columns, and a finer codebook for outlier columns if it serves
a few. No index depends on another. The GPU kernels have the codebooks in shared memory or the first-level cache (about
64 KiB at most where `codebook_for` chose them) and the indices in an order of their own (`codebook_order.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from quant.kernels.packed import LayoutError, Packed
from quant.kernels.packing import pack, pack_planes, padding_is_zero, plane_bytes, unpack, unpack_planes
from quant.kernels.promise import Spec, SpecError, TensorSpec, check_number, check_whole
from quant.kernels.scales import scale_values

FAST = 4, 8
"""Length and bits of an index that the fastest kernel takes, without second ones."""

MORE, WORSE = 1.005, 1.05
"""See `codebook_for`."""


@dataclass(frozen=True)
class Codebook(Spec):
    """Vectors of `length` outputs (1-16), an index of `index_bits` bits (1-16) each, a codebook for each `rows` rows.

    `second_bits`: of a second index, whose vector is added (0: none), in the `share` of the columns with the largest
    inputs. `length` 0: `codebook_for` chooses length and index for `bits` bits per weight and the shape.
    """

    layout: ClassVar[str] = "codebook"

    bits: float = 2.25
    length: int = 0
    index_bits: int = 0
    second_bits: int = 0
    share: float = 1.0
    rows: int = 4096

    def __post_init__(self) -> None:
        least = 0 if self.length == 0 else 1
        limits = {"length": (0, 16), "index_bits": (least, 16), "second_bits": (0, 16), "rows": (1, 1 << 20)}
        check_whole(self, "a codebook takes", **limits)
        check_number(self, "a codebook takes", bits=16, share=1)

    @property
    def unit(self) -> int:
        return self.rows

    def chosen(self, shape: tuple[int, int]) -> Codebook:
        return codebook_for(self, (shape[0], shape[1]))

    def finer(self, columns: int) -> int:
        """How many columns have a second index."""
        return max(1, round(self.share * columns)) if self.second_bits else 0

    def vectors(self, rows: int) -> list[int]:
        """Vector rows in each group."""
        return [math.ceil(min(self.rows, rows - start) / self.length) for start in range(0, rows, self.rows)]

    def widths(self, columns: int) -> tuple[int, int]:
        """Bytes of the first and of the second indices of a vector row."""
        return plane_bytes(columns, self.index_bits), plane_bytes(self.finer(columns), self.second_bits)

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        if self.length == 0:
            return codebook_for(self, shape).tensors(shape)
        rows, columns = shape
        vectors = self.vectors(rows)
        groups = len(vectors)
        stored = {
            "weight": TensorSpec("uint8", (sum(vectors) * sum(self.widths(columns)),)),
            "codebook": TensorSpec("float16", (groups, 1 << self.index_bits, self.length)),
        }
        if self.second_bits:
            stored["second"] = TensorSpec("float16", (groups, 1 << self.second_bits, self.length))
        if 0 < self.finer(columns) < columns:
            stored["columns"] = TensorSpec("uint8", (groups, math.ceil(columns / 8)))
        stored["scales"] = TensorSpec("uint8", (rows,))
        stored["peaks"] = TensorSpec("float16", (groups,))
        return stored


@cache
def codebook_for(spec: Codebook, shape: tuple[int, int]) -> Codebook:
    """The spec with the length and index for a weight of this shape: the least expected error of those that stay within
    `spec.bits`, codebooks and scales included. Longer vectors fill space better, but their codebooks soon cost more
    than that is worth: a matrix of 4096 weights can pay for pairs, one of a million for vectors of four.

    What they leave goes into finer columns.

    Vectors of 4 with indices of a byte, which a kernel of their own multiplies several times as fast as the others
    (`codebook_shared.py`), are preferred where they expect no more than `WORSE` of the least error; codebook and scales
    may then come on top, up to `MORE` of the bits. So 2 bits are 2.0015 of a matrix of 8192 x 8192.

    Raises `SpecError` if nothing fits.
    """
    if spec.length:
        return spec
    found = [
        choice
        for length in range(1, 9)
        for bits in range(1, 13)
        for second in range(6)
        if (choice := _filled(replace(spec, length=length, index_bits=bits, second_bits=second), shape))
    ]
    if not found:
        raise SpecError(f"no codebook for a weight of {list(shape)} fits in {spec.bits:g} bits per weight")
    best = min(found, key=lambda choice: _expected(choice, shape[1]))
    fast = replace(spec, length=FAST[0], index_bits=FAST[1], second_bits=0, share=1.0)
    if fast.bits_per_weight(shape) > MORE * spec.bits:
        return best
    return fast if _expected(fast, shape[1]) <= WORSE * _expected(best, shape[1]) else best


def _filled(spec: Codebook, shape: tuple[int, int]) -> Codebook | None:
    """The spec with as many finer columns as fit, or None."""
    most = shape[1] // 4 if spec.second_bits else 1
    fits = lambda n: replace(spec, share=n / shape[1]).bits_per_weight(shape) <= spec.bits  # noqa: E731
    count = bisect_left(range(1, most + 1), True, key=lambda n: not fits(n))
    return replace(spec, share=count / shape[1] if spec.second_bits else 1.0) if count else None


def _expected(spec: Codebook, columns: int) -> float:
    """Error on Gaussian input at this rate and length: Zador's formula, with cells as good as spheres."""
    v, finer = spec.length, spec.finer(columns) / columns
    cell = math.gamma(v / 2 + 1) ** (2 / v) / (math.pi * (v + 2))
    error = 2 * math.pi * cell * ((v + 2) / v) ** ((v + 2) / 2) * 4.0 ** (-spec.index_bits / v)
    return error * (1 - finer + finer * 4.0 ** (-spec.second_bits / v))


@dataclass(frozen=True, eq=False)
class PackedCodebook(Packed):
    """See the module. `second` and `columns` are None where the spec has none."""

    layout: ClassVar[str] = "codebook"

    spec: Codebook  # pyright: ignore[reportIncompatibleVariableOverride]  frozen: a narrower type is sound
    stored: dict[str, Tensor]

    @classmethod
    def _made(cls, spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        assert isinstance(spec, Codebook)
        return cls(spec, shape, {name: tensors[name] for name in spec.tensors(shape)})

    @classmethod
    def from_indices(
        cls, spec: Codebook, shape: tuple[int, int], first: Tensor, second: Tensor, fine: Tensor,
        tensors: Mapping[str, Tensor],
    ) -> Self:  # fmt: skip
        """From the indices int32 `[vector rows, in]` and `[vector rows, finer]`, the numbers of the `fine` columns in
        ascending order, and the other tensors."""
        parts = [pack_planes(first, spec.index_bits)]
        made = {name: tensors[name] for name in tensors}
        if spec.second_bits:
            parts.append(pack_planes(second, spec.second_bits))
        if "columns" in spec.tensors(shape):
            mask = torch.zeros(shape[1], dtype=torch.uint8, device=fine.device).index_fill_(0, fine, 1)
            made["columns"] = pack(mask[None], 1).repeat(len(tensors["peaks"]), 1)
        made["weight"] = torch.cat(parts, 1).flatten()
        return cls.from_tensors(spec, shape, made)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.stored)

    def indices(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Of the vector rows `start` to `stop`: the first indices int32 `[n, in]` and the second ones `[n, finer]`."""
        widths = self.spec.widths(self.shape[1])
        streams = self.stored["weight"].view(-1, sum(widths))[start:stop]
        first = unpack_planes(streams[:, : widths[0]], self.spec.index_bits, self.shape[1])
        if not self.spec.second_bits:
            return first, first[:, :0]
        fine = self.spec.finer(self.shape[1])
        return first, unpack_planes(streams[:, widths[0] :], self.spec.second_bits, fine)

    def fine(self, group: int) -> Tensor:
        """The columns of a group that have a second index, ascending."""
        if "columns" not in self.stored:
            return torch.arange(self.spec.finer(self.shape[1]), device=self.device)
        return unpack(self.stored["columns"][group : group + 1], 1, self.shape[1])[0].nonzero()[:, 0]

    def row_scales(self) -> Tensor:
        """Scales float32 `[out]`."""
        peaks = self.stored["peaks"].repeat_interleave(self.spec.rows)[: self.shape[0]]
        return scale_values(self.stored["scales"], peaks)

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        rows, (length, high) = range(self.shape[0])[start:stop], (self.spec.length, self.spec.rows)
        weight = torch.empty((len(rows), self.shape[1]), dtype=dtype, device=self.device)
        scales = self.row_scales()
        per = math.ceil(high / length)  # vector rows of a whole group
        for group in range(rows.start // high, math.ceil(rows.stop / high) if len(rows) else 0):
            begin, end = max(rows.start - group * high, 0), min(rows.stop - group * high, high)
            first, last = begin // length, math.ceil(end / length)
            found = self._levels(group, group * per + first, group * per + last)
            found = found[begin - first * length : end - first * length]
            part = slice(group * high + begin, group * high + end)
            weight[part.start - rows.start : part.stop - rows.start] = found * scales[part, None]
        return weight

    def _levels(self, group: int, start: int, stop: int) -> Tensor:
        """Unscaled rows float32 `[vectors * length, in]` of vector rows of one group."""
        first, second = self.indices(start, stop)
        levels = self.stored["codebook"][group].float()[first.long()]  # [n, in, length]
        if self.spec.second_bits:
            levels[:, self.fine(group)] += self.stored["second"][group].float()[second.long()]
        return levels.transpose(1, 2).flatten(0, 1)

    def validate(self) -> None:
        for name in ("codebook", "second", "peaks"):
            if name in self.stored and not bool(torch.isfinite(self.stored[name]).all()):
                raise LayoutError(f"{name}: not every value is finite; every one must be")
        if bool((self.stored["peaks"] < 0).any()):
            raise LayoutError("peaks: every one must be at least 0")
        columns, fine = self.shape[1], self.spec.finer(self.shape[1])
        streams = self.stored["weight"].view(-1, sum(self.spec.widths(columns)))
        ends = ((columns, self.spec.index_bits), (fine, self.spec.second_bits))
        for part, (n, bits) in zip(streams.split(self.spec.widths(columns), 1), ends, strict=True):
            if bits and not padding_is_zero(part, bits if bits <= 8 else bits - 8, n):
                raise LayoutError("weight: the padding bits at the end of a row are set; they must be zero")
        if "columns" in self.stored:
            masks = self.stored["columns"]
            counts = unpack(masks, 1, columns).sum(1)
            if not padding_is_zero(masks, 1, columns) or bool((counts != fine).any()):
                raise LayoutError(f"columns: {counts.tolist()} are marked; {fine} of {columns} must be in each group")
