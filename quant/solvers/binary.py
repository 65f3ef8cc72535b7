"""The rounder of signs and salient columns (PTQ1.61, arXiv 2502.13179).

The columns with the largest `H_ii` get 4 bits, the others their sign. Each row has a scale for either kind and each
column one, first from `|W|`, row and column in turn. After feedback and each sweep of descent `refit` has the rows' in
closed form, as a parabola each, and then all columns' together: with `A` the values over their column's scale, the best
`c` solves `((AT A) * H) c = diag(AT W H)`. What the paper trains with gradients, block by block, is left to recovery.

Descent is worth more here than anywhere, as a sign moves by so much: feedback alone has 1.2 to 2 times the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.binary import Binary, PackedBinary
from quant.kernels.packed import Packed
from quant.kernels.scales import scale_codes, scale_values
from quant.solvers.rounder import Rehearsal, refitted

STEP = 0.335  # of the best 4-bit grid for a Gaussian of deviation 1
HEADROOM = 2**0.5  # what `refit` may add to the largest scale
TURNS = 4  # of fitting rows and columns


class BinaryRounder:
    """Levels `[in, out]`: -8 to 7 in `salient` columns, else -1 or 1; see the module. One choice of columns for all
    rows, scales of columns for each group of them."""

    granularity = 1

    def __init__(self, spec: Binary, shape: tuple[int, int], device: torch.device) -> None:
        self.spec, self.shape, self.span = spec.chosen(shape), shape, shape[1]
        self.group = torch.arange(shape[0], device=device) // spec.rows
        self.groups = int(self.group[-1]) + 1
        self.levels = torch.ones((shape[1], shape[0]), device=device)
        self.salient = torch.zeros(shape[1], dtype=torch.bool, device=device)
        self.peaks = torch.zeros((self.groups, 3), dtype=torch.float16, device=device)
        self.row_codes = torch.zeros((shape[0], 2), dtype=torch.uint8, device=device)
        self.column_codes = torch.zeros((self.groups, shape[1]), dtype=torch.uint8, device=device)

    def fit(self, start: int, weight: Tensor, importance: Tensor, rehearsal: Rehearsal | None = None) -> None:
        ranked = importance.sort(descending=True, stable=True)[1]
        self.salient = torch.zeros_like(self.salient).index_fill_(0, ranked[: self.spec.salient(self.shape[1])], True)
        plain, coded = (importance.float() * kind for kind in (~self.salient, self.salient))
        rows, columns = weight.new_zeros((len(weight), 2)), weight.new_ones((self.groups, self.shape[1]))
        for group in range(self.groups):
            mine = self.group == group
            size = weight[mine].float().abs()
            row, column = size @ plain / plain.sum().clamp_min(1e-30), columns[group]
            for _ in range(TURNS):
                column = _ratio(size.T @ row, row @ row)
                row = _ratio(size @ (plain * column), plain @ column.square())
            inverse = torch.where(column > 0, 1 / column, 0.0)
            spread = _ratio((size * inverse).square() @ coded, coded.sum()).sqrt()
            rows[mine], columns[group] = torch.stack([row, STEP * spread], 1), column
        top = torch.stack([rows[self.group == group].amax(0) for group in range(self.groups)])
        top = torch.cat([top, columns.amax(1, keepdim=True)], 1) * HEADROOM
        self.peaks = top.clamp_max(torch.finfo(torch.float16).max).half()
        self.row_codes = scale_codes(rows, self.peaks[self.group, :2])
        self.column_codes = scale_codes(columns, self.peaks[:, 2:])

    def round(self, columns: Tensor, values: Tensor) -> Tensor:
        column, value = int(columns), values[:, 0]
        coded = bool(self.salient[column])
        scale = self._rows()[:, int(coded)] * self._columns()[self.group, column]
        if coded:
            levels = (value / torch.where(scale > 0, scale, torch.inf)).round_().clamp_(-8, 7)
        else:
            levels = torch.where(value >= 0, 1.0, -1.0)
        self.levels[column] = levels
        return (levels * scale)[:, None]

    def refit(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The rows' scales of either kind, and then the columns' if they help, that minimise `tr(D H DT)`."""
        weight = weight.float()
        for kind, chosen in enumerate((~self.salient, self.salient)):
            values = self._values()
            A = torch.where(chosen, self.levels.T * self._columns()[self.group], 0.0)
            pulled = A @ hessian
            gain, curve = (pulled * (weight - values)).sum(1), (pulled * A).sum(1)
            best = self._rows()[:, kind] + gain / torch.where(curve > 0, curve, torch.inf)
            self.row_codes[:, kind] = refitted(self.row_codes[:, kind], best, self.peaks[self.group, kind])
        before, kept = _lost(weight - self._values(), hessian), self.column_codes.clone()
        for group in range(self.groups):
            self._fit_columns(group, weight, hessian)
        after = _lost(weight - self._values(), hessian)
        for group in range(self.groups):  # groups share no row, so each is kept or not on its own
            mine = self.group == group
            if float(after[mine].sum()) > float(before[mine].sum()):
                self.column_codes[group] = kept[group]
        return self._values()

    def pack(self) -> Packed:
        salient = self.salient.expand(self.groups, -1)
        parts = (self.row_codes, self.column_codes, salient, self.peaks)
        return PackedBinary.from_levels(self.spec, self.levels.T, *parts)

    def _fit_columns(self, group: int, weight: Tensor, hessian: Tensor) -> None:
        mine = self.group == group
        rows = self._rows()[mine]
        A = self.levels.T[mine] * torch.where(self.salient, rows[:, 1:], rows[:, :1])
        curve = (A.T @ A).double() * hessian.double()
        scale = curve.diagonal().mean().clamp_min(1e-30)
        curve.diagonal().add_(1e-6 * scale)
        best = torch.linalg.solve(curve, (A * (weight[mine] @ hessian)).sum(0).double()).float()
        codes = scale_codes(best, self.peaks[group, 2])
        self.column_codes[group] = torch.where(best > 0, codes, self.column_codes[group])

    def _rows(self) -> Tensor:
        """Scales float32 `[out, 2]`."""
        return scale_values(self.row_codes, self.peaks[self.group, :2])

    def _columns(self) -> Tensor:
        """Scales float32 `[groups, in]`."""
        return scale_values(self.column_codes, self.peaks[:, 2:])

    def _values(self) -> Tensor:
        rows = self._rows()
        return self.levels.T * torch.where(self.salient, rows[:, 1:], rows[:, :1]) * self._columns()[self.group]


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    return over / torch.where(under > 0, under, torch.inf)


def _lost(D: Tensor, hessian: Tensor) -> Tensor:
    """What each row adds to `tr(D H DT)`."""
    return (D @ hessian).mul_(D).sum(1, dtype=torch.float64)
