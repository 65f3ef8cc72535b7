"""Expert stacks: the module keeps its class's code, and sees views that multiply by one packed expert at a time.

`pack_experts` gives the module a subclass whose forward finds, in place of each 3-D parameter, a `PackedStack`. Its
`stack[i]` is expert i's float matrix, or on a GPU a `PackedExpert`, which multiplies as `linear(x, stack[i])` or
`x @ stack[i]` through the dispatch table and becomes the float matrix for any other use. So any architecture's routing
runs unchanged, and only the experts that are hit are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quant.held import Mixed, Slot, mixed, register
from quant.kernels.dispatch import matmul
from quant.kernels.reference import Weight
from quant.kernels.spec import Spec
from quant.models.walk import Site

PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class _Expanding:
    """What torch functions and attributes expand to a float tensor."""

    def dequantize(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dequantize(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        expand = lambda value: value.dequantize() if isinstance(value, _Expanding) else value  # noqa: E731
        return func(*map(expand, args), **{key: expand(value) for key, value in (kwargs or {}).items()})


class PackedExpert(_Expanding):
    """One expert's matrix `[out, in]`, in kernel order; `[in, out]` if `transposed`."""

    def __init__(self, weight: Weight, transposed: bool, dtype: torch.dtype) -> None:
        self.weight, self.transposed, self.dtype = weight, transposed, dtype

    def dequantize(self) -> Tensor:
        weight = self.weight.dequantize(self.dtype)
        return weight.T if self.transposed else weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, expert, bias = [*args, None, None, None][:3]
        if isinstance(x, Tensor) and isinstance(expert, cls):
            if func is linear and not expert.transposed:
                return matmul(x, expert.weight, (kwargs or {}).get("bias", bias))
            if func in PRODUCTS and expert.transposed:
                return matmul(x, expert.weight)
        return super().__torch_function__(func, types, args, kwargs)


class PackedStack(_Expanding):
    """What an experts' forward sees in place of a 3-D parameter; code that multiplies by all of it expands all."""

    def __init__(self, slot: Slot, transposed: bool, dtype: torch.dtype) -> None:
        self.slot, self.transposed, self.dtype = slot, transposed, dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """As the float parameter's."""
        rows, columns = self.slot.shape[0] // self.slot.experts, self.slot.shape[1]
        return (self.slot.experts, columns, rows) if self.transposed else (self.slot.experts, rows, columns)

    def __getitem__(self, index: Any) -> Any:
        weight = self.slot.matrix(int(index))
        if self.slot.arranged:
            return PackedExpert(weight, self.transposed, self.dtype)
        rows = self.slot.shape[0] // self.slot.experts
        part = weight.dequantize(self.dtype, int(index) * rows, (int(index) + 1) * rows)
        return part.T if self.transposed else part

    def dequantize(self) -> Tensor:
        weight = self.slot.packed.dequantize(self.dtype).unflatten(0, (self.slot.experts, -1))
        return weight.transpose(1, 2) if self.transposed else weight


class _View:
    """The experts module as its own forward should see it: stacks expand on demand, all else is the module's."""

    def __init__(self, module: Any, stacks: Mapping[str, PackedStack]) -> None:
        self.__dict__.update(stacks)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        found, module = getattr(self.__dict__["_module"], name), self.__dict__["_module"]
        if not inspect.ismethod(found) or found.__self__ is not module or "__class__" in found.__code__.co_freevars:
            return found
        return MethodType(found.__func__, self)  # a method shall see the stacks too; one that calls super() cannot

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_module"], name, value)


class PackedExperts(Mixed):
    """Mixed in front of an experts class by `pack_experts`. `bitwright_stacks`: spec and site of a packed parameter."""

    bitwright_stacks: dict[str, tuple[Spec, Site]]

    def slots(self) -> list[Slot]:
        return [self.slot(spec, site.shape, site.experts, name) for name, (spec, site) in self.bitwright_stacks.items()]

    @torch.compiler.disable  # experts that are hit are data, which no graph holds: 20 pieces, compiled for 50 s
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype = next((arg.dtype for arg in args if isinstance(arg, Tensor)), torch.float32)
        stacks = {
            name: PackedStack(slot, site.transposed, dtype)
            for slot, (name, (_, site)) in zip(self.slots(), self.bitwright_stacks.items(), strict=True)
        }
        original = inspect.unwrap(super().forward)
        return getattr(original, "__func__", original)(_View(self, stacks), *args, **kwargs)

    def unpack(self, dtype: torch.dtype) -> None:
        """Becomes the float module that it was."""
        for slot, (leaf, (_, site)) in zip(self.slots(), self.bitwright_stacks.items(), strict=True):
            for name in slot.names.values():
                del self._buffers[name]
            weight = PackedStack(slot, site.transposed, dtype).dequantize().contiguous()
            self._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
        self.__class__ = type(self).__bases__[1]
        del self.bitwright_stacks


def pack_experts(module: nn.Module, leaf: str, spec: Spec, site: Site) -> None:
    """Turns the 3-D parameter `leaf` of an experts module into packed buffers, its class into one that reads them."""
    if not isinstance(module, PackedExperts):
        module.__class__ = mixed(PackedExperts, type(module))
        module.bitwright_stacks = {}  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    device = module._parameters.pop(leaf).device  # pyright: ignore[reportOptionalMemberAccess]
    register(module, spec, site.shape, leaf, device)
    stacks: Any = module.bitwright_stacks
    stacks[leaf] = (spec, site)
