"""The error of a diffusion transformer's prediction, row by row and timestep by timestep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_errors(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each row, summed over the rest: float32 `[rows]`."""
    return (output.float() - target.float()).square().flatten(1).sum(1)


def usual_errors(errors: Sequence[Tensor], times: Sequence[Tensor]) -> Tensor:
    """Mean of `errors[n]` `[rows]` over the rows of each timestep, whose numbers `times[n]` gives: `[timesteps]`."""
    error, time = torch.cat(list(errors)), torch.cat(list(times)).to(errors[0].device)
    sums = torch.zeros(int(time.max()) + 1, device=error.device).index_add_(0, time, error)
    return sums / time.bincount().clamp_min(1)
