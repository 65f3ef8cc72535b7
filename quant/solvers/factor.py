"""What feedback needs of a Hessian, computed once per statistics: the order of the columns and the triangular factor.

With `(H + damping)^-1 = UT U`, `U` upper triangular, feedback needs `V = U / diag(U)`. As `H + damping = R RT` with `R`
upper triangular is a Cholesky factorisation of the reversed matrix, `U = R^-1`: one factorisation and one triangular
inverse, both in float64 (in float32 the factor of an ill-conditioned Hessian is noise long before the factorisation
fails).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from quant.calibration.statistics import Statistics

Order = Literal["gar", "act", "none"]
TRIES = 4


@dataclass(frozen=True, eq=False)
class Factor:
    """`order` `[in]`, on the CPU: columns as they are rounded. `feedback` `[in, in]` float32: `V`, unit upper
    triangular, in that order. `hessian` `[in, in]` float32: damped, in the columns' own order. `match` `[in, in]`
    float32 or None: `C H^-1`, which turns a weight into the one that best gives the float path's outputs. `notes`: what
    damping had to be raised.
    """

    order: Tensor
    feedback: Tensor
    hessian: Tensor
    variance: Tensor
    match: Tensor | None
    notes: tuple[str, ...]

    @cached_property
    def diagonal(self) -> bool:
        """No two inputs are correlated: every column is on its own, and rounding to nearest is all there is to do."""
        return int(self.hessian.count_nonzero()) == int(self.hessian.diagonal(dim1=-2, dim2=-1).count_nonzero())


def factorise(statistics: Statistics, order: Order, damp: float, span: int, granularity: int) -> Factor | str:
    """The factor, cached with the statistics; or the sentence on why there is none, after `TRIES` dampings, each ten
    times the last.
    """
    key = ("factor", order, damp, span, granularity)
    return statistics.cached(key, lambda: _factorise(statistics, order, damp, span, granularity))


def shaping(statistics: Statistics) -> tuple[Tensor, Tensor] | None:
    """`order` `[in]` and `V` on the statistics' device: white rounding errors `Z` of the columns in that order become
    errors `Z V` of the weight. None where there is no factor, and errors stay white."""
    factor = factorise(statistics, "gar", 0.01, len(statistics.hessian), 1)
    return None if isinstance(factor, str) else (factor.order.to(factor.feedback.device), factor.feedback)


def _factorise(statistics: Statistics, order: Order, damp: float, span: int, granularity: int) -> Factor | str:
    columns = column_order(statistics.diagonal, order, span, granularity)
    last_first = columns.flip(0).to(statistics.hessian.device)
    mean = float(statistics.diagonal.mean())
    if mean <= 0:
        return f"Hessian is zero ({statistics.tokens} tokens seen)"
    tried = [damp * 10**step for step in range(TRIES)]
    for share in tried:
        damped = statistics.hessian.double()
        damped.diagonal().add_(share * mean)
        hessian = damped.float()
        damped = damped[last_first]  # in steps: 8 GB each where inputs are 32,768
        damped = damped[:, last_first]
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if int(failed) or not bool(torch.isfinite(lower).all()):
            continue
        match = None if statistics.cross is None else _match(statistics.cross, lower, last_first, share * mean)
        upper = lower.flip(0, 1)
        del lower
        variance = upper.diagonal().square()
        eye = torch.eye(len(columns), dtype=upper.dtype, device=upper.device)
        feedback = torch.linalg.solve_triangular(upper, eye, upper=True).mul_(upper.diagonal()[:, None])
        raised = (f"Hessian not positive definite with damp {damp:g}; {share:g} used",) if share != damp else ()
        return Factor(columns, feedback.float(), hessian, variance.float(), match, raised)
    return f"Hessian not positive definite with damp {damp:g} to {tried[-1]:g} ({statistics.tokens} tokens seen)"


def _match(cross: Tensor, lower: Tensor, index: Tensor, added: float) -> Tensor:
    """`C H^-1`, both damped alike: inputs that say nothing leave the weight as it is. `lower`: Cholesky factor of the
    damped Hessian in the order `index`."""
    cross = cross.double()
    cross.diagonal().add_(added)
    cross = cross[:, index]
    solved = torch.cholesky_solve(cross.T, lower).float().T
    return torch.empty_like(cross, dtype=torch.float32).index_copy_(1, index, solved)


def column_order(diagonal: Tensor, order: Order, span: int, granularity: int) -> Tensor:
    """Columns `[in]` (on the CPU) as they are rounded, in units of `granularity` that stay together. A unit that the
    row's end cuts short comes last, and its group with it."""
    columns = diagonal.shape[0]
    if order == "none":
        return torch.arange(columns)
    units = [float(unit.max()) for unit in diagonal.cpu().split(granularity)]
    per = max(1, span // granularity)
    groups = [max(units[g : g + per]) for g in range(0, len(units), per)]
    if columns % granularity:
        units[-1] = groups[-1] = -1.0
    key = (lambda u: (-groups[u // per], u // per, -units[u])) if order == "gar" else (lambda u: -units[u])
    ranked = sorted(range(len(units)), key=key)  # stable: equal ones keep their order
    every = torch.arange(columns).split(granularity)
    return torch.cat([every[u] for u in ranked])
