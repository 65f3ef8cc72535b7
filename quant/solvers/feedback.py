"""Error feedback: GPTQ (arXiv 2210.17323) and LDLQ (arXiv 2307.13304) as one loop, for any rounder.

Columns are rounded one after another; what a column lost is made up for by the columns still to come, as far as the
inputs are correlated. With `(H + damping)^-1 = UT U`, `U` upper triangular, and `V = U / diag(U)`:

    Q_i = round(W_i),   W_j -= (W_i - Q_i) V_ij   for j > i.

`U` comes from one Cholesky factorisation of the reversed Hessian and one triangular inverse, in float64. Updates beyond
the current block of columns wait and become one matrix product. A rounder that takes `k` columns at a time gets them
together, and its error is propagated through the inverse of `V`'s `k x k` diagonal block.

Order matters: columns with large inputs should go early, while there are many left to correct them. `gar` (group-aware
reordering) sorts the groups, and the columns inside each, by `H_ii`, so that nothing of the order has to be stored;
`act` sorts all columns and so needs the grids fixed beforehand (static groups); `none` keeps the order.

A dead column (`H_ii = 0`: its input was always 0) has no off-diagonal entries, so damping alone makes it independent:
it is rounded to nearest, which is what is wanted if it ever wakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.errors import SolverError
from quant.kernels.layouts import Packed, PackedUniform
from quant.kernels.spec import DTYPES, Spec, Uniform
from quant.solvers.grid import SEARCH, Search, encode, fit
from quant.solvers.nearest import Nearest
from quant.solvers.solution import Solution, check, solution

TRIES = 4


class Rounder(Protocol):
    """Turns columns into representable values and remembers the codes. It knows nothing of error feedback.

    `granularity`: columns rounded together (the last ones of a row may be fewer). `span`: columns that share
    parameters.
    """

    granularity: int
    span: int

    def fit(self, start: int, weight: Tensor, importance: Tensor) -> None:
        """Chooses the parameters of columns `start ...` from `weight` `[out, k]`, `importance` `[k]`: whole spans, or
        everything.
        """
        ...

    def round(self, columns: Tensor, values: Tensor) -> Tensor:
        """Representable values `[out, k]` near `values`, for the columns numbered `columns` `[k]` (on the CPU); codes
        are kept.
        """
        ...

    def pack(self) -> Packed:
        """After every column was rounded."""
        ...


class UniformRounder:
    """Nearest level of a uniform grid; grids by `grid.fit`."""

    granularity = 1

    def __init__(self, spec: Uniform, shape: tuple[int, int], device: torch.device, search: Search) -> None:
        self.spec, self.shape, self.search = spec, shape, search
        self.span = spec.group_width(shape[1])
        # transposed: a column is then contiguous
        self.codes = torch.zeros((shape[1], shape[0]), dtype=torch.uint8, device=device)
        self.scales = torch.zeros((spec.groups(shape[1]), shape[0]), device=device)
        self.zeros = torch.zeros_like(self.scales)

    def fit(self, start: int, weight: Tensor, importance: Tensor) -> None:
        group = start // self.span
        scales, zeros = fit(weight, importance, self.spec, self.search)
        self.scales[group : group + scales.shape[1]], self.zeros[group : group + zeros.shape[1]] = scales.T, zeros.T

    def round(self, columns: Tensor, values: Tensor) -> Tensor:
        column = int(columns)
        scale, zero = self.scales[column // self.span], self.zeros[column // self.span]
        codes = encode(values[:, 0], scale, zero, self.spec.bits)
        self.codes[column] = codes
        return codes.sub_(zero).mul_(scale)[:, None]

    def pack(self) -> Packed:
        scales = self.scales.T.to(DTYPES[self.spec.scale_dtype]).contiguous()
        zeros = None if self.spec.symmetric else self.zeros.T.byte()
        return PackedUniform.from_codes(self.spec, self.shape, self.codes.T, scales, zeros)


@dataclass(frozen=True)
class Feedback:
    """GPTQ. See the module for `order`.

    `damp`: added to the Hessian's diagonal, as a share of its mean; ten times more on each of 3 retries if it is not
    positive definite (a note says so), then round to nearest (a note says so). `block`: columns updated at once.
    `static_groups`: grids from the original weight instead of the updated one.
    """

    damp: float = 0.01
    block: int = 128
    order: Literal["gar", "act", "none"] = "gar"
    static_groups: bool = False
    search: Search = SEARCH

    def solve(self, weight: Tensor, statistics: Statistics, spec: Spec) -> Solution:
        check(weight, statistics)
        if not isinstance(spec, Uniform):
            raise SolverError(f"no rounder for {type(spec).__name__}")
        shape = (weight.shape[0], weight.shape[1])
        rounder = UniformRounder(spec, shape, weight.device, self.search)
        order = column_order(statistics.diagonal, self.order, rounder.span, rounder.granularity)
        factor, notes = factorise(statistics, order, self.damp)
        if factor is None:
            fallback = Nearest().solve(weight, statistics, spec)
            return Solution(fallback.packed, fallback.weight, fallback.error, notes)
        static = self.static_groups or self.order == "act"
        feed(weight.float(), factor, order, rounder, statistics.diagonal, self.block, static)
        return solution(rounder.pack(), weight, statistics, notes)


def column_order(diagonal: Tensor, order: str, span: int, granularity: int) -> Tensor:
    """The order `[in]` (on the CPU) in which columns are rounded; columns that are rounded together stay together."""
    columns = diagonal.shape[0]
    numbers = torch.arange(columns)
    if order == "none":
        return numbers
    units = [diagonal[i : i + granularity].max() for i in range(0, columns, granularity)]
    score = torch.stack(units).cpu()
    if order == "act":
        ranked = score.argsort(descending=True, stable=True).tolist()
    else:
        per = -(-span // granularity)
        groups = [score[i : i + per] for i in range(0, len(score), per)]
        first = torch.stack([group.max() for group in groups]).argsort(descending=True, stable=True).tolist()
        ranked = [g * per + u for g in first for u in groups[g].argsort(descending=True, stable=True).tolist()]
    return torch.cat([numbers[u * granularity : (u + 1) * granularity] for u in ranked])


def factorise(statistics: Statistics, order: Tensor, damp: float) -> tuple[Tensor | None, tuple[str, ...]]:
    """`V` `[in, in]` float32 unit upper triangular in `order`, and notes; None when no damping made the Hessian
    positive definite.
    """

    def compute() -> tuple[Tensor | None, tuple[str, ...]]:
        index = order.to(statistics.hessian.device)
        hessian = statistics.hessian.double()[index][:, index]
        mean = float(hessian.diagonal().mean())
        share, notes = damp, list[str]()
        for _ in range(TRIES):
            damped = hessian.clone()
            damped.diagonal().add_(share * mean)
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if int(failed) == 0 and mean > 0:
                upper = lower.flip(0, 1)  # H = upper upperT, so U = upper^-1
                eye = torch.eye(len(order), dtype=upper.dtype, device=upper.device)
                inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
                return (inverse * upper.diagonal()[:, None]).float(), tuple(notes)
            notes = [f"Hessian not positive definite with damp {share:g}; {share * 10:g} used"]
            share *= 10
        return None, (f"Hessian not positive definite with damp {damp:g} to {share / 10:g}: rounded to nearest",)

    return statistics.cached(("factor", damp, tuple(order.tolist())), compute)


def feed(
    weight: Tensor, factor: Tensor, order: Tensor, rounder: Rounder, importance: Tensor, block: int, static: bool
) -> Tensor:
    """Rounds the columns of `weight` `[out, in]` in `order`; returns the representable matrix `[out, in]`."""
    size, index = rounder.granularity, order.to(weight.device)
    work = weight.T[index].contiguous()  # [in, out]: a column is contiguous
    quantized = torch.empty_like(work)
    if static:
        rounder.fit(0, weight, importance)
    fresh = set[int]() if static else group_starts(order, rounder.span)
    for start, stop in blocks(order, rounder.span, max(size, block - block % size), static):
        errors = torch.empty_like(work[start:stop])
        for i in range(start, stop, size):
            if i in fresh:
                first, last, inside = _group(order, i, rounder.span)
                rounder.fit(first, work[i + inside.to(index.device)].T, importance[first:last])
            end = min(i + size, stop)
            values = work[i:end]
            quantized[i:end] = rounder.round(order[i:end], values.T).T
            error = values - quantized[i:end]
            if size > 1:
                error = torch.linalg.solve_triangular(factor[i:end, i:end].T, error, upper=False, unitriangular=True)
            errors[i - start : end - start] = error
            work[end:stop].addmm_(factor[i:end, end:stop].T, error, alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return torch.empty_like(weight).index_copy_(1, index, quantized.T)


def group_starts(order: Tensor, span: int) -> set[int]:
    """Positions in `order` where a group of `span` columns begins."""
    groups = order // span
    changes = (groups[1:] != groups[:-1]).nonzero().flatten() + 1
    return {0, *changes.tolist()}


def blocks(order: Tensor, span: int, size: int, static: bool) -> list[tuple[int, int]]:
    """Ranges of about `size` positions. Without static groups a group starts in the block that holds all of it, or at a
    block's start: there no update to its columns is pending when its grid is fitted.
    """
    total = len(order)
    if static:
        return [(start, min(start + size, total)) for start in range(0, total, size)]
    starts = sorted(group_starts(order, span))
    ranges, begin = list[tuple[int, int]](), 0
    for start, stop in zip(starts, [*starts[1:], total], strict=True):
        if stop - begin > size and start > begin:
            ranges.append((begin, start))
            begin = start
        while stop - begin > size:
            ranges.append((begin, begin + size))
            begin += size
    return [*ranges, (begin, total)]


def _group(order: Tensor, position: int, span: int) -> tuple[int, int, Tensor]:
    """First and last + 1 column of the group that starts at `position`, and the offsets of its columns in their own
    order.
    """
    first = int(order[position]) // span * span
    last = min(first + span, len(order))
    return first, last, order[position : position + last - first].argsort()
