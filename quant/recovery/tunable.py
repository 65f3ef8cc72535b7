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
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.packed import Packed
from quant.kernels.rotated import PackedRotated
from quant.kernels.spec import DTYPES
from quant.kernels.trellis import PackedTrellis, deviation, read, scale_codes, scale_values, state_values
from quant.kernels.viterbi import improve
from quant.solvers.grid import storable


class Tunable(ABC):
    """One packed matrix `[out, in]` in training. All its tensors are float32."""

    @abstractmethod
    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        """`weight` float32 `[out, in]`: the float one. `train_codes`: whether the codes will be."""

    def codes(self) -> list[Tensor]:
        """Parameters that decide the codes; a step of 1 is about one level."""
        return []

    def settle(self, step: int) -> None:
        """Finds the codes for what `codes()` are now, after step number `step` has changed them."""
        return

    def held(self) -> list[Tensor]:
        """What `settle` has made beside the parameters, for an interrupted training to keep: changed in place."""
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


class TunableTrellis(Tunable):
    """The scale of each row; and `place`, what the search is given: where each value ought to lie. Its unit is what a
    scalar grid of as many bits would have between its levels: at 2 bits the values' deviation, half of it for each bit
    more.

    A path stays the best one for a while when places move, and then gives way to another in which several values
    differ: `settle` searches again, from the seam it has, and takes so many new columns, those that gain most first,
    that at most `MOST` of the matrix's codes change, or one column's (straight-through estimation and re-encoding, as
    PV-Tuning, arXiv 2405.14852, does with codebooks). A place starts at its value, moved by `LEAN_TRELLIS` of the way
    to the float weight. The table of `hyb` is trained like a scale.
    """

    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        assert isinstance(packed, PackedTrellis)
        self.packed, self.spec, self.shape = packed, packed.spec, packed.shape
        self.table = None if packed.table is None else torch.zeros_like(packed.table, dtype=torch.float32)
        self.unit = deviation(packed.values()) * 2.0 ** (2 - self.spec.bits)
        self.states = [packed.states(number) for number in range(len(self.spec.sequences(self.shape[0])))]
        self.levels = self._levels().half()  # exact
        self.start = packed.row_scales()
        self.peaks = packed.peaks.repeat_interleave(packed.spec.length)[: packed.shape[0]]
        self.gain = torch.zeros_like(self.start, requires_grad=True)
        self.place: Tensor | None = None
        if train_codes:
            scale = torch.where(self.start > 0, self.start, torch.inf)[:, None]
            levels = self.levels.float()
            self.place = (torch.lerp(levels, weight / scale, LEAN_TRELLIS) / self.unit).requires_grad_()
        if self.table is not None:
            self.table.requires_grad_()
        elif not train_codes:
            self.states = []

    def codes(self) -> list[Tensor]:
        return [] if self.place is None else [self.place]

    def scales(self) -> list[Tensor]:
        return [self.gain] if self.table is None else [self.gain, self.table]

    def settle(self, step: int) -> None:
        if self.place is None:
            return
        known = self._values().detach()
        scales = scale_values(self._codes(), self.peaks)
        weight = scales.square() / scales.square().mean().clamp_min(1e-30)
        columns = torch.arange(step % EVERY, self.shape[1], EVERY, device=self.place.device)
        wanted = self.place.detach()[:, columns].T * self.unit
        own = (1 << self.spec.step) - 1  # bits of a state that are its own, its code
        budget = max(int(MOST * self.place.numel() / self.spec.vector), *(states.shape[1] for states in self.states))
        for number, states in enumerate(self.states):
            first, length = number * self.spec.length, states.shape[1] * self.spec.vector
            rows = min(self.spec.length, self.shape[0] - first)
            target, counts = wanted.new_zeros((2, len(columns), length))
            target[:, :rows], counts[:, :rows] = wanted[:, first : first + rows], weight[first : first + rows]
            seam = states.shape[1] // 2 if step // EVERY % 2 else 0
            old = states[columns]
            new = improve(target, counts, known, self.spec.step, old, seam)
            nearer = [((read(known, path) - target).square() * counts).sum(1) for path in (old, new)]
            best = (nearer[1] - nearer[0]).sort(stable=True)[1]  # columns that gain most come first
            spent = ((old ^ new) & own).count_nonzero(1)[best].cumsum(0)
            taken = best[spent <= budget]
            budget -= int(spent[len(taken) - 1]) if len(taken) else 0
            states[columns[taken]] = new[taken]
        self.levels.copy_(self._levels().detach())

    def held(self) -> list[Tensor]:
        return [] if self.place is None else [*self.states, self.levels]

    def weight(self) -> Tensor:
        stored = scale_values(self._codes(), self.peaks)
        levels = self.levels.float() if self.table is None else self._levels()
        if self.place is not None:
            levels = levels + self.unit * through(self.place, torch.zeros_like(self.place))
        return levels * through(self.start * (1 + self.gain), stored)[:, None]

    def pack(self) -> Packed:
        if self.place is None:
            return replace(self.packed, scales=self._codes(), table=self._table())
        parts = self._codes(), self.packed.peaks, self._table()
        return PackedTrellis.from_states(self.spec, self.shape, self.states, *parts)

    def _codes(self) -> Tensor:
        return scale_codes(self.start * (1 + self.gain.detach()), self.peaks)

    def _table(self) -> Tensor | None:
        """What is stored."""
        return None if self.table is None else self._moved(self.table.detach()).half()

    def _moved(self, gain: Tensor) -> Tensor:
        assert self.packed.table is not None
        return self.packed.table.float() * (1 + gain)

    def _values(self) -> Tensor:
        """Of every state; differentiable in the table."""
        if self.table is None:
            return self.packed.values()
        moved = self._moved(self.table)
        return state_values(self.spec, through(moved, moved.detach().half().float()))

    def _levels(self) -> Tensor:
        """The values `[out, in]` of the states."""
        known, length = self._values(), self.spec.length
        rows = (min(length, self.shape[0] - number * length) for number in range(len(self.states)))
        return torch.cat([read(known, states)[:, :n].T for n, states in zip(rows, self.states, strict=True)])


class TunableLowRank(Tunable):
    """What its base has, and the values of both factors."""

    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        assert isinstance(packed, PackedLowRank)
        self.packed, self.factors = packed, (packed.lora_b, packed.lora_a)
        self.base = tunable(packed.base, weight.addmm(*(part.float() for part in self.factors), alpha=-1), train_codes)
        self.gains = [torch.zeros_like(part, dtype=torch.float32, requires_grad=True) for part in self.factors]

    def codes(self) -> list[Tensor]:
        return self.base.codes()

    def scales(self) -> list[Tensor]:
        return [*self.base.scales(), *self.gains]

    def settle(self, step: int) -> None:
        self.base.settle(step)

    def held(self) -> list[Tensor]:
        return self.base.held()

    def weight(self) -> Tensor:
        moved = [part.float() * (1 + gain) for part, gain in zip(self.factors, self.gains, strict=True)]
        return self.base.weight().addmm(*(through(value, self._stored(value).float()) for value in moved))

    def pack(self) -> Packed:
        both = (part.float() * (1 + gain.detach()) for part, gain in zip(self.factors, self.gains, strict=True))
        lora_b, lora_a = (self._stored(value) for value in both)
        return replace(self.packed, base=self.base.pack(), lora_a=lora_a, lora_b=lora_b)

    def _stored(self, value: Tensor) -> Tensor:
        return value.detach().to(self.packed.lora_a.dtype)


class TunableRotated(Tunable):
    """What its base has, seen through the rotations."""

    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        assert isinstance(packed, PackedRotated)
        self.packed, self.inputs, self.outputs = packed, packed.inputs(), packed.outputs()
        turned = self.outputs.apply(self.inputs.apply(weight).T).T.contiguous()
        self.base = tunable(packed.base, turned, train_codes)

    def codes(self) -> list[Tensor]:
        return self.base.codes()

    def scales(self) -> list[Tensor]:
        return self.base.scales()

    def settle(self, step: int) -> None:
        self.base.settle(step)

    def held(self) -> list[Tensor]:
        return self.base.held()

    def weight(self) -> Tensor:
        return self.outputs.undo(self.inputs.undo(self.base.weight()).T).T

    def pack(self) -> Packed:
        return replace(self.packed, base=self.base.pack())


LEAN = 0.49
LEAN_TRELLIS = 0.5
MOST = 0.01  # of a trellis's codes may change in a step
EVERY = 4  # a trellis searches every fourth column in turn: a search of all costs more than a step's gradient
KINDS: dict[type[Packed], type[Tunable]] = {
    PackedUniform: TunableUniform,
    PackedTrellis: TunableTrellis,
    PackedRotated: TunableRotated,
    PackedLowRank: TunableLowRank,
}


def tunable(packed: Packed, weight: Tensor, train_codes: bool) -> Tunable:
    """Raises `SettingsError` for a layout that has nothing to train."""
    kind = KINDS.get(type(packed))
    if kind is None:
        known = ", ".join(sorted(packed.layout for packed in KINDS))
        raise SettingsError(f"layout {packed.layout!r} cannot be tuned; {known} can: set recovery to null")
    return kind(packed, weight, train_codes)


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
