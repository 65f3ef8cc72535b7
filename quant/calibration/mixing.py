"""Batches that mix timesteps: for training steps, whose gradient should speak for the whole way from noise to image.

A calibration batch of a diffusion transformer holds one timestep, and so would a training step that takes one. Here the
rows of all batches are dealt out anew: each batch gets some of every part of the way. Nothing is copied until a batch
is asked for, since text embeddings are large.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import overload

import torch

from quant.calibration.batch import Batch, joined, rows, shapes


class Mixed(Sequence[Batch]):
    """`batches`, in the order of their timesteps, dealt out as batches of at most `size` rows. Where their shapes do
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
