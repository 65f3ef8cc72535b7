"""A batch: keyword arguments of a model's forward, most of them tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

Batch = dict[str, Any]


def moved(batch: Batch, device: str) -> Batch:
    return pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), batch)
