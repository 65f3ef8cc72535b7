"""Round to nearest (RTN): the best grid per group, each weight to its nearest level. No weight knows of another.

With calibration statistics the grid's search is weighted by each input's mean square; with `Statistics.identity` it is
data-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.errors import SolverError
from quant.kernels.layouts import PackedUniform
from quant.kernels.spec import DTYPES, Spec, Uniform
from quant.solvers.around import solve_around
from quant.solvers.grid import SEARCH, Search, encode, fit
from quant.solvers.rounding import of_rounded
from quant.solvers.solution import Solution, check, solution


@dataclass(frozen=True)
class Nearest:
    """`search`: how to look for the grid of least weighted error; `grid.MINMAX` spans the extremes (plain RTN)."""

    search: Search = SEARCH

    def solve(self, weight: Tensor, statistics: Statistics, spec: Spec) -> Solution:
        check(weight, statistics)
        around = solve_around(self, weight, statistics, spec)
        if around is not None:
            return around
        if not isinstance(spec, Uniform):
            raise SolverError(f"round to nearest knows uniform grids; {type(spec).__name__} came")
        scales, zeros = fit(weight, of_rounded(statistics, spec).diagonal, spec, self.search)
        return solution(pack_nearest(weight, scales, zeros, spec), weight, statistics)


def pack_nearest(weight: Tensor, scales: Tensor, zeros: Tensor, spec: Uniform) -> PackedUniform:
    """`weight` `[out, in]` on the grids `scales`, `zeros` float32 `[out, G]`."""
    rows, columns = weight.shape
    width = spec.group_width(columns)
    codes = weight.new_empty((rows, columns), dtype=scales.dtype)
    for group, start in enumerate(range(0, columns, width)):
        part = slice(start, start + width)
        codes[:, part] = encode(weight[:, part].float(), scales[:, group, None], zeros[:, group, None], spec.bits)
    stored = None if spec.symmetric else zeros.byte()
    return PackedUniform.from_codes(spec, (rows, columns), codes.byte(), scales.to(DTYPES[spec.scale_dtype]), stored)
