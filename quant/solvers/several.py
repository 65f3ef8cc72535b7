"""Several weights at once, and an error that names the one at fault."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant.errors import SolverError
from quant.kernels.packed import Packed
from quant.kernels.spec import Spec, Uniform
from quant.solvers.solution import Problem, Solution, Solver, solution


def solve_named(solver: Solver, names: Sequence[str], problems: Sequence[Problem], spec: Spec) -> list[Solution]:
    """`solver`'s solutions; uniform weights, which share their statistics then, as one weight of more rows. Raises
    `SolverError` with the name of the first that it cannot solve."""
    try:
        if len(problems) > 1 and isinstance(spec, Uniform):
            return _as_one(solver, problems, spec)
        return solver.solve_all(problems, spec)
    except SolverError as error:
        if len(problems) == 1:
            raise SolverError(f"{names[0]}: {error}") from None
        return [solve_named(solver, [name], [one], spec)[0] for name, one in zip(names, problems, strict=True)]


def _as_one(solver: Solver, problems: Sequence[Problem], spec: Uniform) -> list[Solution]:
    statistics, found, stop = problems[0].statistics, list[Solution](), 0
    assert all(one.statistics is statistics for one in problems)
    whole = solver.solve(torch.cat([one.weight for one in problems]), statistics, spec)
    for one in problems:
        start, stop = stop, stop + one.weight.shape[0]
        found.append(solution(row_range(whole.packed, start, stop), one.weight, statistics, whole.notes))
    return found


def row_range(packed: Packed, start: int, stop: int) -> Packed:
    """Some rows of a uniform weight, with tensors of their own."""
    parts = {name: tensor.unflatten(0, (packed.shape[0], -1)) for name, tensor in packed.tensors().items()}
    cut = {name: part[start:stop].flatten(0, 1).clone() for name, part in parts.items()}
    return type(packed).from_tensors(packed.spec, (stop - start, packed.shape[1]), cut)
