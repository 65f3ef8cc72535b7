"""The error of a model's output: of a diffusion transformer's row by row and timestep by timestep, else KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from quant.models.structure import end_of

AT_ONCE = 1 << 24  # logits


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
    return end_of(model, "head") is not None


def divergence(output: Tensor, target: Tensor) -> Tensor:
    """KL(target || output) of logits `[..., vocabulary]`: mean over tokens, in nats. The softmaxes of a few tokens
    at a time: of a vocabulary of 151,936 all of a batch of 2,048 tokens, with their gradients, take 4 GB."""
    return _Divergence.apply(output.flatten(0, -2), target.flatten(0, -2))  # pyright: ignore[reportReturnType]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> Tensor:
        total, trained, gradients = output.new_zeros((), dtype=torch.float32), ctx.needs_input_grad[0], list[Tensor]()
        for said, wanted in zip(*(x.split(max(1, AT_ONCE // x.shape[1])) for x in (output, target)), strict=True):
            with torch.set_grad_enabled(trained):
                said = said.detach().requires_grad_(trained)
                logs = said.float().log_softmax(-1), wanted.float().log_softmax(-1)
                loss = kl_div(*logs, reduction="sum", log_target=True) / len(output)
            gradients += torch.autograd.grad(loss, said) if trained else ()
            total += loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat(ctx.saved_tensors).mul_(above[0]), None
