"""Round to nearest (RTN): the best grid per group, each weight to its nearest level. No weight knows of another.

With calibration statistics the grid's search is weighted by each input's mean square; with `Statistics.identity` it is
data-free. Then nothing says that the error is small where it counts, and one part of it always counts: the grid of
least squared error makes weights smaller, at 2 bits by an eighth, `<Q, W> = |Q|^2 < |W|^2`, and all layers' outputs
with them. So the scale of each group is enlarged to `<Q, W> = |W|^2`, codes as they are. Measured at 2 bits: the images
of `demo/dit` come 5 dB nearer, the language model of `demo/` has a KL of 0.841 for 0.844, ts-llama-small a perplexity
of 18.8 for 20.8 (groups of 128), but stories260K-i192 one of 744 for 315, far from usable both (groups of 64). At 3 and
4 bits it matters little, and at 1 bit, where it stays as it was, it costs 3 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.errors import SolverError
from quant.kernels.layouts import PackedUniform
from quant.kernels.spec import DTYPES, Spec, Uniform
from quant.solvers.around import solve_around
from quant.solvers.grid import SEARCH, Search, encode, fit, storable
from quant.solvers.rounding import of_rounded
from quant.solvers.solution import Problem, Solution, Solver, solution


@dataclass(frozen=True)
class Nearest(Solver):
    """`search`: how to look for the grid of least weighted error; `grid.MINMAX` spans the extremes (plain RTN)."""

    search: Search = SEARCH

    def solve_all(self, problems: Sequence[Problem], spec: Spec) -> list[Solution]:
        around = solve_around(self, problems, spec)
        return [self._solve(one.weight, one.statistics, spec) for one in problems] if around is None else around

    def _solve(self, weight: Tensor, statistics: Statistics, spec: Spec) -> Solution:
        if not isinstance(spec, Uniform):
            raise SolverError(f"round to nearest knows uniform grids; {type(spec).__name__} came")
        scales, zeros = fit(weight, of_rounded(statistics, spec).diagonal, spec, self.search)
        packed = pack_nearest(weight, scales, zeros, spec)
        if not statistics.tokens and self.search.steps > 1 and spec.bits > 1:
            packed = unshrunk(packed, weight)
        return solution(packed, weight, statistics)


def unshrunk(packed: PackedUniform, weight: Tensor) -> PackedUniform:
    """The same codes, with the scale of each group such that `<Q, W> = |W|^2`."""
    spec, (rows, columns) = packed.spec, packed.shape
    group = torch.arange(columns, device=weight.device) // spec.group_width(columns)
    sums = lambda x: x.new_zeros((rows, spec.groups(columns))).index_add_(1, group, x)  # noqa: E731
    W = weight.float()
    along, whole = sums(packed.dequantize() * W), sums(W * W)
    gain = torch.where(along > 0, whole / torch.where(along > 0, along, 1.0), 1.0)
    gain = torch.where(gain.isfinite(), gain, 1.0)  # squares may leave float32
    scales = storable(packed.scales.float() * gain, DTYPES[spec.scale_dtype])
    return replace(packed, scales=scales.to(packed.scales.dtype))


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
