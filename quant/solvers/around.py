"""Solving inside the specs that lie around codes: each changes the basis or the target, and hands on what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quant.kernels.spec import LowRank, Rotated, Smoothed, Spec
from quant.solvers.basis import solve_rotated
from quant.solvers.lowrank import solve_low_rank
from quant.solvers.smoothing import solve_smoothed
from quant.solvers.solution import Problem, Solution, Solver, check

ALONE: dict[type[Spec], Callable[[Solver, Problem, Any], Solution]] = {
    LowRank: solve_low_rank,
    Smoothed: solve_smoothed,
}


def solve_around(solver: Solver, problems: Sequence[Problem], spec: Spec) -> list[Solution] | None:
    """The solutions of a spec that lies around another one; None for codes alone. Raises `SolverError` for a weight or
    statistics that no solver can use."""
    for problem in problems:
        check(problem.weight, problem.statistics)
    if isinstance(spec, Rotated):
        return solve_rotated(solver, problems, spec)
    around = ALONE.get(type(spec))
    return None if around is None else [around(solver, problem, spec) for problem in problems]
