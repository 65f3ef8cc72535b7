"""Smoothing: inputs multiplied by factors of their own, the weight's columns divided by them, before it is solved.

SmoothQuant (arXiv 2211.10438) brings the channels of inputs to be rounded near to each other; ViDiT-Q (arXiv
2406.02540, section 3.3) does it for diffusion transformers, with the largest inputs of each range of timesteps;
SVDQuant (arXiv 2411.05007, section 4.1) before a low-rank branch, which takes up what became large in the weight. The
factors are

    m_j = max |W_j|^b / max |X_j|^a,   (a, b) = (k / points, 0) or (k / points, 1 - k / points),   k = 1 ... points

(SVDQuant's grid) of geometric mean 1, with `max |X_j|` the mean over the ranges of timesteps. All are tried with
everything that lies inside, branch and rotation and rounded inputs included, on codes rounded to nearest (on searched
grids: those that span the extremes rank factors worse); the best of them and the plain basis are then solved in
earnest, and the better one stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.errors import SolverError
from quant.kernels.smoothed import PackedSmoothed
from quant.kernels.spec import Smoothed, Uniform
from quant.solvers.solution import Problem, Solution, Solver, solution

WIDEST = 2.0**10
"""Factors lie between its inverse and it: no weight or input leaves float16 by them."""
LEAST = 1e-4
"""Of the largest channel: what counts as the largest value of a channel that is nearly dead."""


def solve_smoothed(solver: Solver, problem: Problem, spec: Smoothed) -> Solution:
    """`solver`'s solution for `problem` under the best factors."""
    if problem.statistics.peaks is None:
        raise SolverError("smoothing looks at the inputs, and none were seen; calibrate, or take the spec's base alone")
    from quant.solvers.nearest import Nearest  # it needs this module

    rough: Solver = Nearest() if isinstance(spec.core, Uniform) else solver
    tried = factors(problem.weight.float(), problem.statistics.peaks.mean(0), spec.points)
    best = min(tried, key=lambda m: _solve(rough, problem, spec, m).missed)  # the first of equal ones
    plain = torch.ones_like(best)
    found = [_solve(solver, problem, spec, m) for m in (plain, best)]
    return min(found, key=lambda one: one.missed)


def factors(weight: Tensor, peaks: Tensor, points: int) -> list[Tensor]:
    """The candidates `m` float16 `[in]` for `weight` `[out, in]` and largest inputs `peaks` `[in]`."""
    X, W = (part.clamp_min(LEAST * float(part.max())).clamp_min(1e-30).log() for part in (peaks, weight.abs().amax(0)))
    found: list[Tensor] = []
    for k in range(1, points + 1):
        a = k / points
        for b in (0.0, 1 - a) if k < points else (0.0,):
            m = b * W - a * X
            found.append((m - m.mean()).exp().clamp(1 / WIDEST, WIDEST).half())
    return found


def _solve(solver: Solver, problem: Problem, spec: Smoothed, m: Tensor) -> Solution:
    weight, statistics = problem.weight, problem.statistics
    base = solver.solve(weight.float() / m.float(), smoothed(statistics, m.float()), spec.base, problem.metric)
    packed = PackedSmoothed(spec, (weight.shape[0], weight.shape[1]), base.packed, m)
    return solution(packed, weight, statistics, base.notes, base.noise)


def smoothed(statistics: Statistics, m: Tensor) -> Statistics:
    """The statistics of `m x`."""
    both = m[:, None] * m
    return statistics.mapped(lambda moment: moment * both, lambda tokens: tokens * m)
