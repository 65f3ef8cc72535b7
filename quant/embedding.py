"""Packed embeddings and the heads that are tied to them.

A `PackedEmbedding` keeps the class and the code of the embedding in whose place it stands (Gemma's scales what it looks
up): it hands that code the rows of the tokens it is called with, and no others are unpacked. A head of the same numbers
is a `PackedHead`, which multiplies by the embedding's tensors and has none of its own; any other is a `PackedLinear`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any, Self

import torch
from torch import Tensor, nn

from quant.errors import SettingsError
from quant.held import Mixed, Slot, mixed, register
from quant.kernels.dispatch import matmul
from quant.kernels.layouts import PackedUniform
from quant.kernels.order import Arranged
from quant.kernels.reference import Weight
from quant.kernels.spec import Uniform
from quant.models.structure import end_of, name_of, owner_of
from quant.models.walk import Site


class PackedEmbedding(Mixed):
    """Token numbers `[...]` -> rows of the packed `[vocabulary, width]` in `dtype`, as its class makes of them."""

    num_embeddings: int
    embedding_dim: int
    spec: Uniform
    dtype: torch.dtype

    def slots(self) -> list[Slot]:
        return [self.slot(self.spec, (self.num_embeddings, self.embedding_dim), 0, "")]

    @property
    def operand(self) -> Weight:
        """The weight as it is held."""
        return self.slots()[0].matrix()

    def forward(self, input: Tensor) -> Tensor:
        operand = self.operand
        assert isinstance(operand, PackedUniform | Arranged)
        rows = operand.rows(input.flatten()).dequantize(self.dtype)
        kind = type(self).__bases__[1]
        if kind is nn.Embedding:
            return rows.view(*input.shape, -1)
        there = object.__new__(type(self))  # this module, with those rows for a weight, of which none is padding
        there.__dict__.update(self.__dict__, weight=rows, padding_idx=None)
        return kind.forward(there, torch.arange(input.numel(), device=input.device).view(input.shape))

    def unpack(self, dtype: torch.dtype) -> None:
        """Becomes the float module that it was."""
        weight = self.slots()[0].packed.dequantize(dtype)
        for name in self.slots()[0].names.values():
            del self._buffers[name]
        self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        self.__class__ = type(self).__bases__[1]
        del self.spec, self.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class PackedHead(nn.Module):
    """`x [..., width] -> x @ W^T [..., vocabulary]`, with W that of `embedding`, which is no submodule of it."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)

    @property
    def embedding(self) -> PackedEmbedding:
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.embedding.operand
        return matmul(x.to(weight.device), weight)

    def unpack(self, dtype: torch.dtype) -> nn.Module:
        """A float head that shares the parameter of its embedding."""
        module: Any = self.embedding
        if isinstance(module, PackedEmbedding):
            module.unpack(dtype)
        weight: Any = module._parameters["weight"]
        with torch.device("meta"):
            head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        head.weight = weight
        return head

    def extra_repr(self) -> str:
        return f"{self.embedding.embedding_dim} -> {self.embedding.num_embeddings}, the embedding's weight"


def resized(embedding: Any, count: int | None = None, multiple: int | None = None, *_: Any, **named: Any) -> Any:
    """In the place of transformers' `resize_token_embeddings`, where one of a model's ends is packed: the embedding, if
    its rows are as many as are asked for already. Raises `SettingsError` otherwise."""
    have, multiple = embedding.num_embeddings, named.get("pad_to_multiple_of", multiple) or 1
    wanted = math.ceil((named.get("new_num_tokens", count) or have) / multiple) * multiple
    if wanted != have:
        raise SettingsError(
            f"a packed embedding or head keeps its {have} rows, and {wanted} are wanted: resize the float model and "
            "quantize that, without --embedding-bits if it is to be resized again; or load with dequantize=True"
        )
    return embedding


def put_embedding(model: Any, site: Site, spec: Uniform) -> None:
    """Turns an embedding of a float model into a packed one, with tensors still to be filled, and for `both` ends the
    head that is tied to it."""
    module: Any = model.get_submodule(site.name)
    head = end_of(model, "head") if site.end == "both" else None
    parameter = module._parameters.pop("weight")
    module.__class__ = mixed(PackedEmbedding, type(module))
    module.spec, module.dtype = spec, parameter.dtype
    register(module, spec, site.shape, "", parameter.device)
    if head is not None:
        name = name_of(model, head)
        setattr(*owner_of(model, name), PackedHead(module).train(head.training))
        untie(model, [f"{name}.weight"])


def untie(model: Any, names: Collection[str]) -> None:
    """transformers is not to tie weights of these names: they are tied as they are, or have numbers of their own."""
    keep = lambda keys: {to: v for to, v in (keys or {}).items() if not any(re.match(to, n) for n in names)}  # noqa: E731
    model.all_tied_weights_keys = keep(model.all_tied_weights_keys)
    model._tied_weights_keys = keep(model._tied_weights_keys)
