"""Packed weights as differentiable ones: what of each layout can be trained, and how to get back.

A `Tunable` is made from a solved `Packed` and the float weight that it stands for. Its `weight()` is exactly what
`pack().dequantize()` would give, with gradients that pass straight through every rounding (arXiv 1308.3432), so nothing
is lost when training ends. A new layout adds one class and one line of `KINDS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.errors import SettingsError
from quant.kernels.codebook import PackedCodebook
from quant.kernels.layouts import PackedUniform
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.packed import Packed
from quant.kernels.rotated import PackedRotated
from quant.kernels.smoothed import PackedSmoothed
from quant.kernels.spec import DTYPES, Spec, rounds_inputs
from quant.kernels.trellis import PackedTrellis
from quant.recovery.trainable import Tunable, through
from quant.recovery.tunable_codebook import TunableCodebook
from quant.recovery.tunable_trellis import TunableTrellis
from quant.solvers.grid import storable


class TunableUniform(Tunable):
    """Learned rounding and clipping (AutoRound, arXiv 2309.05516) from any start: `place` is where each weight lies
    among the codes.

    A weight starts where the float weight lies, but never further from its solved code than it takes to be rounded to
    it: feedback's choices stay, and those that were close calls can flip first.
    """

    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        assert isinstance(packed, PackedUniform)
        self.spec, self.shape = packed.spec, packed.shape
        self.top = 2**packed.spec.bits - 1
        self.group = torch.arange(packed.shape[1], device=weight.device) // packed.spec.group_width(packed.shape[1])
        self.zeros, self.start = packed.zero_points(), packed.scales.float()
        codes = packed.codes().float()
        lies = weight / torch.where(self.start == 0, 1.0, self.start)[:, self.group] + self.zeros[:, self.group]
        self.place = (codes + (lies - codes).clamp_(-LEAN, LEAN)).requires_grad_(train_codes)
        self.gain = torch.zeros_like(self.start, requires_grad=True)

    @classmethod
    def held_bytes(cls, spec: Spec, train_codes: bool) -> float:
        return 8.0 if train_codes else 4.0  # places, their gradients

    def codes(self) -> list[Tensor]:
        return [self.place] if self.place.requires_grad else []

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


class Wrapped(Tunable):
    """What its `base` has; wrappers add to it."""

    base: Tunable

    def codes(self) -> list[Tensor]:
        return self.base.codes()

    def scales(self) -> list[Tensor]:
        return self.base.scales()

    def weigh(self, metric: Tensor) -> None:
        self.base.weigh(metric)

    def settle(self, step: int) -> None:
        self.base.settle(step)

    def held(self) -> list[Tensor]:
        return self.base.held()


class TunableLowRank(Wrapped):
    """The values of both factors too. They stay where inputs are rounded: what rounding took from them goes through
    the stored ones (`quant/rounding.py`)."""

    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        assert isinstance(packed, PackedLowRank)
        self.packed, self.factors = packed, (packed.lora_b, packed.lora_a)
        self.base = tunable(packed.base, weight.addmm(*(part.float() for part in self.factors), alpha=-1), train_codes)
        trained = not rounds_inputs(packed.spec)
        self.gains = [torch.zeros_like(part, dtype=torch.float32, requires_grad=trained) for part in self.factors]

    def scales(self) -> list[Tensor]:
        return [*self.base.scales(), *(gain for gain in self.gains if gain.requires_grad)]

    def weight(self) -> Tensor:
        moved = [part.float() * (1 + gain) for part, gain in zip(self.factors, self.gains, strict=True)]
        return self.base.weight().addmm(*(through(value, self._stored(value).float()) for value in moved))

    def pack(self) -> Packed:
        both = (part.float() * (1 + gain.detach()) for part, gain in zip(self.factors, self.gains, strict=True))
        lora_b, lora_a = (self._stored(value) for value in both)
        return replace(self.packed, base=self.base.pack(), lora_a=lora_a, lora_b=lora_b)

    def _stored(self, value: Tensor) -> Tensor:
        return value.detach().to(self.packed.lora_a.dtype)


class TunableRotated(Wrapped):
    """The base is seen through the rotations, which stay."""

    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        assert isinstance(packed, PackedRotated)
        self.packed, self.inputs, self.outputs = packed, packed.inputs(), packed.outputs()
        turned = self.outputs.apply(self.inputs.apply(weight).T).T.contiguous()
        self.base = tunable(packed.base, turned, train_codes)

    def weigh(self, metric: Tensor) -> None:
        if self.outputs.signs is None:  # which would mix rows
            self.base.weigh(metric)

    def weight(self) -> Tensor:
        return self.outputs.undo(self.inputs.undo(self.base.weight()).T).T

    def pack(self) -> Packed:
        return replace(self.packed, base=self.base.pack())


class TunableSmoothed(Wrapped):
    """The factors of the inputs too: around a rotation they are its signs, trained (QTIP, arXiv 2406.11235, section
    4.1, and QuIP# before it tune them so). They stay where inputs are rounded, which sees the stored ones."""

    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        assert isinstance(packed, PackedSmoothed)
        self.packed, self.start = packed, packed.smooth.float()
        self.base = tunable(packed.base, weight / self.start, train_codes)
        self.gain = torch.zeros_like(self.start, requires_grad=not rounds_inputs(packed.spec))

    def scales(self) -> list[Tensor]:
        return [*self.base.scales(), *([self.gain] if self.gain.requires_grad else [])]

    def weight(self) -> Tensor:
        return self.base.weight() * through(self.start * (1 + self.gain), self._stored().float())

    def pack(self) -> Packed:
        return replace(self.packed, base=self.base.pack(), smooth=self._stored())

    def _stored(self) -> Tensor:
        dtype = self.packed.smooth.dtype
        return storable(self.start * (1 + self.gain.detach()).clamp_min(0.1), dtype).to(dtype)


LEAN = 0.49
KINDS: dict[type[Packed], type[Tunable]] = {
    PackedUniform: TunableUniform,
    PackedTrellis: TunableTrellis,
    PackedRotated: TunableRotated,
    PackedCodebook: TunableCodebook,
    PackedLowRank: TunableLowRank,
    PackedSmoothed: TunableSmoothed,
}


def tunable(packed: Packed, weight: Tensor, train_codes: bool, metric: Tensor | None = None) -> Tunable:
    """`metric`: see `Tunable.weigh`. Raises `SettingsError` for a layout that has nothing to train."""
    check_tunable(packed.spec)
    made = KINDS[type(packed)](packed, weight, train_codes)
    if metric is not None:
        made.weigh(metric)
    return made


def training_bytes(spec: Spec, train_codes: bool) -> float:
    """Bytes for each weight that `Tunable`s of a spec hold in training, gradients included."""
    kinds = {packed.layout: kind for packed, kind in KINDS.items()}
    return kinds[spec.core.layout].held_bytes(spec.core, train_codes)


def check_tunable(spec: Spec) -> None:
    """Raises `SettingsError` for a spec that has a layout with nothing to train."""
    known = {packed.layout for packed in KINDS}
    inner: Any = spec
    while inner is not None:
        if inner.layout not in known:
            raise SettingsError(
                f"layout {inner.layout!r} cannot be tuned; {', '.join(sorted(known))} can: set recovery and "
                "distillation to null"
            )
        inner = getattr(inner, "base", None)
