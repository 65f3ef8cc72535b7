"""A packed weight in a rotated basis, and how to multiply by it.

`rotated` holds the tensors of its base and

    rotation      uint8   [2]            1 where the input side, and the output side, is rotated
    input_signs   uint8   [ceil(in/8)]   bit i % 8 of byte i // 8 is 1 where the sign of input i is negative
    output_signs  uint8   [ceil(out/8)]  the same for the outputs, in specs that may rotate them

    W = B^T Q A,   A = H diag(input signs), B = H diag(output signs),  H of blocks of `block_for(n, spec.block)`

with `Q` the base and `H` as in `kernels/hadamard.py`; a side that is not rotated has the identity. So
`W x = B^T (Q (A x))`: the activations are rotated instead of the weight, in float32 inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from quant.kernels.hadamard import block_for, hadamard
from quant.kernels.packed import LayoutError, Packed, PackedAround
from quant.kernels.packing import pack, padding_is_zero
from quant.kernels.spec import Rotated


@dataclass(frozen=True, eq=False)
class Rotation:
    """One side's change of basis: `apply(x)` is `A x` along the last dimension, `undo` its inverse. `signs` int8 `[n]`
    of +-1, or None: the identity. `where`: a bool that says whether it is one in place of that, for a graph."""

    block: int
    signs: Tensor | None
    where: Tensor | None = None

    def apply(self, x: Tensor, inverse: bool = False) -> Tensor:
        turned = x if self.signs is None else hadamard(x, self.block, self.signs, inverse)
        return turned if self.where is None else torch.where(self.where, turned, x)

    def undo(self, x: Tensor) -> Tensor:
        return self.apply(x, inverse=True)


IDENTITY = Rotation(1, None)


@dataclass(frozen=True, eq=False)
class PackedRotated(PackedAround):
    """See the module. `output_signs` is None where the spec has none. The signs of both sides are as stored, or
    `in_order`: as `spread` gives them, around a base in kernel order."""

    layout: ClassVar[str] = "rotated"
    shared: ClassVar[tuple[str, ...]] = ("rotation", "input_signs")

    spec: Rotated  # pyright: ignore[reportIncompatibleVariableOverride]  frozen: a narrower type is sound
    rotation: Tensor
    input_signs: Tensor
    output_signs: Tensor | None = None
    in_order: bool = False

    @classmethod
    def around(cls, spec: Rotated, base: Packed, inputs: Rotation, outputs: Rotation) -> Self:
        """`base` with the rotations that it was solved under."""
        sides = (inputs, outputs)
        rotation = torch.tensor([side.signs is not None for side in sides], dtype=torch.uint8, device=base.device)
        signs = [_pack_signs(side.signs, n, base.device) for side, n in zip(sides, base.shape[::-1], strict=True)]
        return cls(spec, base.shape, base, rotation, signs[0], signs[1] if spec.outputs else None)

    def tensors(self) -> dict[str, Tensor]:
        stored = {**self.base.tensors(), "rotation": self.rotation, "input_signs": self.input_signs}
        return stored if self.output_signs is None else {**stored, "output_signs": self.output_signs}

    def spread(self, begin: int, end: int) -> dict[str, Tensor]:
        """The own tensors of rows `begin` to `end`, the signs of a rotated side int8 +-1 `[n]`."""
        found = {"rotation": self.rotation, "input_signs": self.input_signs}
        if self.inputs().signs is not None:
            found["input_signs"] = _signs(self.input_signs, self.shape[1])
        if self.output_signs is not None:
            signs = _signs(self.output_signs, self.shape[0])[begin:end]
            rotated = self.outputs().signs is not None
            found["output_signs"] = signs.contiguous() if rotated else _pack_signs(signs, len(signs), signs.device)
        return found

    def gathered(self) -> PackedRotated:
        """The inverse of `spread`, around a base in the checkpoint's order."""
        sides = (self.input_signs, self.output_signs)
        own = [s if s is None or s.dtype == torch.uint8 else _pack_signs(s, len(s), s.device) for s in sides]
        assert own[0] is not None
        return PackedRotated(self.spec, self.shape, self.base, self.rotation, own[0], own[1])

    def inputs(self) -> Rotation:
        return self._side(0, self.input_signs, self.shape[1])

    def outputs(self) -> Rotation:
        return self._side(1, self.output_signs, self.shape[0])

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        rows, outputs = range(self.shape[0])[start:stop], self.outputs()
        if outputs.signs is None:
            return self.inputs().undo(self.base.dequantize(torch.float32, rows.start, rows.stop)).to(dtype)
        block = outputs.block
        first, last = rows.start // block * block, -(-rows.stop // block) * block
        found = self.inputs().undo(self.base.dequantize(torch.float32, first, last))
        turned = Rotation(block, outputs.signs[first:last], outputs.where).undo(found.T).T
        return turned[rows.start - first : rows.stop - first].to(dtype).contiguous()

    def validate(self) -> None:
        self.base.validate()
        if int(self.rotation.max()) > 1 or (self.output_signs is None and int(self.rotation[1])):
            raise LayoutError(f"rotation is {self.rotation.tolist()}; 0 or 1 for each side that the spec rotates")
        stored = {"input_signs": self.input_signs, "output_signs": self.output_signs}
        for (name, signs), n in zip(stored.items(), self.shape[::-1], strict=True):
            if signs is not None and not padding_is_zero(signs[None], 1, n):
                raise LayoutError(f"{name}: the padding bits at the end are set; they must be zero")

    def _side(self, side: int, signs: Tensor | None, n: int) -> Rotation:
        asked = not self.in_order and torch.compiler.is_compiling()  # one graph serves weights that differ in this
        if signs is None or not (asked or (signs.dtype == torch.int8 if self.in_order else int(self.rotation[side]))):
            return IDENTITY
        known = signs if self.in_order else _signs(signs, n)
        return Rotation(block_for(n, self.spec.block), known, self.rotation[side].bool() if asked else None)


def _signs(packed: Tensor, n: int) -> Tensor:
    """Int8 +-1 `[n]`: asked for in every product on a CPU, so in few operations."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return 1 - 2 * bits.flatten()[:n].to(torch.int8)


def _pack_signs(signs: Tensor | None, n: int, device: torch.device) -> Tensor:
    negative = torch.zeros(n, dtype=torch.uint8, device=device) if signs is None else (signs < 0).to(torch.uint8)
    return pack(negative[None], 1)[0]
