"""Vectors and tables: the nearest entry, the nearest pair of entries, and k-means.

Every entry of a vector has a weight of its own, so the distance `sum w (x - c)^2` is, but for a constant, one product:
`[w, w x]` times `[c^2, -2 c]`. Nothing depends on the number of threads: sums over vectors run in their order, ties go
to the first entry, and the vectors that k-means starts from are drawn with a fixed seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 30  # of Lloyd's algorithm
MOST = 1 << 16  # vectors it sees, evenly taken
BEAM = 4  # first entries of which the best second one is looked for
AT_ONCE = 1 << 22  # distances


def nearest(x: Tensor, weight: Tensor, table: Tensor, count: int = 0) -> Tensor:
    """The index `[n]` of the nearest row of `table` `[k, v]` to each of `x` `[n, v]` under `weight` `[n, v]`, the first
    of equal ones; with `count` those of the `count` nearest, `[n, count]`."""
    entries, vectors = torch.cat([table.square(), -2 * table], 1).T, torch.cat([weight, weight * x], 1)
    found = list[Tensor]()
    for part in vectors.split(max(1, AT_ONCE // len(table))):
        distances = part @ entries
        found.append(distances.sort(dim=1, stable=True)[1][:, :count] if count else distances.argmin(1))
    return torch.cat(found)


def nearest_pair(x: Tensor, weight: Tensor, first: Tensor, second: Tensor, held: Tensor | None) -> Tensor:
    """Indices `[2, n]` of the pair of rows whose sum is nearest to `x` `[n, v]`, among those that begin with one of the
    `BEAM` nearest in `first`, or with the first of the pair `held` `[2, n]`."""
    starts = nearest(x, weight, first, BEAM)
    starts = starts if held is None else torch.cat([held[:1].T, starts], 1)
    best, least = starts.new_zeros((2, len(x))), torch.full_like(x[:, 0], torch.inf)
    for start in starts.T:
        left = x - first[start]
        end = nearest(left, weight, second)
        loss = (left - second[end]).square().mul_(weight).sum(1)
        best = torch.where(loss < least, torch.stack([start, end]), best)
        least = torch.minimum(loss, least)
    return best


def kmeans(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """A table `[k, v]` for `x` `[n, v]` under `weight` `[n, v]`. An entry that no vector chooses takes the place of one
    that is served worst."""
    even = torch.arange(0, len(x), max(1, -(-len(x) // MOST)), device=x.device)
    x, weight = x[even], weight[even]
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:k].to(x.device)
    table = x.new_zeros((k, x.shape[1])).index_copy_(0, torch.arange(len(drawn), device=x.device), x[drawn])
    for _ in range(ROUNDS):
        index = nearest(x, weight, table)
        total = torch.zeros_like(table).index_add_(0, index, weight)
        mean = torch.zeros_like(table).index_add_(0, index, weight * x) / torch.where(total > 0, total, 1.0)
        unused = (torch.bincount(index, minlength=k) == 0).nonzero()[:, 0]
        loss = (x - table[index]).square().mul_(weight).sum(1)
        worst = loss.sort(stable=True, descending=True)[1][: len(unused)]
        table = torch.where(total > 0, mean, table).index_copy_(0, unused[: len(worst)], x[worst])
    return table
