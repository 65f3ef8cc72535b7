"""The search of trellis codes for what errors of several rows cost together (`metric.py`).

A search (`kernels/viterbi.py`) weighs each value by itself. With a target moved by what the errors of all others in
the sequence ask for, to `x - D^-1 (B - D) e` with `D` the diagonal of `B`, it is a step of Jacobi's method for the
path of least `eT B e`. A whole step overshoots, as codes answer late and then by much: a part of it is tried, and less
where that did not help. What costs more than before is not taken, so a path only ever gets better.

YAQA (arXiv 2505.22988) feeds errors back from row to row instead. Along a sequence that would have to go on inside
the search: a path for every past. In blocks of 8 and 16 rows, each searched with the errors of those before it and 16
rows more to look ahead, it lowered what errors cost by no more than four of these steps do, in more time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.kernels.trellis import read
from quant.kernels.viterbi import improve
from quant.solvers.metric import cut, own

REACH, SHORTER = 1.5, 0.7  # Jacobi's method converges below 2. 1 to 2 and 0.5 to 0.9 tried on two models


class Coupling:
    """Of the sequences of `length` rows of matrices, each with its metric `[out, width]`. `step` float32
    `[sequences, 1]`: how much of a step is tried first."""

    def __init__(self, metrics: Sequence[Tensor], length: int) -> None:
        self.rows, self.length = torch.stack([own(metric) for metric in metrics]), length
        self.spare = -self.rows.shape[1] % length
        self.blocks = torch.cat([cut(metric, length) for metric in metrics])
        energy = self.blocks.diagonal(dim1=1, dim2=2).double()
        inverse = torch.where(energy > 0, energy.rsqrt(), 0.0)
        largest = torch.linalg.eigvalsh(self.blocks * inverse[:, :, None] * inverse[:, None])[:, -1:]
        self.step = (REACH / largest.clamp_min(1.0)).float()

    def together(self, scales: Tensor) -> Together:
        """How unscaled values count in rows with `scales` `[rows]`, of mean 1 on each sequence's diagonal."""
        beside, rows = (pad(one.view_as(self.rows), (0, self.spare)) for one in (scales, self.rows))
        mean = (beside.square() * rows).view(-1, self.length).mean(1).clamp_min(1e-30)
        beside = beside.view(-1, self.length)
        return Together(self.blocks * (beside[:, :, None] * beside[:, None] / mean[:, None, None]), self.step)


class Together:
    """`B` float32 `[n, T, T]` of `n` sequences, or of one that has many columns at once. `step`: see `Coupling`."""

    def __init__(self, B: Tensor, step: Tensor) -> None:
        self.B, self.step = B, step

    @cached_property
    def weight(self) -> Tensor:
        """`B`'s diagonal `[n, T]`."""
        return self.B.diagonal(dim1=1, dim2=2).contiguous()

    @cached_property
    def inverse(self) -> Tensor:
        return torch.where(self.weight > 0, 1 / self.weight, 0.0)

    def of(self, numbers: Tensor | slice, length: int) -> Together:
        """The sequences `numbers` `[k]`, of another length: the last one's rows of a matrix, or with padding."""
        spare = length - self.B.shape[-1]
        return Together(pad(self.B[numbers], (0, spare, 0, spare)), self.step[numbers])

    def cost(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """`B e` and `eT B e` `[n, 1]` of errors `[n, T]`."""
        pull = error @ self.B[0] if len(self.B) == 1 else (error[:, None] @ self.B)[:, 0]  # B is symmetric
        return pull, (pull * error).sum(1, keepdim=True)

    def nearer(self, x: Tensor, values: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """Of two paths for each sequence the one that costs less, `one` where both cost the same."""
        costs = [self.cost(read(values, states) - x)[1] for states in (one, other)]
        return torch.where(costs[1] < costs[0], other, one)

    def settle(self, x: Tensor, values: Tensor, bits: int, states: Tensor, tries: int, sweep: int) -> Tensor:
        """Paths at least as near as `states` `[n, steps]` to `x` `[n, T]` by `B`. `tries`: how often one is looked for;
        `sweep`: which of two places the seam is kept at."""
        weight, share = self.weight.expand(len(x), -1), self.step.expand(len(x), -1)
        error = read(values, states) - x
        pull, least = self.cost(error)
        for number in range(tries):
            seam = states.shape[1] // 2 if (sweep + number) % 2 else 0
            asked = torch.addcmul(error, pull, self.inverse, value=-1)
            found = improve(torch.addcmul(x, share, asked), weight, values, bits, states, seam)
            off = read(values, found) - x
            drawn, now = self.cost(off)
            better = now < least
            states = torch.where(better, found, states)
            if number + 1 < tries:
                least = torch.minimum(least, now)
                error, pull = torch.where(better, off, error), torch.where(better, drawn, pull)
                share = torch.where(better, share, share * SHORTER)
        return states
