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

from collections.abc import Sequence
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
from quant.solvers.rounder import Rehearsal, refitted

WIDER = 1.07  # feedback adds to what a column holds; 1.0 to 1.15 tried on two models, flat from 1.05 to 1.1
HEADROOM = 2**0.25  # what `refit` may add to a sequence's largest scale


@cache
def start_table(bits: int) -> Tensor:
    """What `hyb` begins with, float16 `[2^bits, 2]`: k-means of Gaussian pairs, their first entry without its sign."""
    pairs = torch.randn((MOST, 2), generator=torch.Generator().manual_seed(0))
    pairs[:, 0].abs_()
    return kmeans(pairs, torch.ones_like(pairs), 1 << bits).half()


def counted(energy: Tensor) -> Tensor:
    """Of mean 1 in each sequence, `[n, T]`."""
    return energy / energy.mean(1, keepdim=True).clamp_min(1e-30)


class TrellisRounder:
    """States of a trellis code; see the module. Holds them column after column, matrix after matrix, rows padded as on
    disk."""

    granularity = 1

    def __init__(
        self, spec: Trellis, shape: tuple[int, int], device: torch.device, metrics: Sequence[Tensor | None] = (None,),
        tries: int = 0,
    ) -> None:  # fmt: skip
        """For matrices of `shape`, whose columns are rounded together: rows one after another. `metrics`, of each:
        how much errors in the rows count (`metric.py`), of a width of 1 or of as many as share bits, the same for all;
        `tries`: how often a path is looked for again for what they count together."""
        self.spec, self.shape, self.span, self.tries = spec, shape, shape[1], tries
        out, columns, self.count = *shape, len(metrics)
        count, known = self.count, [torch.ones((out, 1), device=device) if one is None else one for one in metrics]
        self.rows = torch.cat([own(metric) for metric in known])
        self.lengths = [padded for _, padded in spec.sequences(out)]
        within = torch.arange(out, device=device) // spec.length
        self.sequence = (torch.arange(count, device=device)[:, None] * len(self.lengths) + within).flatten()
        self.states = torch.zeros((columns, count, sum(self.lengths) // spec.vector), dtype=torch.int32, device=device)
        self.table = start_table(spec.table_bits).to(device) if spec.code == "hyb" else None
        self.values = state_values(spec, self.table).to(device)
        self.peaks = torch.zeros(count * len(self.lengths), dtype=torch.float16, device=device)
        self.rounded, self.sweep = set[int](), 0
        self.coupling = Coupling(known, spec.length) if tries and known[0].shape[1] > 1 else None

    def _scale(self, codes: Tensor) -> None:
        """Takes `codes` for the rows' scales, and what a search needs of these. `scales` float32 `[rows]`."""
        self.codes, self.scales = codes, scale_values(codes, self.peaks[self.sequence])
        self.inverse = torch.where(self.scales > 0, 1 / self.scales, 0.0)
        energy = self._padded(self.scales.square() * self.rows)
        together = None if self.coupling is None else self.coupling.together(self.scales)
        numbers = torch.arange(len(self.peaks), device=codes.device).view(self.count, -1)
        self.runs = list[tuple[int, slice, Tensor, Together | None]]()  # length, place, weights, and those of pairs
        for length, which, place in self._alike():
            pairs = None if together is None else together.of(numbers[:, which].flatten(), length)
            self.runs.append((length, place, counted(energy[:, place].reshape(-1, length)), pairs))

    def _padded(self, rows: Tensor) -> Tensor:
        """`[count, padded]`, as rows lie in sequences: only the last one has padding."""
        return pad(rows.view(self.count, -1), (0, sum(self.lengths) - self.shape[0]))

    def fit(self, start: int, weight: Tensor, importance: Tensor, rehearsal: Rehearsal | None = None) -> None:
        energy = (weight.float().square() @ importance[..., None])[..., 0]
        spread = (energy / importance.sum(-1, keepdim=True).clamp_min(1e-30)).sqrt().flatten()
        scales = spread * (WIDER / deviation(self.values))
        top = torch.zeros_like(self.peaks, dtype=torch.float32).scatter_reduce_(0, self.sequence, scales, "amax")
        self.peaks = storable(top * HEADROOM, torch.float16).half()
        self._scale(scale_codes(scales, self.peaks[self.sequence]))

    def round(self, columns: Tensor, values: Tensor) -> Tensor:
        column, target = int(columns), self._padded(values[:, 0] * self.inverse)
        states, again, V = self.states[column], column in self.rounded, self.spec.vector
        for length, place, weight, together in self.runs:
            part = slice(place.start // V, place.stop // V)
            x, now = target[:, place].reshape(-1, length), states[:, part].reshape(-1, length // V)
            found, arrays = now, (self.values, self.spec.step)
            if not again:
                found = search(x, weight, *arrays)
            if together is not None:
                found = together.settle(x, *arrays, found, 1 if again else self.tries, self.sweep)
            elif again:
                found = improve(x, weight, *arrays, now, now.shape[1] // 2 if self.sweep % 2 else 0)
            states[:, part] = found.view(self.count, -1)
        self.rounded.add(column)
        return (self._read(states).flatten() * self.scales)[:, None]

    def _read(self, states: Tensor) -> Tensor:
        """Values `[..., count, out]` of `states` `[..., count, steps]`."""
        return read(self.values, states)[..., : self.shape[0]]

    def refit(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """Each row's scale that minimises `tr(D H DT)`, `s = <A H W> / <A H A>` with `A` its values, rounded to a
        code and kept where it helps, of each row by itself. `weight` `[S, rows, in]`, `hessian` `[S, in, in]`."""
        self.sweep += 1
        A = self._read(self.states).reshape(self.shape[1], len(weight), -1).permute(1, 2, 0)
        pulled = A @ hessian
        gain, curve = (pulled * weight).sum(-1).flatten(), (pulled * A).sum(-1).flatten()
        best = gain / torch.where(curve > 0, curve, torch.inf)
        self._scale(refitted(self.codes, best, self.peaks[self.sequence]))
        return A * self.scales.view(len(weight), -1, 1)

    def pack(self, number: int = 0, order: Tensor | None = None) -> Packed:
        """Matrix `number`. `order` `[in]`: which of its columns were rounded as columns 0, 1, ..."""
        states = self.states[:, number]
        if order is not None:
            states = torch.empty_like(states).index_copy_(0, order.to(states.device), states)
        parts = list(states.split([length // self.spec.vector for length in self.lengths], 1))
        table = None if self.table is None else self.table.clone()  # each matrix is stored with one of its own
        codes, peaks = self.codes.view(self.count, -1)[number], self.peaks.view(self.count, -1)[number]
        return PackedTrellis.from_states(self.spec, self.shape, parts, codes.clone(), peaks.clone(), table)

    def _alike(self) -> list[tuple[int, slice, slice]]:
        """Runs of sequences of one length: that length, which they are in a matrix, and where in its column."""
        first, last, many = self.lengths[0], self.lengths[-1], len(self.lengths)
        whole, end = sum(length == first for length in self.lengths), sum(self.lengths)
        runs = [(first, slice(0, whole), slice(0, whole * first))]
        return runs if whole == many else [*runs, (last, slice(whole, many), slice(end - last, end))]
