"""Codebooks in training: their entries, the rows' scales, and which entry each vector takes."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from quant.kernels.codebook import PackedCodebook
from quant.kernels.packed import Packed
from quant.kernels.scales import scale_codes, scale_values
from quant.kernels.spec import Codebook
from quant.recovery.trainable import EVERY, MOST, Tunable, through
from quant.solvers.codebook import CodebookRounder
from quant.solvers.kmeans import nearest, nearest_pair

LEAN_CODEBOOK = 0.5


class TunableCodebook(Tunable):
    """The entries of both tables move in units of a table's root mean square (VPTQ, arXiv 2409.17066, section 3.4,
    trains them end to end), and with codes trained `place` is where each vector ought to lie, in units of the values'
    root mean square: it starts `LEAN_CODEBOOK` of the way from the solver's entry to the float vector. `settle` finds
    the entries nearest to the places of every `EVERY`th column, and takes those that gain most first, at most `MOST` of
    the matrix's indices (PV-Tuning, arXiv 2405.14852, section 3.2).
    """

    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        assert isinstance(packed, PackedCodebook)
        self.rounder = rounder = CodebookRounder.of(packed)
        self.start, self.peaks = rounder.scales, rounder.peaks[rounder.group]
        self.units = [table.square().mean().sqrt() for table in rounder.tables]
        self.moves = [torch.zeros_like(table, requires_grad=True) for table in rounder.tables]
        self.gain = torch.zeros_like(self.start, requires_grad=True)
        self.place: Tensor | None = None
        if train_codes:
            levels = rounder.levels(rounder.tables)
            wanted = weight / torch.where(self.start > 0, self.start, torch.inf)[:, None]
            self.unit = levels.square().mean().sqrt().clamp_min(1e-30)
            self.place = (torch.lerp(levels, wanted, LEAN_CODEBOOK) / self.unit).requires_grad_()

    @classmethod
    def held_bytes(cls, spec: Codebook, train_codes: bool) -> float:
        return 16 / spec.length + (8 if train_codes else 0)  # two indices of 8 bytes; places, their gradients

    def codes(self) -> list[Tensor]:
        return [] if self.place is None else [self.place]

    def scales(self) -> list[Tensor]:
        return [self.gain, *self.moves]

    def held(self) -> list[Tensor]:
        return [] if self.place is None else [self.rounder.index]

    def settle(self, step: int) -> None:
        if self.place is None:
            return
        rounder, tables = self.rounder, self._tables()
        scales = scale_values(self._codes(), self.peaks)
        energy = scales.square() / scales.square().mean().clamp_min(1e-30)
        columns = torch.arange(step % EVERY, self.place.shape[1], EVERY, device=self.place.device)
        wanted = rounder.vectors(self.place.detach()[:, columns] * self.unit)
        counts = rounder.vectors(energy[:, None].expand(-1, len(columns)))
        old, fine = rounder.index[:, :, columns], rounder.fine[columns] & (len(tables) > 1)
        new, gains = old.clone(), torch.zeros_like(wanted[..., 0])
        for group, (first, last) in enumerate(rounder.ranges):
            for count in range(1, len(tables) + 1):
                part = fine if count > 1 else ~fine
                here = [table[group] for table in tables[:count]]
                x, n = (t[first:last, part].flatten(0, 1) for t in (wanted, counts))
                before = old[:count, first:last, part].flatten(1)
                found = nearest_pair(x, n, here[0], here[1], before) if count > 1 else nearest(x, n, here[0])[None]
                gain = _distance(x, n, here, before) - _distance(x, n, here, found)
                new[:count, first:last, part] = found.view(count, last - first, -1)
                gains[first:last, part] = gain.view(last - first, -1)
        best = gains.flatten().sort(descending=True, stable=True)[1][: max(1, int(MOST * rounder.index[0].numel()))]
        taken = torch.zeros_like(gains, dtype=torch.bool)
        taken.view(-1)[best] = gains.flatten()[best] > 0
        rounder.index[:, :, columns] = torch.where(taken, new, old)

    def weight(self) -> Tensor:
        levels = self.rounder.levels(self._tables())
        if self.place is not None:
            levels = levels + self.unit * through(self.place, torch.zeros_like(self.place))
        return levels * through(self.start * (1 + self.gain), scale_values(self._codes(), self.peaks))[:, None]

    @torch.no_grad()
    def pack(self) -> Packed:
        made = copy(self.rounder)
        made.tables, made.codes = self._tables(), self._codes()
        return made.pack()

    def _tables(self) -> list[Tensor]:
        """As they would be stored."""
        moved = [t + unit * m for t, unit, m in zip(self.rounder.tables, self.units, self.moves, strict=True)]
        return [through(table, table.detach().half().float()) for table in moved]

    def _codes(self) -> Tensor:
        return scale_codes(self.start * (1 + self.gain.detach()), self.peaks)


def _distance(x: Tensor, weight: Tensor, tables: list[Tensor], index: Tensor) -> Tensor:
    """Of each of `x` `[n, v]` to the sum of the entries `index` `[tables, n]`, squared under `weight`."""
    left = x - sum(table[chosen] for table, chosen in zip(tables, index, strict=True))
    return left.square().mul_(weight).sum(1)
