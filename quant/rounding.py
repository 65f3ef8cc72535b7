"""Rounded inputs in a model that still computes in floats, while its blocks are solved.

A site whose spec rounds its inputs sees, from the moment it is solved, what the loaded model will multiply by: later
sites are calibrated on what that gives, and tuning trains on it. Numbers are those of the packed product up to float32
rounding; where that turns a value at the middle of two levels the other way, a token differs by a level. Gradients pass
straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.replay import instead
from quant.kernels.integer import rounded
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.packed import Packed
from quant.kernels.rotated import PackedRotated
from quant.kernels.smoothed import PackedSmoothed
from quant.kernels.spec import rounds_inputs
from quant.models.walk import Site

_as_they_are: ContextVar[bool] = ContextVar("as_they_are", default=False)


@contextmanager
def unrounded() -> Generator[None]:
    """No input is rounded: the float path."""
    token = _as_they_are.set(True)
    try:
        yield
    finally:
        _as_they_are.reset(token)


class Rounding(ExitStack):
    """The modules of `model` whose inputs are rounded, until it is closed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def put(self, site: Site, packed: Packed) -> None:
        """From now on `site` multiplies by the inputs that `packed` will, if it rounds them."""
        if rounds_inputs(packed.spec):
            module = self.model.get_submodule(site.name)
            self.enter_context(instead(module, "forward", _stand_in(module.forward, packed)))


@contextmanager
def rounding(model: nn.Module, sites: Mapping[str, Site], packed: Mapping[str, Packed]) -> Generator[None]:
    """`model` with the inputs of all these sites rounded."""
    with Rounding(model) as rounded_inputs:
        for name, one in packed.items():
            rounded_inputs.put(sites[name], one)
        yield


def _stand_in(forward: Callable[..., Any], packed: Packed) -> Callable[..., Any]:
    @wraps(forward)
    def stand_in(x: Tensor) -> Tensor:
        if _as_they_are.get():
            return forward(x)
        with torch.no_grad():
            seen = seen_inputs(x, packed)
        seen = x + (seen - x).detach() if torch.is_grad_enabled() else seen
        return forward(seen) + _branch(x - seen, packed) if _has_branch(packed) else forward(seen)

    return stand_in


def seen_inputs(x: Tensor, packed: Packed) -> Tensor:
    """What the codes of `packed` are multiplied by for inputs `x` `[..., in]`, back in the plain basis."""
    if isinstance(packed, PackedSmoothed):
        return (seen_inputs(packed.inputs(x), packed.base) / packed.smooth.float()).to(x.dtype)
    if isinstance(packed, PackedRotated):
        return packed.inputs().undo(seen_inputs(packed.inputs().apply(x), packed.base))
    return seen_inputs(x, packed.base) if isinstance(packed, PackedLowRank) else rounded(x).to(x.dtype)


def _has_branch(packed: Packed) -> bool:
    return isinstance(packed.base if isinstance(packed, PackedSmoothed) else packed, PackedLowRank)


def _branch(lost: Tensor, packed: Packed) -> Tensor:
    """What a low-rank branch, whose inputs are not rounded, makes of what rounding took from them."""
    if isinstance(packed, PackedSmoothed):
        return _branch(packed.inputs(lost), packed.base)
    assert isinstance(packed, PackedLowRank)
    return packed.branch(lost)
