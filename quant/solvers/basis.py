"""Solving in a rotated basis: incoherence processing (QuIP#, arXiv 2402.04396, section 3).

With `W' = B W AT` and `H' = A H AT`, `A` and `B` orthonormal, `tr(D' H' D'T) = tr(D H DT)`: any solver can work in any
basis and the errors compare. A block Hadamard matrix with random signs makes the weights look Gaussian, which is what a
trellis code is made for, and spreads outliers over a block; on a small matrix it can also undo structure that the plain
basis would have kept. So each weight is solved in every basis that its spec allows and the best one stays.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.kernels.hadamard import block_for, random_signs
from quant.kernels.rotated import IDENTITY, PackedRotated, Rotation
from quant.kernels.spec import Rotated
from quant.solvers.solution import Solution, Solver, solution


def solve_rotated(solver: Solver, weight: Tensor, statistics: Statistics, spec: Rotated) -> Solution:
    """`solver`'s best solution for `weight` `[out, in]` over the bases that `spec` allows."""
    inputs, outputs = (rotation(n, spec.block, weight) for n in (weight.shape[1], weight.shape[0]))
    bases = [(inputs, IDENTITY)] if not spec.outputs else [(inputs, IDENTITY), (inputs, outputs)]
    if spec.measured:
        bases.insert(0, (IDENTITY, IDENTITY))
    found = [(_in_basis(solver, weight, statistics, spec, *basis), basis) for basis in bases]
    best, basis = min(found, key=lambda pair: pair[0].missed)  # the first of equal ones
    return solution(PackedRotated.around(spec, best.packed, *basis), weight, statistics, best.notes, best.noise)


def rotation(n: int, largest: int, like: Tensor) -> Rotation:
    """The rotation of a side of `n`; the same for all weights with that side, so that they can share its cost."""
    return Rotation(block_for(n, largest), random_signs(n, n).to(like.device))


def _in_basis(
    solver: Solver, weight: Tensor, statistics: Statistics, spec: Rotated, inputs: Rotation, outputs: Rotation
) -> Solution:
    turned = inputs.apply(weight.float())
    turned = outputs.apply(turned.T).T.contiguous() if outputs.signs is not None else turned
    return solver.solve(turned, rotate(statistics, inputs), spec.base)


def rotate(statistics: Statistics, inputs: Rotation) -> Statistics:
    """The statistics of `A x`; computed once for all weights that share them."""
    if inputs.signs is None:
        return statistics
    both = lambda m: inputs.apply(inputs.apply(m.double()).T).T.float()  # noqa: E731
    turned = lambda: replace(  # noqa: E731
        statistics,
        hessian=both(statistics.hessian),
        cross=None if statistics.cross is None else both(statistics.cross),
        sample=None if statistics.sample is None else inputs.apply(statistics.sample),
        peaks=None,
    )
    return statistics.cached(("rotated", inputs.block), turned)
