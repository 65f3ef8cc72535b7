"""Mixed precision by two metrics of the final image (MixDQ, arXiv 2405.17873, sections 3.3 and 3.4).

What a picture shows and how well it is drawn suffer from different layers, and one number for both lets the one hide
the other. Attention to a text and feed-forward layers (`Site.content`) are judged by what their error does to the
image's structure, `1 - SSIM`; all others by its noise over its signal. Within a group these costs compare, between
groups they do not: so the bytes are split between the groups in `SPLITS` ways, an integer program spends each part,
and of the plans the one whose image, with all their errors in it, is nearest to the float model's is taken.

Every cost is a whole way from noise to image: `sites x widths` of them, where `allocation.py` needs as many single
passes over its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from quant.allocation import allocate
from quant.errors import SettingsError
from quant.models.walk import Site

SPLITS = 9
WINDOW = 7


@torch.no_grad()
def decoupled(
    model: nn.Module, errors: Callable[[], Sequence[tuple[Site, Tensor]]], draw: Callable[[], Tensor],
    widths: Sequence[int], nbytes: Callable[[Site, int], int], budget: float,
) -> dict[str, int]:  # fmt: skip
    """Bits of each site within `budget` bytes. `errors`: of each site as `allocation.errors` has them; `draw`: the
    model's final images, the same noise each time."""
    found, original = list(errors()), draw()
    costs = {
        site.name: tuple(_cost(model, site, error, bits, draw, original) for bits in widths) for site, error in found
    }
    groups = [[site for site, _ in found if site.content == content] for content in (True, False)]
    groups = [group for group in groups if group]
    least = [sum(nbytes(site, min(widths)) for site in group) for group in groups]
    spare = budget - sum(least)
    if spare < 0:
        raise SettingsError(
            f"a budget of {budget:.0f} bytes; the narrowest widths take {budget - spare:.0f}: give more"
        )
    plans: list[dict[str, int]] = []
    for number in range(SPLITS if len(groups) > 1 else 1):
        share = (number + 1) / (SPLITS + 1) if len(groups) > 1 else 1.0
        plan = dict[str, int]()
        for group, taken, part in zip(groups, least, (share, 1 - share), strict=False):
            plan |= allocate(group, widths, costs, nbytes, taken + part * spare)
        plans += [plan] if plan not in plans else []
    return min(plans, key=lambda plan: _together(model, found, plan, draw, original))


def _cost(
    model: nn.Module, site: Site, error: Tensor, bits: int, draw: Callable[[], Tensor], original: Tensor
) -> float:
    made = _drawn(model, [(site, error)], {site.name: bits}, draw)
    if site.content:
        return max(0.0, 1 - ssim(made, original))
    return float((made - original).square().sum() / original.square().sum())


def _together(
    model: nn.Module, found: Sequence[tuple[Site, Tensor]], plan: Mapping[str, int], draw: Callable[[], Tensor],
    original: Tensor,
) -> float:  # fmt: skip
    return float((_drawn(model, found, plan, draw) - original).square().mean())


def _drawn(
    model: nn.Module, found: Sequence[tuple[Site, Tensor]], bits: Mapping[str, int], draw: Callable[[], Tensor]
) -> Tensor:
    """The images with the errors of these sites in the model."""
    kept = [(model.get_parameter(site.parameter), model.get_parameter(site.parameter).data) for site, _ in found]
    try:
        for (parameter, weight), (site, error) in zip(kept, found, strict=True):
            parameter.data = weight + error * 2.0 ** -bits[site.name]
        return draw()
    finally:
        for parameter, weight in kept:
            parameter.data = weight


def ssim(made: Tensor, original: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of images or latents `[N, ..., H, W]`, in even windows, of the
    original's own range."""
    x, y = (part.float().reshape(len(part), -1, *part.shape[-2:]) for part in (made, original))
    side = min(WINDOW, *x.shape[-2:])
    mean = lambda z: avg_pool2d(z, side, 1)  # noqa: E731
    span = float(y.max() - y.min())
    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    a, b = (0.01 * span) ** 2, (0.03 * span) ** 2
    found = (2 * mx * my + a) * (2 * both + b) / ((mx * mx + my * my + a) * (vx + vy + b))
    return float(found.mean())
