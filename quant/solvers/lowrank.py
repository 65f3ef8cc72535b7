"""A low-rank branch beside a quantized weight: EoRA (arXiv 2410.21271), and LoRC (arXiv 2303.08302) as its plain case.

The base solver leaves `E = W - Q`. The branch of rank `r` that loses least, `min tr((E - B A) H (E - B A)T)`, is the
singular value decomposition of `E S`, with `S ST = H`, cut to `r` components and carried back through `S^-1`, which
EoRA has to guard where `H` is singular. It need not be formed: with `U` the leading left singular vectors of `E S`,
`B A = U UT E` is the same matrix. They come from the smaller of the two Gram matrices, in float64. With `H` the
identity this is LoRC.

The base may then be solved again for `W - B A`, and the branch again for what that leaves. The branch takes its inputs
as they are, also where the base rounds its own (SVDQuant, arXiv 2411.05007).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.errors import SolverError
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.spec import DTYPES, LowRank
from quant.solvers.anchor import solve_anchored
from quant.solvers.factor import factorise
from quant.solvers.solution import Problem, Solution, Solver, relative_error, solution

DAMP = 0.01  # of the matching of the float path, as a share of the Hessian's mean diagonal


def solve_low_rank(solver: Solver, problem: Problem, spec: LowRank) -> Solution:
    """`solver`'s solution for `problem` with the best branch beside it."""
    if spec.anchor:
        return solve_anchored(solver, problem, spec)
    weight, statistics = problem.weight, problem.statistics
    target, own = _aim(weight.float(), statistics)
    found: list[tuple[float, PackedLowRank, Solution]] = []
    aim = target
    for _ in range(spec.rounds + 1):
        base = solver.solve(aim, own, spec.base, problem.metric)
        lora_a, lora_b = factors(target - base.weight, own if spec.weighted else None, spec)
        packed = PackedLowRank(spec, (weight.shape[0], weight.shape[1]), base.packed, lora_a, lora_b)
        found.append((relative_error(target, packed.dequantize(), own.hessian, base.noise), packed, base))
        aim = target - lora_b.float() @ lora_a.float()
    _, packed, base = min(found, key=lambda one: one[0])  # the first of equal ones
    return solution(packed, weight, statistics, base.notes, base.noise)


def factors(lost: Tensor, statistics: Statistics | None, spec: LowRank) -> tuple[Tensor, Tensor]:
    """`A` `[r, in]` and `B` `[out, r]` in the spec's dtype: the best branch for `lost` `[out, in]`; without statistics
    the nearest one. Both factors of a component have one norm, so that neither leaves the dtype's range first."""
    E = lost.double()
    U = _leading(E if statistics is None else E @ root(statistics), spec.width((E.shape[0], E.shape[1])))
    A = U.T @ E
    even = A.norm(dim=1).sqrt()
    even = torch.where(even > 0, even, 1.0)
    dtype = DTYPES[spec.factor_dtype]
    lora_a, lora_b = (A / even[:, None]).to(dtype), (U * even).to(dtype)
    if not bool(torch.isfinite(lora_a).all() and torch.isfinite(lora_b).all()):
        raise SolverError(f"the low-rank branch leaves the range of {spec.factor_dtype}; set factor_dtype to bfloat16")
    return lora_a.contiguous(), lora_b.contiguous()


def root(statistics: Statistics) -> Tensor:
    """`S` `[in, in]` float64 with `S ST = H`; computed once for all weights that share the statistics."""

    def compute() -> Tensor:
        values, vectors = torch.linalg.eigh(statistics.hessian.double())
        return vectors * values.clamp_min(0).sqrt()

    return statistics.cached("root", compute)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors `[out, rank]` of a matrix `[out, in]`, the largest first."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.linalg.eigh(matrix @ matrix.T)[1][:, rows - rank :].flip(1)
    right = torch.linalg.eigh(matrix.T @ matrix)[1][:, columns - rank :].flip(1)
    return torch.linalg.qr(matrix @ right)[0]  # orthogonal but for rounding, and where singular values are zero


def _aim(weight: Tensor, statistics: Statistics) -> tuple[Tensor, Statistics]:
    """The weight whose own outputs are wanted, and statistics without the float path: both parts of the sum aim at
    `W C H^-1`, not the base alone."""
    if statistics.cross is None:
        return weight, statistics
    factor = factorise(statistics, "none", DAMP, statistics.features, 1)
    if isinstance(factor, str) or factor.match is None:
        raise SolverError(f"{factor}; the float path cannot be matched")
    return weight @ factor.match, statistics.cached("own", lambda: replace(statistics, cross=None))
