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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.errors import SettingsError
from quant.kernels.spec import Spec, Trellis, Uniform
from quant.solvers.around import solve_around
from quant.solvers.descent import descend
from quant.solvers.factor import Factor, factorise
from quant.solvers.grid import SEARCH, Search
from quant.solvers.lockstep import laid, put_back, stacked, stacks
from quant.solvers.metric import own
from quant.solvers.nearest import Nearest
from quant.solvers.rounder import Rehearsal, Rounder, in_one_kernel, rounder_for
from quant.solvers.rounding import of_rounded
from quant.solvers.solution import Problem, Solution, Solver, solution
from quant.solvers.trellis import TrellisRounder

REHEARSED = 256  # columns; see `_fit_group`


@dataclass(frozen=True)
class Feedback(Solver):
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

    def solve_all(self, problems: Sequence[Problem], spec: Spec) -> list[Solution]:
        around = solve_around(self, problems, spec)
        if around is not None:
            return around
        if not self.tries:
            alone = [p.metric if p.metric is None else own(p.metric)[:, None] for p in problems]
            problems = [replace(p, metric=metric) for p, metric in zip(problems, alone, strict=True)]
        if isinstance(spec, Trellis):
            return self._solve_trellises(problems, spec)
        return [self._solve(problem, spec) for problem in problems]

    def _solve(self, problem: Problem, spec: Spec) -> Solution:
        weight, statistics = problem.weight, problem.statistics
        rounder = rounder_for(spec, (weight.shape[0], weight.shape[1]), weight.device, self.search)
        factor = factorise(of_rounded(statistics, spec), self.order, self.damp, rounder.span, rounder.granularity)
        if isinstance(factor, str):
            return self._without_feedback(problem, spec, f"{factor}; rounded to nearest")
        target = weight.float() if factor.match is None else weight.float() @ factor.match
        self._round(target, factor, rounder, self.static_groups or self.order == "act")
        return solution(rounder.pack(), weight, statistics, factor.notes, metric=problem.metric)

    def _solve_trellises(self, problems: Sequence[Problem], spec: Trellis) -> list[Solution]:
        """In lockstep (`lockstep.py`)."""
        found, known = dict[int, Solution](), dict[int, Factor]()
        for number, problem in enumerate(problems):
            factor = factorise(problem.statistics, self.order, self.damp, problem.statistics.features, 1)
            if isinstance(factor, str):
                found[number] = self._without_feedback(problem, spec, f"{factor}; rounded to nearest")
            else:
                known[number] = factor
        for sets in stacks(problems, known):
            numbers = [number for one in sets for number in one]
            weights = [problems[number].weight for number in numbers]
            metrics = [problems[number].metric for number in numbers]
            target, factor = stacked(weights, [known[one[0]] for one in sets])
            shape = (weights[0].shape[0], weights[0].shape[1])
            rounder = TrellisRounder(spec, shape, target.device, metrics, self.tries)
            self._round(target, factor, rounder, static=True)
            for place, number in enumerate(numbers):
                one, own_factor = problems[number], known[number]
                packed = rounder.pack(place, own_factor.order)
                found[number] = solution(packed, one.weight, one.statistics, own_factor.notes, metric=one.metric)
        return [found[number] for number in range(len(problems))]

    def _round(self, target: Tensor, factor: Factor, rounder: Rounder, static: bool) -> None:
        quantized = feed(target, factor, rounder, factor.hessian.diagonal(dim1=-2, dim2=-1), self.block, static)
        if rounder.granularity == 1 and not factor.diagonal:
            for _ in range(self.sweeps):
                quantized = descend(target, quantized, factor.hessian, factor.order, rounder, self.block)
                quantized = rounder.refit(target, factor.hessian)

    def _without_feedback(self, problem: Problem, spec: Spec, note: str) -> Solution:
        """A grid by `Nearest`; of other codes what is nearest where all inputs count alike."""
        weight, statistics, metric = problem.weight, problem.statistics, problem.metric
        if isinstance(spec, Uniform):
            return replace(Nearest(search=self.search).solve(weight, statistics, spec), notes=(note,))
        alike = Statistics.identity(statistics.features, weight.device)
        nearest = replace(self, sweeps=0).solve(weight, alike, spec, metric)
        return solution(nearest.packed, weight, statistics, (note,), metric=metric)


def feed(weight: Tensor, factor: Factor, rounder: Rounder, importance: Tensor, block: int, static: bool) -> Tensor:
    """Rounds the columns of `weight` `[out, in]`, or of a stack `[S, rows, in]` (`lockstep.py`), in the factor's order;
    returns the representable matrix or matrices.

    Works in `weight`'s dtype. `importance` `[in]`: weighs the columns when a grid is fitted. `static`: fit all of it at
    once, beforehand; always so for a stack.
    """
    order, V, size = factor.order, factor.feedback.to(weight.dtype), rounder.granularity
    work = laid(weight, order)  # [..., in, out]: a column is contiguous
    quantized = torch.empty_like(work)
    if static:
        rounder.fit(0, weight, importance)
    fresh = set[int]() if static else set(group_starts(order, rounder.span))
    kernel = in_one_kernel(rounder, work)
    for start, stop in blocks(order, rounder.span, max(size, block - block % size), static):
        errors = torch.empty_like(work[..., start:stop, :])
        for i, end in _pieces(start, stop, block if kernel else size, fresh):
            if i in fresh:
                _fit_group(work, i, factor, rounder, importance)
            part = (order[i:end], work[..., i:end, :], V[..., i:end, i:end])
            rounded, error = kernel.round_in_turn(*part) if kernel else _round(rounder, *part)
            quantized[..., i:end, :], errors[..., i - start : end - start, :] = rounded, error
            _make_up(work[..., end:stop, :], V[..., i:end, end:stop], error)
        _make_up(work[..., stop:, :], V[..., start:stop, stop:], errors)
    return put_back(quantized, order)


def _make_up(work: Tensor, V: Tensor, error: Tensor) -> None:
    """`work -= VT error`, for columns to come, of one weight or a stack."""
    if work.ndim == 2:
        work.addmm_(V.T, error, alpha=-1)
    elif len(V[0]) == 1:
        work.addcmul_(V.mT, error, value=-1)
    else:
        work.baddbmm_(V.mT, error, alpha=-1)


def _pieces(start: int, stop: int, size: int, fresh: Collection[int]) -> Iterator[tuple[int, int]]:
    """Ranges of at most `size` positions from `start` to `stop`; a group begins where a range begins."""
    cuts = (i for i in range(start + 1, stop) if i in fresh or (i - start) % size == 0)
    return pairwise((start, *cuts, stop))


def _round(rounder: Rounder, columns: Tensor, values: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The columns `values` `[..., k, out]` rounded together, and the error to propagate."""
    turned = values.mT
    rounded = rounder.round(columns, turned.reshape(-1, len(columns))).view(turned.shape).mT
    error = values - rounded
    if len(columns) > 1:
        error = torch.linalg.solve_triangular(V.mT, error, upper=False, unitriangular=True)
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
