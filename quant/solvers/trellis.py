"""The rounder of trellis codes: a column at a time, each in sequences along the outputs.

Because a sequence runs along the outputs, feedback still corrects after every single column; with the 16 x 16 tiles of
QTIP (arXiv 2406.11235) it corrects after 16, which costs most where columns are few. A column's rows have scales of
their own, and an error in a row counts as that row's scale squared, so the search is told those weights; and where it
is known what an error in each row costs the model (`fisher.py`), that much more or less. What errors in two rows cost
together is searched for in a few steps (`coupling.py`).

Descent fits this code especially well: with all other columns fixed, and where rows count by themselves, a search for
the nearest path is the exact best column (but for the seam, which is kept at one of two places in turn).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.kernels.packed import Packed
from quant.kernels.spec import Trellis
from quant.kernels.trellis import PackedTrellis, deviation, read, scale_codes, scale_values, state_values
from quant.kernels.viterbi import improve, search
from quant.solvers.coupling import Coupling, Together
from quant.solvers.grid import storable
from quant.solvers.kmeans import MOST, kmeans
from quant.solvers.metric import own
from quant.solvers.rounder import Rehearsal

WIDER = 1.07  # feedback adds to what a column holds; 1.0 to 1.15 tried on two models, flat from 1.05 to 1.1
HEADROOM = 2**0.25  # what `refit` may add to a sequence's largest scale


@cache
def start_table(bits: int) -> Tensor:
    """What `hyb` begins with, float16 `[2^bits, 2]`: k-means of Gaussian pairs, their first entry without its sign."""
    pairs = torch.randn((MOST, 2), generator=torch.Generator().manual_seed(0))
    pairs[:, 0].abs_()
    return kmeans(pairs, torch.ones_like(pairs), 1 << bits).half()


def counted(scales: Tensor, rows: Tensor) -> Tensor:
    """How much an error of an unscaled value counts in each row of a search, of mean 1."""
    energy = scales.square() * rows
    return energy / energy.mean().clamp_min(1e-30)


class TrellisRounder:
    """States of a trellis code; see the module. Holds them column after column, rows padded as on disk."""

    granularity = 1

    def __init__(
        self, spec: Trellis, shape: tuple[int, int], device: torch.device, metric: Tensor | None = None, tries: int = 0
    ) -> None:
        """`metric` `[out, width]`: how much errors in the rows count (`metric.py`), `width` 1 or as many as share bits;
        `tries`: how often a path is looked for again for what they count together."""
        self.spec, self.shape, self.span, self.tries = spec, shape, shape[1], tries
        metric = torch.ones((shape[0], 1), device=device) if metric is None else metric
        self.rows = own(metric)
        sequences = spec.sequences(shape[0])
        self.lengths = [padded for _, padded in sequences]
        self.sequence = torch.arange(shape[0], device=device) // spec.length
        self.states = torch.zeros((shape[1], sum(self.lengths) // spec.vector), dtype=torch.int32, device=device)
        self.table = start_table(spec.table_bits).to(device) if spec.code == "hyb" else None
        self.values = state_values(spec, self.table).to(device)
        self.peaks = torch.zeros(len(sequences), dtype=torch.float16, device=device)
        self.rounded, self.sweep = set[int](), 0
        self.coupling = Coupling(metric, spec.length) if tries and metric.shape[1] > 1 else None

    def _scale(self, codes: Tensor) -> None:
        """Takes `codes` for the rows' scales, and what a search needs of these. `scales` float32 `[out]`."""
        self.codes, self.scales = codes, scale_values(codes, self.peaks[self.sequence])
        self.inverse = torch.where(self.scales > 0, 1 / self.scales, 0.0)
        self.weight = self._padded(counted(self.scales, self.rows))
        together, number = None if self.coupling is None else self.coupling.together(self.scales), 0
        self.together = list[Together | None]()  # of each run
        for length, first, last in self._alike():
            count = (last - first) // length
            self.together.append(None if together is None else together.of(number, number + count, length))
            number += count

    def _padded(self, rows: Tensor) -> Tensor:
        """As rows lie in sequences: only the last one has padding."""
        return pad(rows, (0, sum(self.lengths) - self.shape[0]))

    def fit(self, start: int, weight: Tensor, importance: Tensor, rehearsal: Rehearsal | None = None) -> None:
        spread = ((weight.float().square() @ importance) / importance.sum().clamp_min(1e-30)).sqrt()
        scales = spread * (WIDER / deviation(self.values))
        top = torch.zeros_like(self.peaks, dtype=torch.float32).scatter_reduce_(0, self.sequence, scales, "amax")
        self.peaks = storable(top * HEADROOM, torch.float16).half()
        self._scale(scale_codes(scales, self.peaks[self.sequence]))

    def round(self, columns: Tensor, values: Tensor) -> Tensor:
        column, target = int(columns), self._padded(values[:, 0] * self.inverse)
        states, again = self.states[column], column in self.rounded
        for together, (length, first, last) in zip(self.together, self._alike(), strict=True):
            x, w = (part[first:last].view(-1, length) for part in (target, self.weight))
            now = states[first // self.spec.vector : last // self.spec.vector].view(len(x), -1)
            found, arrays = now, (self.values, self.spec.step)
            if not again:
                found = search(x, w, *arrays)
            if together is not None:
                found = together.settle(x, *arrays, found, 1 if again else self.tries, self.sweep)
            elif again:
                found = improve(x, w, *arrays, now, now.shape[1] // 2 if self.sweep % 2 else 0)
            now.copy_(found)
        self.rounded.add(column)
        return (read(self.values, states)[: self.shape[0]] * self.scales)[:, None]

    def refit(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """Each row's scale that minimises `tr(D H DT)`, `s = <A H W> / <A H A>` with `A` its values, rounded to a
        code and kept where it helps, of each row by itself."""
        self.sweep += 1
        A = read(self.values, self.states)[:, : self.shape[0]].T
        pulled = A @ hessian
        gain, curve = (pulled * weight).sum(1), (pulled * A).sum(1)
        best = gain / torch.where(curve > 0, curve, torch.inf)
        peaks = self.peaks[self.sequence]
        codes = scale_codes(best, peaks)
        nearer = (scale_values(codes, peaks) - best).abs() < (self.scales - best).abs()
        self._scale(torch.where(nearer & (best > 0), codes, self.codes))
        return A * self.scales[:, None]

    def pack(self) -> Packed:
        states = list(self.states.split([length // self.spec.vector for length in self.lengths], 1))
        table = None if self.table is None else self.table.clone()  # each matrix is stored with one of its own
        return PackedTrellis.from_states(self.spec, self.shape, states, self.codes, self.peaks, table)

    def _alike(self) -> list[tuple[int, int, int]]:
        """Runs of sequences of one length: that length, and where the run begins and ends in a column."""
        whole = sum(length == self.lengths[0] for length in self.lengths)
        runs, end = [(self.lengths[0], 0, whole * self.lengths[0])], sum(self.lengths)
        return runs if whole == len(self.lengths) else [*runs, (self.lengths[-1], end - self.lengths[-1], end)]
