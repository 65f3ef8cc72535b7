"""Other tensors in the place of a model's parameters, where autograd can see them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from quant.models.walk import Site


@contextmanager
def placed(model: nn.Module, values: Mapping[str, Tensor]) -> Generator[None]:
    """`model` with `values` in the place of the parameters of these names, in the parameters' dtypes."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            parameter = owner._parameters[leaf]
            assert parameter is not None
            kept.append((owner, leaf, parameter))
            owner._parameters[leaf] = None  # keeps its place; the tensor is found first
            owner.__dict__[leaf] = value.to(parameter.dtype)
        yield
    finally:
        for owner, leaf, parameter in kept:
            owner.__dict__.pop(leaf, None)
            owner._parameters[leaf] = parameter


def oriented(parameter: Tensor, site: Site) -> Tensor:
    """A site's weight as `[out, in]`, or `[experts, out, in]`."""
    return parameter.detach().transpose(-1, -2) if site.transposed else parameter.detach()


def as_parameter(site: Site, weight: Tensor) -> Tensor:
    """A site's matrix `[rows, in]` in the shape of its parameter."""
    weight = weight.unflatten(0, (site.experts, site.out)) if site.experts else weight
    return weight.transpose(-1, -2) if site.transposed else weight
