"""Solving inside the specs that lie around codes: each changes the basis or the target, and hands on what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.kernels.spec import LowRank, Rotated, Smoothed, Spec
from quant.solvers.basis import solve_rotated
from quant.solvers.lowrank import solve_low_rank
from quant.solvers.smoothing import solve_smoothed
from quant.solvers.solution import Solution, Solver

AROUND: dict[type[Spec], Callable[[Solver, Tensor, Statistics, Any], Solution]] = {
    LowRank: solve_low_rank,
    Rotated: solve_rotated,
    Smoothed: solve_smoothed,
}


@dataclass(frozen=True)
class _Weighed:
    """A solver that is told how much errors in the rows count."""

    solver: Solver
    metric: Tensor

    def solve(self, weight: Tensor, statistics: Statistics, spec: Spec, metric: Tensor | None = None) -> Solution:
        return self.solver.solve(weight, statistics, spec, self.metric)


def solve_around(
    solver: Solver, weight: Tensor, statistics: Statistics, spec: Spec, metric: Tensor | None
) -> Solution | None:
    """The solution of a spec that lies around another one; None for codes alone. Rotated outputs mix rows: there all
    count the same."""
    around = AROUND.get(type(spec))
    if metric is not None and not (isinstance(spec, Rotated) and spec.outputs):
        solver = _Weighed(solver, metric)
    return None if around is None else around(solver, weight, statistics, spec)
