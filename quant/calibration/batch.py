"""A batch: keyword arguments of a model's forward, most of them tensors; and batches that mix timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, overload

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


def timestep(batch: Mapping[str, Any]) -> float:
    """The timestep of a batch, its first row's; 0 where its model has none."""
    time = batch.get("timestep")
    return 0.0 if time is None else float(torch.as_tensor(time).flatten()[0])


class Mixed(Sequence[Batch]):
    """For training steps, whose gradient should speak for the whole way from noise to image: a calibration batch of a
    diffusion transformer holds one timestep, here each batch gets some of every part of the way. Nothing is copied
    until a batch is asked for, since text embeddings are large.

    `batches`, in the order of their timesteps, dealt out as batches of at most `size` rows. Where their shapes do
    not allow it (pictures of different sizes, a timestep that is one number for the whole batch) they stay as they are.

    `times[n]`: int64 `[rows]`, the number of each row's timestep in batch `n`.
    """

    def __init__(self, batches: Sequence[Batch], size: int) -> None:
        self.batches = batches
        counts = [len(batch["hidden_states"]) for batch in batches]
        times = [
            torch.as_tensor(batch["timestep"]).flatten().cpu().double().expand(count)
            for batch, count in zip(batches, counts, strict=True)
        ]
        known = torch.cat(times).unique()
        numbers = [torch.searchsorted(known, time) for time in times]
        alike = all(shapes(batch) == shapes(batches[0]) and batch["timestep"].dim() for batch in batches)
        places = [(number, row) for number, count in enumerate(counts) for row in range(count)]
        turns = -(-len(places) // size)
        self.places = [places[turn::turns] for turn in range(turns)] if alike else _apart(counts)
        self.times = [torch.stack([numbers[number][row] for number, row in some]) for some in self.places]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        wanted: dict[int, list[int]] = {}
        for number, row in self.places[index]:
            wanted.setdefault(number, []).append(row)
        return reduce(joined, (rows(self.batches[n], torch.tensor(some)) for n, some in wanted.items()))


def _apart(counts: Sequence[int]) -> list[list[tuple[int, int]]]:
    return [[(number, row) for row in range(count)] for number, count in enumerate(counts)]
