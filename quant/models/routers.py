"""Finds the linears that choose experts, by where they stand and by what becomes of their outputs.

As many outputs as there are experts is not enough: a key projection may have as many by accident. A router stands
beside the experts, or its outputs reach a choice (`topk` and its like) with no other matrix product on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from quant.models.candidates import expert_counts

CHOICES = {
    kind
    for name in ("topk", "argmax", "sort", "argsort", "max", "multinomial")
    for kind in (getattr(torch, name), getattr(torch.Tensor, name))
}


class Routers:
    """Follows, through one block at a time, what is made from the outputs of linears of a router's size."""

    def __init__(self, model: nn.Module) -> None:
        self.experts = expert_counts(model)
        self.counts = set[int]().union(*self.experts.values())
        self.found: set[str] = set()
        self.made_from: dict[int, set[str]] = {}  # id of a tensor -> the linears it came from
        self.alive: list[torch.Tensor] = []  # what has an id here is kept, so that no other tensor takes it

    def clear(self) -> None:
        self.made_from.clear()
        self.alive.clear()

    def product(self, weight: str, outputs: torch.Tensor) -> None:
        """A linear gave these outputs."""
        count = outputs.shape[-1]
        if count in self.counts:
            linear = weight.rpartition(".")[0]
            if count in self.experts.get(linear.rpartition(".")[0], ()):
                self.found.add(weight)
            self._mark(outputs, {weight})

    def other(self, func: Any, inputs: Any, result: Any) -> None:
        """Anything that is no product was called."""
        if not self.made_from:
            return
        tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        names = set[str]().union(*(self.made_from.get(id(x), ()) for x in tensors))
        if names and func in CHOICES:
            self.found |= names
        for x in pytree.tree_leaves(result) if names else ():
            if isinstance(x, torch.Tensor):
                self._mark(x, names)

    def _mark(self, x: torch.Tensor, names: set[str]) -> None:
        self.made_from[id(x)] = names
        self.alive.append(x)
