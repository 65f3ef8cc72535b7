"""Error feedback: GPTQ (arXiv 2210.17323) and LDLQ (arXiv 2307.13304) as one loop, for any rounder.

Columns are rounded one after another; what a column lost is made up for by the columns still to come, as far as the
inputs are correlated. With `(H + damping)^-1 = UT U`, `U` upper triangular, and `V = U / diag(U)`:

    Q_i = round(W_i),   W_j -= (W_i - Q_i) V_ij   for j > i.

Updates beyond the current block of columns wait and become one matrix product. A rounder that takes `k` columns at a
time gets them together, and its error is propagated through the inverse of `V`'s `k x k` diagonal block.

The order matters: columns with large inputs should go early, while there are many left to correct them. `gar`
(group-aware reordering) sorts the groups, and the columns inside each, by `H_ii`, so that nothing of the order has to
be stored; `act` sorts all columns and so needs the grids fixed beforehand (static groups); `none` keeps the order.

A dead column (`H_ii = 0`: its input was always 0) has no correlations either, so damping alone makes it independent: it
is rounded to nearest, which is what is wanted if it ever wakes.

Feedback never looks back, so a few sweeps of coordinate descent and closed-form scales follow (see `descent`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.errors import SettingsError
from quant.kernels.spec import Spec, Uniform
from quant.solvers.around import solve_around
from quant.solvers.descent import descend
from quant.solvers.factor import Factor, factorise
from quant.solvers.grid import SEARCH, Search
from quant.solvers.metric import own
from quant.solvers.nearest import Nearest
from quant.solvers.rounder import Rehearsal, Rounder, in_one_kernel, rounder_for
from quant.solvers.rounding import of_rounded
from quant.solvers.solution import Solution, check, solution

REHEARSED = 256  # columns; see `_fit_group`


@dataclass(frozen=True)
class Feedback:
    """GPTQ. With `statistics.cross` it aims at the float path's outputs instead of the layer's own.

    `damp`: added to the Hessian's diagonal, as a share of its mean; ten times more on each of 3 retries if the matrix
    is not positive definite (a note says so), and then round to nearest (a note says so). `block`: columns updated at
    once. `order`: see the module. `static_groups`: grids from the original weight instead of the updated one. `sweeps`:
    rounds of descent on the codes and then the scales; 0 is feedback alone. `tries`: searches of each column for
    what errors of its rows count together, and one in each sweep; 0: each row by itself.
    """

    damp: float = 0.01
    block: int = 128
    order: Literal["gar", "act", "none"] = "gar"
    static_groups: bool = False
    sweeps: int = 2
    tries: int = 4
    search: Search = SEARCH

    def __post_init__(self) -> None:
        if not 0 <= self.damp < math.inf or self.block < 1 or min(self.sweeps, self.tries) < 0:
            raise SettingsError(
                f"damp is {self.damp}, block {self.block}, sweeps {self.sweeps}, tries {self.tries}; "
                "damp is finite and at least 0, block at least 1, sweeps and tries at least 0"
            )

    def solve(self, weight: Tensor, statistics: Statistics, spec: Spec, metric: Tensor | None = None) -> Solution:
        check(weight, statistics)
        around = solve_around(self, weight, statistics, spec, metric)
        if around is not None:
            return around
        if metric is not None and not self.tries:
            metric = own(metric)[:, None]
        rounder = rounder_for(spec, (weight.shape[0], weight.shape[1]), weight.device, self.search, metric, self.tries)
        factor = factorise(of_rounded(statistics, spec), self.order, self.damp, rounder.span, rounder.granularity)
        if isinstance(factor, str):
            return self._without_feedback(weight, statistics, spec, metric, f"{factor}; rounded to nearest")
        target = weight.float() if factor.match is None else weight.float() @ factor.match
        static = self.static_groups or self.order == "act"
        quantized = feed(target, factor, rounder, factor.hessian.diagonal(), self.block, static)
        if rounder.granularity == 1 and not factor.diagonal:
            for _ in range(self.sweeps):
                quantized = descend(target, quantized, factor.hessian, factor.order, rounder, self.block)
                quantized = rounder.refit(target, factor.hessian)
        return solution(rounder.pack(), weight, statistics, factor.notes, metric=metric)

    def _without_feedback(
        self, weight: Tensor, statistics: Statistics, spec: Spec, metric: Tensor | None, note: str
    ) -> Solution:
        """A grid by `Nearest`; of other codes what is nearest where all inputs count alike."""
        if isinstance(spec, Uniform):
            return replace(Nearest(search=self.search).solve(weight, statistics, spec), notes=(note,))
        alike = Statistics.identity(statistics.features, weight.device)
        nearest = replace(self, sweeps=0).solve(weight, alike, spec, metric)
        return solution(nearest.packed, weight, statistics, (note,), metric=metric)


def feed(weight: Tensor, factor: Factor, rounder: Rounder, importance: Tensor, block: int, static: bool) -> Tensor:
    """Rounds the columns of `weight` `[out, in]` in the factor's order; returns the representable matrix `[out, in]`.

    Works in `weight`'s dtype. `importance` `[in]`: weighs the columns when a grid is fitted. `static`: fit all of it at
    once, beforehand.
    """
    order, V, size = factor.order, factor.feedback.to(weight.dtype), rounder.granularity
    index = order.to(weight.device)
    work = weight.T[index].contiguous()  # [in, out]: a column is contiguous
    quantized = torch.empty_like(work)
    if static:
        rounder.fit(0, weight, importance)
    fresh = set[int]() if static else set(group_starts(order, rounder.span))
    kernel = in_one_kernel(rounder, work)
    for start, stop in blocks(order, rounder.span, max(size, block - block % size), static):
        errors = torch.empty_like(work[start:stop])
        for i, end in _pieces(start, stop, block if kernel else size, fresh):
            if i in fresh:
                _fit_group(work, i, factor, rounder, importance)
            part = (order[i:end], work[i:end], V[i:end, i:end])
            rounded, error = kernel.round_in_turn(*part) if kernel else _round(rounder, *part)
            quantized[i:end], errors[i - start : end - start] = rounded, error
            work[end:stop].addmm_(V[i:end, end:stop].T, error, alpha=-1)
        work[stop:].addmm_(V[start:stop, stop:].T, errors, alpha=-1)
    return torch.empty_like(weight).index_copy_(1, index, quantized.T)


def _pieces(start: int, stop: int, size: int, fresh: Collection[int]) -> Iterator[tuple[int, int]]:
    """Ranges of at most `size` positions from `start` to `stop`; a group begins where a range begins."""
    cuts = (i for i in range(start + 1, stop) if i in fresh or (i - start) % size == 0)
    return pairwise((start, *cuts, stop))


def _round(rounder: Rounder, columns: Tensor, values: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The columns `values` `[k, out]` rounded together, and the error to propagate."""
    rounded = rounder.round(columns, values.T).T
    error = values - rounded
    if len(columns) > 1:
        error = torch.linalg.solve_triangular(V.T, error, upper=False, unitriangular=True)
    return rounded, error


def group_starts(order: Tensor, span: int) -> list[int]:
    """Positions in `order` where a group of `span` columns begins."""
    groups = order // span
    return [0, *((groups[1:] != groups[:-1]).nonzero().flatten() + 1).tolist()]


def blocks(order: Tensor, span: int, size: int, static: bool) -> list[tuple[int, int]]:
    """Ranges of about `size` positions. Unless `static`, a group lies inside one block or starts at a block's start: no
    update to its columns is pending when its grid is fitted.
    """
    total = len(order)
    if static:
        return [(start, min(start + size, total)) for start in range(0, total, size)]
    starts = group_starts(order, span)
    ranges, begin = list[tuple[int, int]](), 0
    for start, stop in zip(starts, [*starts[1:], total], strict=True):
        if stop - begin > size and start > begin:
            ranges.append((begin, start))
            begin = start
        while stop - begin > size:
            ranges.append((begin, begin + size))
            begin += size
    return [*ranges, (begin, total)]


def _fit_group(work: Tensor, i: int, factor: Factor, rounder: Rounder, importance: Tensor) -> None:
    """Fits the group that starts at position `i` to `work` `[in, out]`, with a rehearsal unless it is wide: a rehearsal
    costs as much per weight as the group is wide."""
    first = int(factor.order[i]) // rounder.span * rounder.span
    last = min(first + rounder.span, len(factor.order))
    end, rehearsal = i + last - first, None
    columns = (factor.order[i:end] - first).to(work.device)
    if last - first <= REHEARSED and rounder.granularity == 1 and not factor.diagonal:
        rehearsal = Rehearsal(columns, factor.feedback[i:end, i:end].to(work.dtype), factor.variance[i:end])
    rounder.fit(first, work[i + columns.argsort()].T, importance[first:last], rehearsal)
