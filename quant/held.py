"""How a module holds packed weights: as buffers that are never cast, in the order that their device wants.

On a GPU a weight is in kernel order (`kernels/arranged.py`), elsewhere in the checkpoint's; a state dict always holds
the checkpoint's. A stack of experts in kernel order is arranged expert by expert, its buffers `[experts, ...]`,
so that each expert is a weight of its own that the kernels can read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from quant.kernels.arranged import checkpoint_order, has_order, is_arranged, kernel_order, ready, weight_of
from quant.kernels.available import runs_triton
from quant.kernels.layouts import LAYOUTS, Packed, shared_names
from quant.kernels.packed import concatenate
from quant.kernels.reference import Weight
from quant.kernels.spec import DTYPES, Spec
from quant.models.structure import owner_of


@dataclass(frozen=True, eq=False)
class Slot:
    """One packed weight of `shape` `[out, in]` in a module: the spec's `tensors`, and `names`, those of their buffers.
    `experts`: matrices that lie in it one after another, 0 for a matrix alone."""

    spec: Spec
    shape: tuple[int, int]
    experts: int
    names: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def arranged(self) -> bool:
        """Whether it is in kernel order."""
        return is_arranged(self.tensors)

    def matrix(self, expert: int = 0) -> Weight:
        """The weight as it is held; one expert's if it is a stack in kernel order."""
        if not self.arranged:
            return LAYOUTS[self.spec.layout].from_tensors(self.spec, self.shape, self.tensors)
        return weight_of(self.spec, self._part, self._tensors(expert))

    @property
    def packed(self) -> Packed:
        """The weight in the checkpoint's order."""
        if not self.arranged:
            return LAYOUTS[self.spec.layout].from_tensors(self.spec, self.shape, self.tensors)
        parts = [checkpoint_order(self.spec, self._part, self._tensors(e)) for e in range(max(1, self.experts))]
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def settled(self) -> Slot:
        """In the order that its device wants."""
        weight = self.tensors["weight"]
        if weight.device.type == "meta" or self.arranged == (has_order(self.spec) and runs_triton(weight)):
            return self
        packed, rows = self.packed, self._part[0]
        if self.arranged:
            return replace(self, tensors=packed.tensors())
        ready(weight.device)
        parts = [kernel_order(packed, start, start + rows) for start in range(0, self.shape[0], rows)]
        stacked = {name: torch.stack([part[name] for part in parts]) for name in self.names if self._each(name)}
        return replace(self, tensors={**parts[0], **stacked})

    @property
    def _part(self) -> tuple[int, int]:
        """The shape of one expert, or of the matrix."""
        return self.shape[0] // max(1, self.experts), self.shape[1]

    def _each(self, name: str) -> bool:
        """Whether a tensor in kernel order is stacked, one for each expert."""
        return self.experts > 0 and name not in shared_names(self.spec)

    def _tensors(self, expert: int) -> dict[str, Tensor]:
        return {name: part[expert] if self._each(name) else part for name, part in self.tensors.items()}


class Holder(nn.Module):
    """A module of packed weights; see the file."""

    def slots(self) -> list[Slot]:
        raise NotImplementedError

    def slot(self, spec: Spec, shape: tuple[int, int], experts: int, prefix: str) -> Slot:
        names = names_of(spec, shape, prefix)
        return Slot(spec, shape, experts, names, {key: self.get_buffer(name) for key, name in names.items()})

    def settle(self) -> None:
        """Puts each weight into the order that its device wants."""
        for slot in self.slots():
            self._put(slot, slot.settled().tensors)

    def _put(self, slot: Slot, tensors: dict[str, Tensor]) -> None:
        self._buffers.update({slot.names[key]: tensor for key, tensor in tensors.items()})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for slot in self.slots():
            if slot.arranged:
                destination |= {prefix + slot.names[key]: part for key, part in slot.packed.tensors().items()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for slot in self.slots():
            if slot.arranged:
                self._put(slot, slot.packed.tensors())
        super()._load_from_state_dict(*args, **kwargs)
        self.settle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {n: _moved(self.get_buffer(n), fn) for slot in self.slots() for n in slot.names.values()}
        super()._apply(fn, recurse)
        self._buffers.update(kept)
        self.settle()
        return self


class Mixed(Holder):
    """A holder that is mixed in front of the class of a module that keeps its own code."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle, which finds no class by name that was made at run time: by those that it was made from."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _unfilled, type(self).__bases__, *state


@cache
def mixed(front: type[Mixed], kind: type[nn.Module]) -> type[Mixed]:
    return type(f"Packed{kind.__name__}", (front, kind), {"__module__": kind.__module__})


def _unfilled(front: type[Mixed], kind: type[nn.Module]) -> Mixed:
    return mixed(front, kind).__new__(mixed(front, kind))


def _moved(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """A buffer moved to where `fn` moves tensors, but never cast: packed tensors are not numbers to round."""
    device = fn(buffer.new_empty(0)).device
    return torch.empty_like(buffer, device=device) if buffer.device.type == "meta" else buffer.to(device)


def holds(model: nn.Module, name: str) -> bool:
    """Whether a tensor of a model is one of a packed weight, which is never cast."""
    owner, leaf = owner_of(model, name)
    return isinstance(owner, Holder) and leaf in owner._buffers


def names_of(spec: Spec, shape: tuple[int, int], prefix: str) -> dict[str, str]:
    """The buffer of each tensor of a weight: by its own name, or that of the parameter `prefix` whose place it took."""
    tensors = spec.tensors(shape)
    return {key: key if not prefix else prefix if key == "weight" else f"{prefix}_{key}" for key in tensors}


def register(module: nn.Module, spec: Spec, shape: tuple[int, int], prefix: str, device: Any = None) -> None:
    """Adds the buffers of a weight, still to be filled."""
    for key, name in names_of(spec, shape, prefix).items():
        tensor = spec.tensors(shape)[key]
        module.register_buffer(name, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=device))
