"""The error of a model's output: of a diffusion transformer's row by row and timestep by timestep, else KL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div


def row_errors(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each row, summed over the rest: float32 `[rows]`."""
    return (output.float() - target.float()).square().flatten(1).sum(1)


def usual_errors(errors: Sequence[Tensor], times: Sequence[Tensor]) -> Tensor:
    """Mean of `errors[n]` `[rows]` over the rows of each timestep, whose numbers `times[n]` gives: `[timesteps]`."""
    error, time = torch.cat(list(errors)), torch.cat(list(times)).to(errors[0].device)
    sums = torch.zeros(int(time.max()) + 1, device=error.device).index_add_(0, time, error)
    return sums / time.bincount().clamp_min(1)


def output_error(model: nn.Module, output: Tensor, target: Tensor) -> float:
    """Mean over tokens of KL(target || output) where the model has a vocabulary, else of the rows' squared errors."""
    return float(divergence(output, target) if has_vocabulary(model) else row_errors(output, target).mean())


def has_vocabulary(model: nn.Module) -> bool:
    """Whether its output are logits of tokens."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def divergence(output: Tensor, target: Tensor) -> Tensor:
    """KL(target || output) of logits `[..., vocabulary]`: mean over tokens, in nats."""
    output, target = output.float().log_softmax(-1), target.float().log_softmax(-1)
    return kl_div(output, target, reduction="sum", log_target=True) / target[..., 0].numel()
