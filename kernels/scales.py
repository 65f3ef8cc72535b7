"""Scales of 8 bits: `scale = peak * 2^(-code / 16)`, and code 255 means 0.

A factor of `2^(1/16)` from code to code: at most 2.2 % off, over 15 factors of two below the peak.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

STEPS = 16
"""Scale codes per factor of two."""
NO_SCALE = 255


def scale_values(codes: Tensor, peaks: Tensor) -> Tensor:
    """`codes` uint8 `[n]` and their `peaks` `[n]` to float32 scales."""
    return scale_table(codes.device)[codes.int()] * peaks.float()


@torch.compiler.assume_constant_result
def scale_table(device: torch.device) -> Tensor:
    """The scale of each of the 256 codes where the peak is 1, float32."""
    return _table(device)


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor([*(2.0 ** (-code / STEPS) for code in range(NO_SCALE)), 0.0], device=device)


def scale_codes(scales: Tensor, peaks: Tensor) -> Tensor:
    """The nearest codes uint8 to positive `scales`, on a logarithmic scale; 255 for what is too small."""
    ratio = (scales / peaks.float()).double().clamp_min(1e-300)
    codes = (-STEPS * torch.log2(ratio)).round()
    return torch.where(codes < NO_SCALE, codes.clamp_min(0), NO_SCALE).to(torch.uint8)
