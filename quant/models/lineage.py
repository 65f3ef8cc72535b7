"""What becomes of the outputs of a block's linears, and so what some linears are for.

Routers choose experts. As many outputs as there are experts is not enough: a key projection may have as many by
accident. A router stands beside the experts, or its outputs reach a choice (`topk` and its like) with no other matrix
product on the way.

A diffusion transformer is conditioned through linears that read a row per sample, not per token: the timestep, the
label or a pooled text. If the output of one goes into another such linear it is an embedder; if it goes to the tokens
(adaLN's scales, shifts and gates) it is a modulation. An error in a modulation moves every token of a sample the same
way, so both want more care. Attention is told by its product of queries and keys: where these are of different lengths,
tokens look at a text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from quant.models.structure import expert_counts

CHOICES = {
    kind
    for name in ("topk", "argmax", "sort", "argsort", "max", "multinomial")
    for kind in (getattr(torch, name), getattr(torch.Tensor, name))
}


class Lineage:
    """Follows, through one block at a time, what is made from the outputs of some linears with no other product on the
    way."""

    def __init__(self) -> None:
        self.made_from: dict[int, set[str]] = {}  # id of a tensor -> the linears it came from
        self.alive: list[torch.Tensor] = []  # what has an id here is kept, so that no other tensor takes it

    def clear(self) -> None:
        self.made_from.clear()
        self.alive.clear()

    def mark(self, x: torch.Tensor, names: set[str]) -> None:
        self.made_from[id(x)] = names
        self.alive.append(x)

    def follow(self, inputs: Any, result: Any) -> set[str]:
        """The linears that the tensors of `inputs` came from, as from now on do those of `result`."""
        if not self.made_from:
            return set()
        names = set[str]().union(*(self.made_from.get(id(x), ()) for x in _tensors(inputs)))
        for x in _tensors(result) if names else ():
            self.mark(x, names)
        return names


def _tensors(nest: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(nest) if isinstance(x, torch.Tensor)]


class Routers(Lineage):
    """Of linears with as many outputs as there are experts, those that choose among them: `found`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.experts = expert_counts(model)
        self.counts = set[int]().union(*self.experts.values())
        self.found: set[str] = set()

    def product(self, weight: str, outputs: torch.Tensor) -> None:
        """A linear gave these outputs."""
        count = outputs.shape[-1]
        if count in self.counts:
            linear = weight.rpartition(".")[0]
            if count in self.experts.get(linear.rpartition(".")[0], ()):
                self.found.add(weight)
            self.mark(outputs, {weight})

    def other(self, func: Any, inputs: Any, result: Any) -> None:
        """Anything that is no product with a weight was called."""
        names = self.follow(inputs, result)
        if func in CHOICES:
            self.found |= names


class Conditioning(Lineage):
    """Of linears that read a row per sample, `modulations` and `embedders`. `rows`: samples in the batch; 0: there are
    none to be found. `attends`: of the linear called last before an attention, whether that is to a text."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.seen: set[str] = set()
        self.embedders: set[str] = set()
        self.attends: dict[str, bool] = {}
        self.last = ""

    @property
    def modulations(self) -> set[str]:
        return self.seen - self.embedders

    def product(self, weight: str, x: torch.Tensor, outputs: torch.Tensor) -> None:
        """A linear gave these outputs."""
        self.last = weight
        if self.rows and x.numel() == self.rows * x.shape[-1]:
            self.embedders |= self.made_from.get(id(x), set())
            self.seen.add(weight)
            self.mark(outputs, {weight})

    def other(self, func: Any, inputs: Any, result: Any) -> None:
        """Anything that is no product with a weight was called."""
        if func is torch.nn.functional.scaled_dot_product_attention and self.last:
            query, key = _tensors(inputs)[:2]
            self.attends[self.last] = query.shape[-2] != key.shape[-2]
        self.follow(inputs, result)
