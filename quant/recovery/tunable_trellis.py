"""Trellis codes in training: rows' scales, HYB's table, and the paths themselves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.kernels.packed import Packed
from quant.kernels.spec import Trellis
from quant.kernels.trellis import PackedTrellis, deviation, read, scale_codes, scale_values, state_values
from quant.kernels.viterbi import improve
from quant.recovery.trainable import EVERY, MOST, Tunable, through
from quant.solvers.coupling import Coupling
from quant.solvers.metric import own
from quant.solvers.trellis import counted

LEAN_TRELLIS = 0.5


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
        self.rows = torch.ones_like(self.start)
        self.coupling: Coupling | None = None
        self.place: Tensor | None = None
        if train_codes:
            scale = torch.where(self.start > 0, self.start, torch.inf)[:, None]
            levels = self.levels.float()
            self.place = (torch.lerp(levels, weight / scale, LEAN_TRELLIS) / self.unit).requires_grad_()
        if self.table is not None:
            self.table.requires_grad_()
        elif not train_codes:
            self.states = []

    @classmethod
    def held_bytes(cls, spec: Trellis, train_codes: bool) -> float:
        return 10 + 4 / spec.vector if train_codes else 2.0  # levels; places, their gradients, states

    def codes(self) -> list[Tensor]:
        return [] if self.place is None else [self.place]

    def scales(self) -> list[Tensor]:
        return [self.gain] if self.table is None else [self.gain, self.table]

    def weigh(self, metric: Tensor) -> None:
        self.rows = own(metric)
        if metric.shape[1] > 1 and self.place is not None:
            self.coupling = Coupling([metric], self.spec.length)

    def settle(self, step: int) -> None:
        if self.place is None:
            return
        known = self._values().detach()
        scales = scale_values(self._codes(), self.peaks)
        energy = scales.square() * self.rows
        together = None if self.coupling is None else self.coupling.together(scales)
        columns = torch.arange(step % EVERY, self.shape[1], EVERY, device=self.place.device)
        wanted = self.place.detach()[:, columns].T * self.unit
        code = (1 << self.spec.step) - 1  # bits of a state that are its own
        budget = max(int(MOST * self.place.numel() / self.spec.vector), *(states.shape[1] for states in self.states))
        for number, states in enumerate(self.states):
            first, length = number * self.spec.length, states.shape[1] * self.spec.vector
            rows = min(self.spec.length, self.shape[0] - first)
            target, counts = wanted.new_zeros((2, len(columns), length))
            target[:, :rows], counts[:, :rows] = wanted[:, first : first + rows], energy[first : first + rows]
            counts = counted(counts)
            seam = states.shape[1] // 2 if step // EVERY % 2 else 0
            old = states[columns]
            new = improve(target, counts, known, self.spec.step, old, seam)
            if together is None:
                gain = ((read(known, new) - target).square() - (read(known, old) - target).square()).mul_(counts).sum(1)
            else:
                both = together.of(slice(number, number + 1), length)
                new = both.nearer(target, known, old, new)
                new = both.settle(target, known, self.spec.step, new, 1, step // EVERY)
                before, after = (both.cost(read(known, path) - target)[1][:, 0] for path in (old, new))
                gain = after - before
            best = gain.sort(stable=True)[1]  # columns that gain most come first
            spent = ((old ^ new) & code).count_nonzero(1)[best].cumsum(0)
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
