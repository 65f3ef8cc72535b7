"""Packed weights as differentiable ones: what of each layout can be trained, and how to get back.

A `Tunable` is made from a solved `Packed` and the float weight that it stands for. Its `weight()` is exactly what
`pack().dequantize()` would give, with gradients that pass straight through every rounding (arXiv 1308.3432), so nothing
is lost when training ends. A new layout adds one class and one line of `KINDS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.errors import SettingsError
from quant.kernels.layouts import PackedUniform
from quant.kernels.packed import Packed
from quant.kernels.rotated import PackedRotated
from quant.kernels.spec import DTYPES
from quant.kernels.trellis import PackedTrellis, scale_codes, scale_values
from quant.solvers.grid import storable


class Tunable(ABC):
    """One packed matrix `[out, in]` in training. All its tensors are float32."""

    @abstractmethod
    def __init__(self, packed: Packed, weight: Tensor) -> None:
        """`weight` float32 `[out, in]`: the float one."""

    def codes(self) -> list[Tensor]:
        """Parameters that are rounded to whole codes; a step of 1 is one level."""
        return []

    def scales(self) -> list[Tensor]:
        """Parameters that start at 0 and multiply scales as `1 + parameter`."""
        return []

    @abstractmethod
    def weight(self) -> Tensor:
        """What would be stored now, float32 `[out, in]`, differentiable in all parameters."""

    @abstractmethod
    def pack(self) -> Packed: ...


class TunableUniform(Tunable):
    """Learned rounding and clipping (AutoRound, arXiv 2309.05516) from any start: `place` is where each weight lies
    among the codes.

    A weight starts where the float weight lies, but never further from its solved code than it takes to be rounded to
    it: feedback's choices stay, and those that were close calls can flip first.
    """

    def __init__(self, packed: Packed, weight: Tensor) -> None:
        assert isinstance(packed, PackedUniform)
        self.spec, self.shape = packed.spec, packed.shape
        self.top = 2**packed.spec.bits - 1
        self.group = torch.arange(packed.shape[1], device=weight.device) // packed.spec.group_width(packed.shape[1])
        self.zeros, self.start = packed.zero_points(), packed.scales.float()
        codes = packed.codes().float()
        lies = weight / torch.where(self.start == 0, 1.0, self.start)[:, self.group] + self.zeros[:, self.group]
        self.place = (codes + (lies - codes).clamp_(-LEAN, LEAN)).requires_grad_()
        self.gain = torch.zeros_like(self.start, requires_grad=True)

    def codes(self) -> list[Tensor]:
        return [self.place]

    def scales(self) -> list[Tensor]:
        return [self.gain]

    def weight(self) -> Tensor:
        codes = through(self.place, self._codes())
        scales = through(self.start * (1 + self.gain), self._scales())
        return scales[:, self.group] * (codes - self.zeros[:, self.group])

    def pack(self) -> Packed:
        zeros = None if self.spec.symmetric else self.zeros.byte()
        scales = self._scales().to(DTYPES[self.spec.scale_dtype])
        return PackedUniform.from_codes(self.spec, self.shape, self._codes().byte(), scales, zeros)

    def _codes(self) -> Tensor:
        return self.place.detach().round().clamp_(0, self.top)

    def _scales(self) -> Tensor:
        return storable(self.start * (1 + self.gain.detach()), DTYPES[self.spec.scale_dtype])


class TunableTrellis(Tunable):
    """The scale of each row; the codes stay."""

    def __init__(self, packed: Packed, weight: Tensor) -> None:
        assert isinstance(packed, PackedTrellis)
        self.packed = packed
        ones = replace(packed, scales=torch.zeros_like(packed.scales), peaks=torch.ones_like(packed.peaks))
        self.levels = ones.dequantize(torch.float16)  # exact, in half the memory
        self.start = packed.row_scales()
        self.peaks = packed.peaks.repeat_interleave(packed.spec.length)[: packed.shape[0]]
        self.gain = torch.zeros_like(self.start, requires_grad=True)

    def scales(self) -> list[Tensor]:
        return [self.gain]

    def weight(self) -> Tensor:
        stored = scale_values(self._codes(), self.peaks)
        return self.levels.float() * through(self.start * (1 + self.gain), stored)[:, None]

    def pack(self) -> Packed:
        return replace(self.packed, scales=self._codes())

    def _codes(self) -> Tensor:
        return scale_codes(self.start * (1 + self.gain.detach()), self.peaks)


class TunableRotated(Tunable):
    """What its base has, seen through the rotations."""

    def __init__(self, packed: Packed, weight: Tensor) -> None:
        assert isinstance(packed, PackedRotated)
        self.packed, self.inputs, self.outputs = packed, packed.inputs(), packed.outputs()
        turned = self.outputs.apply(self.inputs.apply(weight).T).T.contiguous()
        self.base = tunable(packed.base, turned)

    def codes(self) -> list[Tensor]:
        return self.base.codes()

    def scales(self) -> list[Tensor]:
        return self.base.scales()

    def weight(self) -> Tensor:
        return self.outputs.undo(self.inputs.undo(self.base.weight()).T).T

    def pack(self) -> Packed:
        return replace(self.packed, base=self.base.pack())


LEAN = 0.49
KINDS: dict[type[Packed], type[Tunable]] = {
    PackedUniform: TunableUniform,
    PackedTrellis: TunableTrellis,
    PackedRotated: TunableRotated,
}


def tunable(packed: Packed, weight: Tensor) -> Tunable:
    """Raises `SettingsError` for a layout that has nothing to train."""
    kind = KINDS.get(type(packed))
    if kind is None:
        known = ", ".join(sorted(packed.layout for packed in KINDS))
        raise SettingsError(f"layout {packed.layout!r} cannot be tuned; {known} can: set recovery to null")
    return kind(packed, weight)


class _Through(torch.autograd.Function):
    """`rounded`, bit for bit, with the gradient of `value`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


def through(value: Tensor, rounded: Tensor) -> Tensor:
    found: Any = _Through.apply(value, rounded)
    return found
