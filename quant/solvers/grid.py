"""The best uniform grid for a group of weights: a search over scales and zero points.

For each row and group, `min over (scale, zero) of sum_i importance_i (w_i - scale (code_i - zero))^2` with codes
rounded to nearest. Candidates shrink the range between the extremes step by step (clipping a few outliers buys
resolution for all); at 2 and 3 bits the zero points beside the natural one are tried as well; a symmetric grid, which
has one level more on its negative side, also tries negative scales. The winner's scale is then refitted in closed form
given its codes, `s = <w, q> / <q, q>`, and kept if the codes of the new scale are better. Every scale is rounded to its
stored dtype *before* its error is measured.

Cost: about 60 passes over the weight at 4 bits, in chunks that stay in cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels.layouts import symmetric_zero
from quant.kernels.spec import DTYPES, Uniform

CHUNK = 1 << 18  # values per chunk: a few float32 buffers of 1 MB each


@dataclass(frozen=True)
class Search:
    """How far to look. `steps` clipped ranges from `widest` down to `narrowest` (by bits); `refits` closed-form scale
    updates.
    """

    steps: int = 32
    widest: float = 1.05
    narrowest: float | None = None
    neighbours: int | None = None
    refits: int = 2

    def shrinks(self, bits: int) -> list[float]:
        if self.steps <= 1:
            return [1.0]
        low = self.narrowest if self.narrowest is not None else {1: 0.2, 2: 0.3, 3: 0.4, 4: 0.5}.get(bits, 0.7)
        return [self.widest + (low - self.widest) * step / (self.steps - 1) for step in range(self.steps)]

    def offsets(self, bits: int) -> list[int]:
        reach = self.neighbours if self.neighbours is not None else {1: 1, 2: 1, 3: 1}.get(bits, 0)
        return list(range(-reach, reach + 1))


SEARCH = Search()
MINMAX = Search(steps=1, neighbours=0, refits=0)
"""No search: the grid spans the group's extremes."""


def fit(weight: Tensor, importance: Tensor, spec: Uniform, search: Search) -> tuple[Tensor, Tensor]:
    """Scales and zeros, float32 `[out, G]`, for `weight` `[out, in]` and `importance` `[in]` >= 0.

    The scales are exact in the spec's dtype. A group of zeros gets scale 0.
    """
    rows, columns = weight.shape
    width = spec.group_width(columns)
    whole = columns // width
    scales = torch.empty((rows, spec.groups(columns)), device=weight.device)
    zeros = torch.empty_like(scales)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        chunk = weight[start : start + step].float()
        parts = [(chunk[:, : whole * width].unflatten(1, (whole, width)), importance[: whole * width], slice(0, whole))]
        if whole * width != columns:
            parts.append((chunk[:, None, whole * width :], importance[whole * width :], slice(whole, whole + 1)))
        for values, weights, groups in parts:
            weights = _normalised(weights.float().view(values.shape[1:]))
            scale, zero = _search(values.contiguous(), weights, spec, search)
            scales[start : start + step, groups], zeros[start : start + step, groups] = scale, zero
    return scales, zeros


def encode(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes, as float32. A scale of 0 gives the zero point."""
    codes = values / torch.where(scale == 0, 1.0, scale)
    return codes.add_(zero).round_().clamp_(0, 2**bits - 1)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` float32 rounded to what `dtype` holds: never infinite, and never 0 unless it was."""
    limits = torch.finfo(dtype)
    size = scale.abs().clamp(limits.smallest_normal, limits.max)
    return torch.where(scale == 0, scale, torch.copysign(size, scale).to(dtype).float())


def _normalised(importance: Tensor) -> Tensor:
    """Scaled to a maximum of 1 in each group, so that equal importances are exactly equal; all zero means all equal."""
    top = importance.amax(-1, keepdim=True)
    return torch.where(top > 0, importance / torch.where(top > 0, top, 1.0), 1.0)


def _search(values: Tensor, weights: Tensor, spec: Uniform, search: Search) -> tuple[Tensor, Tensor]:
    """Best scale and zero `[r, g]` for `values` `[r, g, w]`, `weights` `[g, w]`."""
    top, dtype = 2**spec.bits - 1, DTYPES[spec.scale_dtype]
    span, natural = _natural(values, spec)
    starts = [(span * shrink, natural) for shrink in search.shrinks(spec.bits)]
    if spec.symmetric:
        if spec.bits > 1 and search.steps > 1:
            starts += [(-scale, zero) for scale, zero in starts]
    else:
        zeros = [(natural + offset).clamp(0, top) for offset in search.offsets(spec.bits)]
        starts = [(scale, zero) for scale, _ in starts for zero in zeros]
    best = torch.full_like(span, torch.inf)
    scale, zero = span, natural
    for candidate, point in starts:
        scale, zero, best = _better(values, weights, spec, storable(candidate, dtype), point, (scale, zero, best))
    for _ in range(search.refits):
        levels = encode(values, scale[..., None], zero[..., None], spec.bits).sub_(zero[..., None])
        weighted = levels * weights
        down = (weighted * levels).sum(-1)
        refit = torch.where(down > 0, (weighted * values).sum(-1) / torch.where(down > 0, down, 1.0), scale)
        scale, zero, best = _better(values, weights, spec, storable(refit, dtype), zero, (scale, zero, best))
    return scale, zero


def _better(
    values: Tensor, weights: Tensor, spec: Uniform, scale: Tensor, zero: Tensor, best: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The better of a candidate and the best `(scale, zero, error)` so far, group by group; a tie keeps the old one."""
    loss = encode(values, scale[..., None], zero[..., None], spec.bits).sub_(zero[..., None]).mul_(scale[..., None])
    error = loss.sub_(values).square_().mul_(weights).sum(-1)
    wins = error < best[2]
    return torch.where(wins, scale, best[0]), torch.where(wins, zero, best[1]), torch.where(wins, error, best[2])


def _natural(values: Tensor, spec: Uniform) -> tuple[Tensor, Tensor]:
    """Scale and zero of the grid that spans the extremes, `[r, g]` each."""
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    if spec.symmetric:
        zero = torch.full_like(low, symmetric_zero(spec.bits))
        # the negative side has the extra level: the larger extreme goes there
        return torch.where(high > -low, -high, -low) / zero, zero
    span = (high - low) / (2**spec.bits - 1)
    zero = (-low / torch.where(span == 0, 1.0, span)).round().clamp(0, 2**spec.bits - 1)
    return span, zero
