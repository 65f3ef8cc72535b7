"""How far two images of the same seed lie apart: PSNR, SSIM, and the cosine of what they were made from.

Images are `[N, C, H, W]` float32 in [0, 1], so the peak of PSNR is 1. SSIM is that of Wang et al. (IEEE TIP 13-4,
2004): a Gaussian window of 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03, population variances, only positions
where the window fits, mean over positions and channels. A side shorter than 11 gets the largest odd window that fits.
Everything is computed in float64: two nearly equal images leave a difference of squares.
"""

from __future__ import annotations

import torch
from torch.nn.functional import conv2d, cosine_similarity

from quant.errors import SettingsError


def psnr(images: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Returns `[N]` decibels, infinite where two images are equal: `10 log10(1 / mean squared error)`."""
    return -10 * torch.log10(squared_error(images, original))


def squared_error(images: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Returns `[N]`: the mean squared error of each image, float64.

    Raises:
        SettingsError: images of different sizes.
    """
    if images.shape != original.shape:
        raise SettingsError(f"images of {list(images.shape)} and {list(original.shape)} cannot be compared.")
    return (images.double() - original.double()).square().flatten(1).mean(1)


def ssim(images: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Returns `[N]`, 1 where two images are equal."""
    a, b = images.double(), original.double()
    channels = a.shape[1]
    window = _window(min(a.shape[-2:])).repeat(channels, 1, 1, 1)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return conv2d(x, window, groups=channels)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    cov = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return ratio.flatten(1).mean(1)


def _window(side: int) -> torch.Tensor:
    """`[1, 1, w, w]` float64, sum 1."""
    width = min(11, side - 1 + side % 2)
    at = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    line = torch.exp(-at.square() / (2 * 1.5**2))
    square = line[:, None] * line
    return (square / square.sum())[None, None]


def step_cosines(latents: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Returns `[S]`: the cosine between latents `[S, K, ...]` of two models after each step, mean over images."""
    return cosine_similarity(latents.double().flatten(2), original.double().flatten(2), dim=-1).mean(1)


def step_errors(found: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Returns `[S]`: the squared distance over the squared norm of the original, `[S, K, ...]`, pooled over images."""
    far = (found.double() - original.double()).square().flatten(1).sum(1)
    return far / original.double().square().flatten(1).sum(1)
