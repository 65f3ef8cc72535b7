"""Other tensors in the place of a model's parameters, where autograd can see them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quant.models.structure import owner_of
from quant.models.walk import Site


@contextmanager
def placed(model: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """`model` with `values` in the place of the parameters of these names, in the parameters' dtypes."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, value in values.items():
            owner, leaf = owner_of(model, name)
            parameter = owner._parameters[leaf]
            assert parameter is not None
            kept.append((owner, leaf, parameter))
            owner._parameters[leaf] = None  # keeps its place; the tensor is found first
            owner.__dict__[leaf] = value.to(parameter.dtype)
        with _Apart([owner.__dict__[leaf] for owner, leaf, _ in kept]):
            yield
    finally:
        for owner, leaf, parameter in kept:
            owner.__dict__.pop(leaf, None)
            owner._parameters[leaf] = parameter


class _Apart(TorchFunctionMode):
    """A model takes its experts' matrices out of their stack one by one. The gradient of each would be a stack of zeros
    with one matrix in it, to be added to those of all others; taken out at once, they are put together once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.stacks = {id(one): one for one in tensors if one.dim() == 3 and one.requires_grad}
        self.parts = dict[int, Sequence[Tensor]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = id(args[0]) if func is Tensor.__getitem__ and torch.is_grad_enabled() else None
        if place not in self.stacks or not _is_number(args[1]):
            return func(*args, **(kwargs or {}))
        if place not in self.parts:
            self.parts[place] = self.stacks[place].unbind(0)
        return self.parts[place][int(args[1])]


def _is_number(index: Any) -> bool:
    whole = isinstance(index, Tensor) and not index.dim() and index.dtype == torch.int64
    return isinstance(index, int) or whole


def oriented(parameter: Tensor, site: Site) -> Tensor:
    """A site's weight as `[out, in]`, or `[experts, out, in]`."""
    return parameter.detach().transpose(-1, -2) if site.transposed else parameter.detach()


def as_parameter(site: Site, weight: Tensor) -> Tensor:
    """A site's matrix `[rows, in]` in the shape of its parameter."""
    weight = weight.unflatten(0, (site.experts, site.out)) if site.experts else weight
    return weight.transpose(-1, -2) if site.transposed else weight
