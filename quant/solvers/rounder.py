"""Rounders: from columns of a weight to representable values and codes. They know nothing of error feedback.

`feedback` and `descent` drive any rounder through the protocol below. A uniform grid takes one column at a time; a
vector code takes `granularity` of them; a trellis whose sequences run along the outputs again takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant.errors import SolverError
from quant.kernels.available import runs_triton
from quant.kernels.layouts import Packed, PackedUniform
from quant.kernels.scales import scale_codes, scale_values
from quant.kernels.spec import DTYPES, Binary, Codebook, Spec, Uniform
from quant.solvers.grid import Search, at_once, encode, fit, storable


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What error feedback is about to do inside one group, so that a rounder can try parameters before it chooses.

    `order` `[k]`: the group's columns, numbered from its first, as they will be rounded. `feedback` `[k, k]` and
    `variance` `[k]`: as in `Factor`, for these columns.
    """

    order: Tensor
    feedback: Tensor
    variance: Tensor

    def weigh(self, errors: Tensor) -> Tensor:
        """What `loss` returns, from the errors `[k, n]` in the order of rounding."""
        return (errors.square() * self.variance[:, None]).sum(0)

    def loss(self, weight: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        """Runs the group: `weight` `[k, n]`, one matrix column per row; `rounding` takes and gives `[n]`. Returns
        `[n]`: what each of the `n` adds to `tr(D H DT)` if all later groups were free.
        """
        work, total = weight[self.order], torch.zeros_like(weight[0])
        for i, variance in enumerate(self.variance.tolist()):
            error = work[i] - rounding(work[i])
            total.addcmul_(error, error, value=variance)
            work[i + 1 :].addr_(self.feedback[i, i + 1 :], error, alpha=-1)
        return total


class Rounder(Protocol):
    """`granularity`: columns rounded together (the last ones of a row may be fewer). `span`: columns that share
    parameters (a group); a multiple of `granularity`, or the whole row.
    """

    granularity: int
    span: int

    def fit(self, start: int, weight: Tensor, importance: Tensor, rehearsal: Rehearsal | None = None) -> None:
        """Chooses the parameters of the columns from `start` on, for `weight` `[out, k]` and `importance` `[k]`: one
        whole group, perhaps with a rehearsal; or (`start` 0) all of them."""
        ...

    def round(self, columns: Tensor, values: Tensor) -> Tensor:
        """Representable values `[out, k]` nearest to `values`, for the columns numbered `columns` `[k]` (on the CPU).
        The codes are kept, in place of those of an earlier call."""
        ...

    def refit(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """After every column was rounded: may improve the parameters, codes fixed, so that `tr(D H DT)` falls. Returns
        the representable matrix `[out, in]`; of a stack (`lockstep.py`) all is `[S, ...]`.
        """
        ...

    def pack(self) -> Packed:
        """After every column was rounded."""
        ...


def rounder_for(spec: Spec, shape: tuple[int, int], device: torch.device, search: Search) -> Rounder:
    """The rounder of a spec; a trellis's takes several matrices (`trellis.py`). Raises `SolverError` for a spec that
    has none."""
    if isinstance(spec, Uniform):
        return UniformRounder(spec, shape, device, search)
    if isinstance(spec, Codebook):
        from quant.solvers.codebook import CodebookRounder

        return CodebookRounder(spec, shape, device)
    if isinstance(spec, Binary):
        from quant.solvers.binary import BinaryRounder

        return BinaryRounder(spec, shape, device)
    raise SolverError(f"no rounder for {type(spec).__name__}; uniform grids, trellises, codebooks and signs have one")


def refitted(codes: Tensor, best: Tensor, peaks: Tensor) -> Tensor:
    """The scale codes nearest to the scales `best`, each where it is nearer than the one in `codes` and positive."""
    found = scale_codes(best, peaks)
    nearer = (scale_values(found, peaks) - best).abs() < (scale_values(codes, peaks) - best).abs()
    return torch.where(nearer & (best > 0), found, codes)


def in_one_kernel(rounder: Rounder, work: Tensor) -> UniformRounder | None:
    """The rounder, if a kernel can round columns of `work` for it in turn."""
    takes = work.dtype == torch.float32 and work.numel() > 0 and runs_triton(work)
    return rounder if takes and isinstance(rounder, UniformRounder) else None


class UniformRounder:
    """Nearest level of a uniform grid. Holds everything transposed, so that a column is contiguous."""

    granularity = 1

    def __init__(self, spec: Uniform, shape: tuple[int, int], device: torch.device, search: Search) -> None:
        self.spec, self.shape, self.search = spec, shape, search
        self.span = spec.group_width(shape[1])
        self.codes = torch.zeros((shape[1], shape[0]), dtype=torch.uint8, device=device)
        self.scales = torch.zeros((spec.groups(shape[1]), shape[0]), device=device)
        self.zeros = torch.zeros_like(self.scales)

    def fit(self, start: int, weight: Tensor, importance: Tensor, rehearsal: Rehearsal | None = None) -> None:
        scales, zeros = fit(weight, importance, self.spec, self.search)
        if rehearsal is not None and self.search.stretched(self.spec.bits):
            scales = self._rehearsed(weight, scales, zeros, rehearsal)
        group = start // self.span
        self.scales[group : group + scales.shape[1]] = scales.T
        self.zeros[group : group + zeros.shape[1]] = zeros.T

    def round(self, columns: Tensor, values: Tensor) -> Tensor:
        column = int(columns)
        scale, zero = self.scales[column // self.span], self.zeros[column // self.span]
        codes = encode(values[:, 0], scale, zero, self.spec.bits)
        self.codes[column] = codes
        return codes.sub_(zero).mul_(scale)[:, None]

    def round_in_turn(
        self, columns: Tensor, values: Tensor, lines: Tensor, held: Tensor | None = None, share: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Columns `values` `[k, out]`, one after another with feedback `lines` `[k, k]` among them, in one kernel: the
        representable values and the errors `[k, out]`. What `feed` does with `round`, column by column; with `held`
        and `share`, what `descend` does (see `round_columns`)."""
        groups = columns // self.span
        if bool((groups == groups[0]).all()):  # one grid for all columns, without a copy
            scales, zeros = (grid[int(groups[0])].expand(len(columns), -1) for grid in (self.scales, self.zeros))
        else:
            scales, zeros = self.scales[groups], self.zeros[groups]
        rounded, errors, self.codes[columns] = self._in_turn(values, lines, scales, zeros, held, share)
        return rounded, errors

    def _in_turn(
        self, values: Tensor, lines: Tensor, scales: Tensor, zeros: Tensor,
        held: Tensor | None = None, share: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        from quant.kernels.feedback import round_columns

        rounded, errors = torch.empty_like(values), torch.empty_like(values)
        codes = torch.empty_like(values, dtype=torch.uint8)
        arrays = (values[None], lines[None], scales[None], zeros[None])
        outputs = (rounded[None], errors[None], codes[None])
        round_columns(*arrays, self.spec.bits, *outputs, None if held is None else held[None], share)
        return rounded, errors, codes

    def refit(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """Group after group the scale that minimises `tr(D H DT)` given all the others: `s += <A H D> / <A H A>` with
        `A` the group's `code - zero`, rounded to its dtype, kept row by row where it helps.
        """
        lost = weight.float() - self._values()  # D
        for group, start in enumerate(range(0, self.shape[1], self.span)):
            part = slice(start, min(start + self.span, self.shape[1]))
            levels = (self.codes[part].float() - self.zeros[group]).T  # A
            pulled = levels @ hessian[part]
            gain, curve = (pulled * lost).sum(1), (pulled[:, part] * levels).sum(1)
            scale = self.scales[group]
            better = storable(scale + gain / torch.where(curve > 0, curve, torch.inf), DTYPES[self.spec.scale_dtype])
            step = better - scale
            step = torch.where(curve * step * step < 2 * step * gain, step, 0.0)
            self.scales[group] += step
            lost[:, part] -= step[:, None] * levels
        return self._values()

    def pack(self) -> Packed:
        scales = self.scales.T.to(DTYPES[self.spec.scale_dtype]).contiguous()
        zeros = None if self.spec.symmetric else self.zeros.T.byte()
        return PackedUniform.from_codes(self.spec, self.shape, self.codes.T, scales, zeros)

    def _rehearsed(self, weight: Tensor, scales: Tensor, zeros: Tensor, rehearsal: Rehearsal) -> Tensor:
        """The multiples of `scales` `[out, 1]` that lose least in a rehearsal, each row its own. The fitted scale is
        the best for the weight as it is; feedback will add to the columns that come late, and often wants a wider
        grid.
        """
        multiples = torch.tensor((1.0, *self.search.stretches), device=scales.device)
        tried = storable(scales * multiples, DTYPES[self.spec.scale_dtype])  # [out, m]
        best = torch.empty_like(scales, dtype=torch.long)
        step = max(1, at_once(scales.device) // (weight.shape[1] * len(multiples)))
        for start in range(0, len(scales), step):
            part = slice(start, start + step)
            scale, zero = tried[part].flatten(), zeros[part].expand_as(tried[part]).flatten()
            stacked = weight[part].T.repeat_interleave(len(multiples), 1)
            if in_one_kernel(self, stacked):
                grids = (grid.expand_as(stacked) for grid in (scale, zero))
                loss = rehearsal.weigh(self._in_turn(stacked[rehearsal.order], rehearsal.feedback, *grids)[1])
            else:
                rounding = lambda v, s=scale, z=zero: encode(v, s, z, self.spec.bits).sub_(z).mul_(s)  # noqa: E731
                loss = rehearsal.loss(stacked, rounding)
            best[part] = loss.view(-1, len(multiples)).argmin(1, keepdim=True)
        return tried.gather(1, best)

    def _values(self) -> Tensor:
        group = torch.arange(self.shape[1], device=self.codes.device) // self.span
        return ((self.codes.float() - self.zeros[group]) * self.scales[group]).T
