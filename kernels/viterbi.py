"""The best path through a trellis: for each sequence the states whose values lie nearest to it.

    minimise  sum_t weight_t (x_t - value(state_t))^2   over   state_t = (state_{t-1} >> K) | (new K bits << (L - K))

where a state may also have several values, one after another in the sequence.

Dynamic programming over all `2^L` states, `2^K` ways into each (Viterbi, 1967). Tail-biting: the low `L - K` bits of
the first state, the seam, must be the high `L - K` bits of the last. Trying every seam would cost `2^(L-K)` searches;
`search` finds a seam with one free search of the sequence begun at its middle (there the ends are far away), and then
keeps it (QTIP, arXiv 2406.11235, algorithm 4). `improve` starts from a path: it keeps the seam that the path has at
some place, so its result can only be better.

On a CPU the loops are compiled by numba: at K = 2 about half a million weights per second and core at L = 12, and a
third of a million at L = 13 with two values to a state; half of that time is for the seam. On a GPU Triton does it
(`viterbi_kernel.py`). `reference` does the same float32 operations in torch, in the same order: the same states, on any
device. Sequences do not know of each other, so threads and batches do not change the result.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant.kernels.available import runs_triton

FREE = -1
FAR = 1e30


def search(x: Tensor, weight: Tensor, values: Tensor, bits: int) -> Tensor:
    """States int32 `[n, T]` for the sequences `x` `[n, T V]` float32 with `weight` `[n, T V]` >= 0, `values`
    `[V, 2^L]`; `bits`: K, by which the stream advances from state to state."""
    vector, steps = len(values), x.shape[1] // len(values)
    middle = steps // 2
    free = torch.full((len(x),), FREE, dtype=torch.int32, device=x.device)
    states = _best(x.roll(-middle * vector, 1), weight.roll(-middle * vector, 1), values, bits, free)
    return _best(x, weight, values, bits, _seam(states[:, steps - middle], values, bits))


def improve(x: Tensor, weight: Tensor, values: Tensor, bits: int, states: Tensor, place: int) -> Tensor:
    """The best states with the seam that `states` `[n, T]` have at `place`: at least as good as they are."""
    seam, back = _seam(states[:, place], values, bits), -place * len(values)
    if not place:
        return _best(x, weight, values, bits, seam)
    return _best(x.roll(back, 1), weight.roll(back, 1), values, bits, seam).roll(place, 1)


def reference(x: Tensor, weight: Tensor, values: Tensor, bits: int, seam: Tensor) -> Tensor:
    """`_best` in plain torch; see the module."""
    n, (vector, states) = len(x), values.shape
    least = torch.full((n, states >> bits), FAR, device=x.device)
    least[seam == FREE] = 0.0
    held = (seam != FREE).nonzero().flatten()
    least[held, seam[held].long()] = 0.0
    came = list[Tensor]()
    cost = least
    for t in range(x.shape[1] // vector):
        if t:
            least, way = cost.view(n, -1, 1 << bits).min(2)
            came.append(way)
        cost = least.repeat(1, 1 << bits)
        for place, value in enumerate(values, t * vector):
            off = x[:, place, None] - value
            cost = cost + weight[:, place, None] * (off * off)
    every = torch.arange(states, device=x.device)
    allowed = (seam[:, None] == FREE) | (every >> bits == seam[:, None])
    state = torch.where(allowed, cost, torch.inf).argmin(1)
    path = [state]
    for way in reversed(came):
        low = state & ((states >> bits) - 1)
        state = low << bits | way.gather(1, low[:, None])[:, 0]
        path.append(state)
    return torch.stack(path[::-1], 1).int()


def _seam(state: Tensor, values: Tensor, bits: int) -> Tensor:
    return state & ((values.shape[1] >> bits) - 1)


def _best(x: Tensor, weight: Tensor, values: Tensor, bits: int, seam: Tensor) -> Tensor:
    """States int32 `[n, T]` of the best path whose seam is `seam` int32 `[n]`, -1 for any."""
    if x.device.type != "cpu":
        if not runs_triton(x):  # a step of `reference` is many launches
            return _best(x.cpu(), weight.cpu(), values.cpu(), bits, seam.cpu()).to(x.device)
        from quant.kernels.viterbi_kernel import best

        return best(x, weight, values, bits, seam)
    states = torch.empty((len(x), x.shape[1] // len(values)), dtype=torch.int32)
    run: Any = _compiled(bits)
    arrays = (x.contiguous(), weight.contiguous(), seam.to(torch.int32), states)
    workers, table = min(torch.get_num_threads(), len(x)), values.contiguous().numpy()
    shares = [[array[begin::workers] for array in arrays] for begin in range(workers)]
    if workers <= 1:
        run(*(array.numpy() for array in arrays), table)
    else:
        list(pool(workers).map(lambda share: run(*(part.numpy() for part in share), table), shares))
    return states


@cache
def pool(workers: int) -> ThreadPoolExecutor:
    """For what numba has compiled, which leaves Python to others meanwhile."""
    return ThreadPoolExecutor(workers, "viterbi")


@cache
def _compiled(bits: int) -> Any:
    """The search for one `bits`, which the loops over `2^bits` ways must know when they are compiled."""
    from quant.kernels import paths

    return paths.searcher(bits)
