"""What every packed weight is: a spec, a shape, stored tensors, and the matrix that they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from quant.kernels.promise import DTYPES, Around, Spec


class LayoutError(ValueError):
    """Tensors that are not what their spec promises; names the tensor, what came and what was expected."""


@dataclass(frozen=True, eq=False)
class Packed(ABC):
    """A packed weight of `shape` `[out, in]`, stored as `spec` promises."""

    layout: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()  # tensors that do not grow with the rows

    spec: Spec
    shape: tuple[int, int]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, named, typed and shaped exactly as `spec.tensors(shape)`."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows `start` to `stop` as a plain matrix `[stop - start, in]`."""

    @abstractmethod
    def validate(self) -> None:
        """Raises `LayoutError` unless every value is one that the layout allows."""

    @classmethod
    def from_tensors(cls, spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`. Raises `LayoutError` on another layout's spec, and on a missing, extra or misshapen
        tensor."""
        if spec.layout != cls.layout:
            kind = cls.__name__.removeprefix("Packed")
            raise LayoutError(f"layout {cls.layout!r} stores a {kind} spec; {type(spec).__name__} came")
        check_tensors(spec, shape, tensors)
        return cls._made(spec.chosen(shape), (shape[0], shape[1]), tensors)

    @classmethod
    def _made(cls, spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        """From all the tensors that `spec` promises, each a field of its name."""
        return cls(spec, shape, **tensors)  # pyright: ignore[reportCallIssue]  of the layout's own fields

    def to(self, device: torch.device | str) -> Self:
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return type(self).from_tensors(self.spec, self.shape, moved)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device


@dataclass(frozen=True, eq=False)
class PackedAround(Packed):
    """A packed weight `base` with something around it, whose tensors are stored after those of the base."""

    base: Packed

    @classmethod
    def _made(cls, spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Self:
        from quant.kernels.layouts import LAYOUTS  # it needs this module

        assert isinstance(spec, Around)
        inner = {name: tensors[name] for name in spec.base.tensors(shape)}
        base = LAYOUTS[spec.base.layout].from_tensors(spec.base, shape, inner)
        own = {name: tensor for name, tensor in tensors.items() if name not in inner}
        return cls(spec, shape, base, **own)  # pyright: ignore[reportCallIssue]  of the layout's own fields


def rows_at_once(device: torch.device, columns: int) -> int:
    """Rows to dequantize together. A million weights stay in a CPU's cache (whole matrices take nine times as long per
    weight, most of it page faults); an accelerator wants fewer, larger steps."""
    return max(1, (1 << 20 if device.type == "cpu" else 1 << 26) // max(1, columns))


def check_tensors(spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    """Raises `LayoutError` unless names, dtypes and shapes are exactly what `spec` promises for a weight of `shape`."""
    expected = spec.tensors(shape)
    for name in tensors:
        if name not in expected:
            raise LayoutError(
                f"{name}: a tensor that layout {spec.layout!r} does not have; it has {', '.join(expected)}"
            )
    for name, promise in expected.items():
        if name not in tensors:
            raise LayoutError(f"{name}: missing; {promise.dtype} {list(promise.shape)} is expected")
        came = tensors[name]
        if came.dtype != DTYPES[promise.dtype] or tuple(came.shape) != promise.shape:
            found = f"{str(came.dtype).removeprefix('torch.')} {list(came.shape)}"
            raise LayoutError(f"{name}: {found} came; {promise.dtype} {list(promise.shape)} is expected")


def concatenate(parts: Sequence[Packed]) -> Packed:
    """The parts stacked along the rows. They share spec, columns and `shared` tensors, or `LayoutError` says what
    differs."""
    from quant.kernels.layouts import shared_names  # it needs this module

    first, stored, shared = parts[0], [part.tensors() for part in parts], shared_names(parts[0].spec)
    for part in parts[:-1]:
        if part.shape[0] % part.spec.unit:
            raise LayoutError(
                f"cannot stack on {part.shape[0]} rows of {part.spec}; a multiple of {part.spec.unit} could"
            )
    for part, tensors in zip(parts, stored, strict=True):
        if part.spec != first.spec or part.shape[1] != first.shape[1]:
            raise LayoutError(
                f"cannot stack {part.spec} of {part.shape[1]} columns on {first.spec} of {first.shape[1]}; "
                "parts must share spec and columns"
            )
        if any(not torch.equal(tensors[name], stored[0][name]) for name in shared if name in tensors):
            raise LayoutError(f"cannot stack parts that differ in {' or '.join(shared)}")
    joined = {
        name: tensor if name in shared else torch.cat([tensors[name] for tensors in stored])
        for name, tensor in stored[0].items()
    }
    return type(first).from_tensors(first.spec, (sum(part.shape[0] for part in parts), first.shape[1]), joined)
