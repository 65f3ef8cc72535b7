"""What every spec is: a promise about storage, exact to the byte.

A spec says how one weight matrix `[out, in]` will lie on disk: which tensors, of which dtype and shape, and so how many
bits each weight costs with *everything* counted. The specs themselves are in `spec.py`, or beside their layout.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "uint8": torch.uint8}


class SpecError(ValueError):
    """A spec that cannot exist, with the sentence that says why."""


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor: `dtype` by its torch name, `shape` in elements."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Spec:
    """Base of all specs. `layout` names the `Packed` class that stores it (see `kernels/layouts.py`)."""

    layout: ClassVar[str]

    @property
    def core(self) -> Spec:
        """The spec of the codes themselves, inside any wrappers."""
        return self

    @property
    def unit(self) -> int:
        """Rows that lie together: only multiples of it can be cut out or stacked."""
        return 1

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Every tensor stored for a weight of this `[out, in]` shape; `weight` is always the first."""
        raise NotImplementedError

    def chosen(self, shape: tuple[int, int]) -> Spec:
        """The spec with what it left to be chosen for a weight of this shape. Raises `SpecError` if nothing fits."""
        return self

    def nbytes(self, shape: tuple[int, int]) -> int:
        return sum(t.nbytes for t in self.tensors(shape).values())

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return 8 * self.nbytes(shape) / math.prod(shape)

    def to_dict(self) -> dict[str, Any]:
        return {"layout": self.layout, **asdict(self)}


@dataclass(frozen=True)
class Around(Spec):
    """A spec around another one, `base`, whose tensors are stored first."""

    base: Spec

    @property
    def core(self) -> Spec:
        return self.base.core

    @property
    def unit(self) -> int:
        return self.base.unit

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "base": self.base.to_dict()}


def check_whole(spec: Spec, what: str, **limits: tuple[int, int]) -> None:
    """Raises `SpecError` unless these fields are whole numbers within their limits. `what`: "a trellis takes"."""
    for name, (least, most) in limits.items():
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise SpecError(f"{name} is {value!r}; {what} a whole number from {least} to {most}")


def check_number(spec: Spec, what: str, **most: float) -> None:
    """Raises `SpecError` unless these fields are numbers above 0, at most so large."""
    for name, high in most.items():
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
            raise SpecError(f"{name} is {value!r}; {what} a number above 0, at most {high}")
