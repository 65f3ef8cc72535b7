"""A batch: keyword arguments of a model's forward, most of them tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Batch = dict[str, Any]
UNBATCHED = ("img_ids", "txt_ids", "image_rotary_emb")
"""Arguments of diffusion transformers that are the same for every row; so are those of another number of rows."""


def moved(batch: Batch, device: str) -> Batch:
    return pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), batch)


def rows(given: Mapping[str, Any], which: Tensor) -> Batch:
    """Some samples of a batch."""
    count = len(given["hidden_states"])

    def cut(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(name, part) for name, part in value.items()}  # pyright: ignore
        if isinstance(value, list) and len(value) == count:  # pyright: ignore[reportUnknownArgumentType]
            return [value[n] for n in which.tolist()]
        return value[which] if _batched(key, value, count) else value

    return {key: cut(key, value) for key, value in given.items()}


def joined(first: Batch, second: Batch) -> Batch:
    """Two batches as one: the guided and the unguided half run together."""

    count = len(first["hidden_states"])

    def both(key: str, a: Any, b: Any) -> Any:
        if isinstance(a, dict):
            return {name: both(name, a[name], b[name]) for name in a}  # pyright: ignore
        if isinstance(a, list):
            return a + b
        return torch.cat([a, b]) if _batched(key, a, count) else a

    return {key: both(key, first[key], second[key]) for key in first}


def _batched(key: str, value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and key not in UNBATCHED and value.shape[:1] == (count,)


def shapes(batch: Batch) -> dict[str, Any]:
    """Of a sample's tensors: what batches must share to be joined."""
    return {key: value.shape[1:] if isinstance(value, Tensor) else None for key, value in batch.items()}
