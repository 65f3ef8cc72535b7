"""What every packed weight in training has (`tunable.py`), and how gradients pass through a rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from quant.kernels.packed import Packed

MOST = 0.01  # of a trellis's or codebook's codes may change in a step (PV-Tuning, arXiv 2405.14852, section 3.2)
EVERY = 4  # they search every fourth column in turn: a search of all costs more than a step's gradient


class Tunable(ABC):
    """One packed matrix `[out, in]` in training. All its tensors are float32."""

    @abstractmethod
    def __init__(self, packed: Packed, weight: Tensor, train_codes: bool) -> None:
        """`weight` float32 `[out, in]`: the float one. `train_codes`: whether the codes will be."""

    @classmethod
    def held_bytes(cls, spec: Any, train_codes: bool) -> float:
        """Bytes for each weight that training holds of a matrix of `spec`, gradients included; wrappers add next to
        none to their base's."""
        return 0.0

    def weigh(self, metric: Tensor) -> None:
        """`metric` `[out, width]` (`solvers/metric.py`): how much errors count when `settle` finds codes that share
        bits among rows."""
        return

    def codes(self) -> list[Tensor]:
        """Parameters that decide the codes; a step of 1 is about one level."""
        return []

    def settle(self, step: int) -> None:
        """Finds the codes for what `codes()` are now, after step number `step` has changed them."""
        return

    def held(self) -> list[Tensor]:
        """What `settle` has made beside the parameters, for an interrupted training to keep: changed in place."""
        return []

    def scales(self) -> list[Tensor]:
        """Parameters that start at 0, each a change relative to what it changes."""
        return []

    @abstractmethod
    def weight(self) -> Tensor:
        """What would be stored now, float32 `[out, in]`, differentiable in all parameters."""

    @abstractmethod
    def pack(self) -> Packed: ...


class _Through(torch.autograd.Function):
    """`rounded`, bit for bit, with the gradient of `value`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


def through(value: Tensor, rounded: Tensor) -> Tensor:
    found: Any = _Through.apply(value, rounded)
    return found


class Vector:
    """A float parameter in training: `value()` is what would be stored, in float32."""

    def __init__(self, parameter: Tensor, kind: torch.dtype) -> None:
        self.start, self.kind = parameter.detach().float(), kind
        self.unit = float(self.start.square().mean().sqrt())
        self.change = torch.zeros_like(self.start, requires_grad=True)

    def value(self) -> Tensor:
        value = self.start + self.unit * self.change
        return through(value, value.detach().to(self.kind).float())

    def stored(self) -> Tensor:
        return self.value().detach().to(self.kind)
