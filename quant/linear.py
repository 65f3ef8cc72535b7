"""The modules that run packed weights, and the names their tensors are stored under.

`PackedLinear` stands where a Linear or Conv1D stood and keeps the packed tensors as buffers; its forward is one call
into `kernels.dispatch`. On a GPU the buffers are in kernel order, elsewhere in the checkpoint's; its state dict always
holds the checkpoint's. Expert stacks keep their module and its code: `pack_experts` gives the module a subclass whose
forward sees, in place of each 3-D parameter, a view that dequantizes the one expert asked for, so any architecture's
routing runs unchanged and only the experts that are hit are ever expanded.

Stored names: a site `a.b.q_proj` stores `a.b.q_proj.weight`, `.scales`, `.zeros`; a stack `a.experts.gate_up_proj`
stores `a.experts.gate_up_proj`, `_scales`, `_zeros`. The codes always take the float parameter's own name with a shape
of one dimension, so transformers without this package stops with a size mismatch and never runs on random weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.kernels.available import runs_triton
from quant.kernels.dispatch import matmul
from quant.kernels.layouts import LAYOUTS, Packed, PackedUniform
from quant.kernels.order import Arranged, arrange, plain
from quant.kernels.spec import DTYPES, Spec, Uniform
from quant.models.walk import Site


def stored_name(site: Site, tensor: str) -> str:
    """The checkpoint's name for one packed tensor of a site."""
    if site.kind == "linear":
        return f"{site.name}.{tensor}"
    return site.name if tensor == "weight" else f"{site.name}_{tensor}"


class PackedLinear(nn.Module):
    """`x [..., in] -> x @ W^T + bias [..., out]` with W packed. The tensors keep their dtypes under `.to(dtype)`."""

    def __init__(
        self, spec: Spec, out_features: int, in_features: int, *, bias: bool, transposed: bool = False
    ) -> None:
        super().__init__()
        self.spec = spec
        self.out_features = out_features
        self.in_features = in_features
        self.transposed = transposed
        for name, tensor in spec.tensors((out_features, in_features)).items():
            self.register_buffer(name, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @property
    def operand(self) -> Packed | Arranged:
        """The weight as it is held."""
        shape = (self.out_features, self.in_features)
        tensors = {name: self.get_buffer(name) for name in self.spec.tensors(shape)}
        if tensors["weight"].dtype == torch.int32 and isinstance(self.spec, Uniform):
            return Arranged(self.spec, shape, tensors["weight"], tensors["scales"], tensors.get("zeros"))
        return LAYOUTS[self.spec.layout].from_tensors(self.spec, shape, tensors)

    @property
    def packed(self) -> Packed:
        """The weight in the checkpoint's order."""
        held = self.operand
        return plain(held) if isinstance(held, Arranged) else held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(x, self.operand, self.bias)

    def settle(self) -> None:
        """Puts the weight into the order that its device wants."""
        held = self.operand if self.get_buffer("weight").device.type != "meta" else None
        if isinstance(held, PackedUniform) and runs_triton(held.weight):
            self._hold(arrange(held))
        elif isinstance(held, Arranged) and not runs_triton(held.weight):
            self._hold(plain(held))

    def _hold(self, weight: PackedUniform | Arranged) -> None:
        for name in self.spec.tensors(weight.shape):
            self._buffers[name] = getattr(weight, name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.operand, Arranged):
            destination |= {prefix + name: tensor for name, tensor in self.packed.tensors().items()}

    def unpack(self, dtype: torch.dtype) -> nn.Module:
        """The float module it stands for: a Linear, or a Conv1D where the original was one."""
        weight = self.packed.dequantize(dtype)
        with torch.device("meta"):
            module = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        module.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return module

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        kept = keep_dtypes(self, list(self._buffers), fn)
        super()._apply(fn, recurse)
        self._buffers.update(kept)
        self.settle()
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec}, bias={self.bias is not None}"


def keep_dtypes(module: nn.Module, names: list[str], fn: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """The named buffers moved to where `fn` moves tensors, but never cast: packed tensors are not numbers to round."""
    moved: dict[str, Any] = {}
    for name in names:
        buffer = module._buffers[name]
        if buffer is not None:
            device = fn(buffer.new_empty(0)).device
            empty = buffer.device.type == "meta"
            moved[name] = torch.empty_like(buffer, device=device) if empty else buffer.to(device)
    return moved


class PackedStack:
    """What an experts' forward sees in place of a 3-D parameter: `stack[i]` is expert i's float matrix."""

    def __init__(self, packed: Packed, experts: int, transposed: bool, dtype: torch.dtype) -> None:
        self.packed, self.experts, self.transposed, self.dtype = packed, experts, transposed, dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """As the float parameter's."""
        rows, columns = self.packed.shape[0] // self.experts, self.packed.shape[1]
        return (self.experts, columns, rows) if self.transposed else (self.experts, rows, columns)

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows = self.packed.shape[0] // self.experts
        start = int(index) * rows
        weight = self.packed.dequantize(self.dtype, start, start + rows)
        return weight.T if self.transposed else weight

    def dequantize(self) -> torch.Tensor:
        weight = self.packed.dequantize(self.dtype).unflatten(0, (self.experts, -1))
        return weight.transpose(1, 2) if self.transposed else weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """For code that multiplies by the whole stack at once (`torch.bmm`)."""
        whole = [arg.dequantize() if isinstance(arg, cls) else arg for arg in args]
        return func(*whole, **{key: v.dequantize() if isinstance(v, cls) else v for key, v in (kwargs or {}).items()})


class _View:
    """The experts module as its own forward should see it: stacks expand on demand, all else is the module's."""

    def __init__(self, module: Any, stacks: Mapping[str, PackedStack]) -> None:
        self.__dict__.update(stacks)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class PackedExperts:
    """Mixed in front of an experts class by `pack_experts`. `bitwright_stacks`: spec and site of a packed parameter."""

    bitwright_stacks: dict[str, tuple[Spec, Site]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dtype = next((arg.dtype for arg in args if isinstance(arg, torch.Tensor)), torch.float32)
        stacks = {
            name: PackedStack(packed_stack(self, name), site.experts, site.transposed, dtype)
            for name, (_, site) in self.bitwright_stacks.items()
        }
        original = inspect.unwrap(super().forward)  # pyright: ignore[reportAttributeAccessIssue]
        return getattr(original, "__func__", original)(_View(self, stacks), *args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        names = [
            f"{name}{suffix}"
            for name, (spec, site) in self.bitwright_stacks.items()
            for suffix in _suffixes(spec, site)
        ]
        kept = keep_dtypes(self, names, fn)  # pyright: ignore[reportArgumentType]
        super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        self._buffers.update(kept)  # pyright: ignore[reportAttributeAccessIssue]
        return self


def packed_stack(module: Any, name: str) -> Packed:
    spec, site = module.bitwright_stacks[name]
    tensors = {key: getattr(module, name + ("" if key == "weight" else f"_{key}")) for key in spec.tensors(site.shape)}
    return LAYOUTS[spec.layout].from_tensors(spec, site.shape, tensors)


def _suffixes(spec: Spec, site: Site) -> list[str]:
    return ["" if key == "weight" else f"_{key}" for key in spec.tensors(site.shape)]


def pack_experts(module: nn.Module, leaf: str, spec: Spec, site: Site) -> None:
    """Turns the 3-D parameter `leaf` of an experts module into packed buffers, its class into one that reads them."""
    if not isinstance(module, PackedExperts):
        kind = type(module)
        module.__class__ = type(f"Packed{kind.__name__}", (PackedExperts, kind), {"__module__": kind.__module__})
        module.bitwright_stacks = {}  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    device = module._parameters[leaf].device  # pyright: ignore[reportOptionalMemberAccess]
    del module._parameters[leaf]
    for key, tensor in spec.tensors(site.shape).items():
        suffix = "" if key == "weight" else f"_{key}"
        module.register_buffer(leaf + suffix, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=device))
    stacks: Any = module.bitwright_stacks
    stacks[leaf] = (spec, site)


def put_packed(model: nn.Module, site: Site, spec: Spec) -> None:
    """Replaces one site of a float model by its packed module, with tensors still to be filled."""
    path, _, leaf = site.name.rpartition(".")
    owner = model.get_submodule(path)
    if site.kind == "experts":
        pack_experts(owner, leaf, spec, site)
        return
    old = owner.get_submodule(leaf)
    parameter: torch.Tensor = old.weight  # pyright: ignore[reportAssignmentType]
    with torch.device(parameter.device):
        new = PackedLinear(spec, site.out, site.inputs, bias=site.bias, transposed=site.transposed)
    if new.bias is not None:
        new.bias.data = new.bias.data.to(parameter.dtype)
    setattr(owner, leaf, new.train(old.training))
