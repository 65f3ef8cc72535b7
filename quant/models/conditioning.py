"""Finds what a diffusion transformer is conditioned through, by how many rows each linear reads.

A token linear reads a row per token; one that reads a row per sample sees the timestep, the label or a pooled text. If
its output goes into another such linear it is an embedder; if it goes to the tokens (adaLN's scales, shifts and gates)
it is a modulation. An error in a modulation moves every token of a sample the same way, so both want more care.

Attention is told by its product of queries and keys: where these are of different lengths, tokens look at a text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


class Conditioning:
    """Follows, through one block at a time, what is made from the outputs of such linears. `rows`: samples in the
    batch; 0: there are none to be found."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.seen: set[str] = set()
        self.embedders: set[str] = set()
        self.made_from: dict[int, set[str]] = {}  # id of a tensor -> the linears it came from
        self.attends: dict[str, bool] = {}  # the linear called last before an attention -> whether that is to a text
        self.last = ""
        self.alive: list[torch.Tensor] = []  # what has an id here is kept, so that no other tensor takes it

    @property
    def modulations(self) -> set[str]:
        return self.seen - self.embedders

    def clear(self) -> None:
        self.made_from.clear()
        self.alive.clear()

    def product(self, weight: str, x: torch.Tensor, outputs: torch.Tensor) -> None:
        """A linear gave these outputs."""
        self.last = weight
        if self.rows and x.numel() == self.rows * x.shape[-1]:
            self.embedders |= self.made_from.get(id(x), set())
            self.seen.add(weight)
            self._mark(outputs, {weight})

    def other(self, func: Any, inputs: Any, result: Any) -> None:
        """Anything that is no product with a weight was called."""
        if func is torch.nn.functional.scaled_dot_product_attention and self.last:
            query, key = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)][:2]
            self.attends[self.last] = query.shape[-2] != key.shape[-2]
        if not self.made_from:
            return
        tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
        names = set[str]().union(*(self.made_from.get(id(x), ()) for x in tensors))
        for x in pytree.tree_leaves(result) if names else ():
            if isinstance(x, torch.Tensor):
                self._mark(x, names)

    def _mark(self, x: torch.Tensor, names: set[str]) -> None:
        self.made_from[id(x)] = names
        self.alive.append(x)
