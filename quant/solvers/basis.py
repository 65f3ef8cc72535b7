"""Solving in a rotated basis: incoherence processing (QuIP#, arXiv 2402.04396, section 3).

With `W' = B W AT` and `H' = A H AT`, `A` and `B` orthonormal, `tr(D' H' D'T) = tr(D H DT)`: any solver can work in any
basis and the errors compare. A block Hadamard matrix with random signs makes the weights look Gaussian, which is what a
trellis code is made for, and spreads outliers over a block; on a small matrix it can also undo structure that the plain
basis would have kept. So each weight is solved in every basis that its spec allows and the best one stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.kernels.hadamard import block_for, random_signs
from quant.kernels.rotated import IDENTITY, PackedRotated, Rotation
from quant.kernels.spec import Rotated
from quant.solvers.solution import Problem, Solution, Solver, solution


def solve_rotated(solver: Solver, problems: Sequence[Problem], spec: Rotated) -> list[Solution]:
    """`solver`'s best solution for each problem over the bases that `spec` allows, which are solved together."""
    tried = [(problem, basis) for problem in problems for basis in _bases(problem.weight, spec)]
    solved = solver.solve_all([_in_basis(problem, spec, *basis) for problem, basis in tried], spec.base)
    found = dict[int, tuple[Solution, tuple[Rotation, Rotation]]]()
    for one, (problem, basis) in zip(solved, tried, strict=True):
        best = found.get(id(problem))
        if best is None or one.missed < best[0].missed:  # the first of equal ones
            found[id(problem)] = one, basis
    del solved  # with the dequantized weights of what was not chosen
    chosen = [(problem, *found[id(problem)]) for problem in problems]
    around = lambda one, basis: PackedRotated.around(spec, one.packed, *basis)  # noqa: E731
    return [solution(around(one, basis), p.weight, p.statistics, one.notes, one.noise) for p, one, basis in chosen]


def _bases(weight: Tensor, spec: Rotated) -> list[tuple[Rotation, Rotation]]:
    inputs, outputs = (rotation(n, spec.block, weight) for n in (weight.shape[1], weight.shape[0]))
    plain = [(IDENTITY, IDENTITY)] if spec.measured else []
    return [*plain, (inputs, IDENTITY), *([(inputs, outputs)] if spec.outputs else [])]


def rotation(n: int, largest: int, like: Tensor) -> Rotation:
    """The rotation of a side of `n`; the same for all weights with that side, so that they can share its cost."""
    return Rotation(block_for(n, largest), random_signs(n, n).to(like.device))


def _in_basis(problem: Problem, spec: Rotated, inputs: Rotation, outputs: Rotation) -> Problem:
    """Rotated outputs mix rows: where they are allowed, all rows count the same."""
    turned = inputs.apply(problem.weight.float())
    turned = outputs.apply(turned.T).T.contiguous() if outputs.signs is not None else turned
    return Problem(turned, rotate(problem.statistics, inputs), None if spec.outputs else problem.metric)


def rotate(statistics: Statistics, inputs: Rotation) -> Statistics:
    """The statistics of `A x`; computed once for all weights that share them."""
    if inputs.signs is None:
        return statistics
    both = lambda m: inputs.apply(inputs.apply(m.double()).T).T.float()  # noqa: E731
    return statistics.cached(("rotated", inputs.block), lambda: statistics.mapped(both, inputs.apply))
