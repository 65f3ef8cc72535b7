"""The Viterbi search of `viterbi.py`, compiled for the CPU by numba.

Two loops per weight over arrays that stay in the first-level cache (20 KB at L = 12): the least of the `2^K` ways into
each group of states, and the costs from there. The compiler turns both into vector instructions. No fast-math: the sums
are those of `viterbi.reference`, to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit  # pyright: ignore[reportMissingTypeStubs]

SETTINGS: Any = {"nogil": True, "cache": True, "error_model": "numpy"}
FAR = np.float32(1e30)


def searcher(bits: int) -> Any:
    """`run(x [n, T V], weight [n, T V], seam int32 [n], states int32 [n, T], values [V, 2^L])` fills `states`."""
    arrive = _ARRIVE[bits - 1]

    @njit(**SETTINGS)
    def run(x: Any, weight: Any, seam: Any, states: Any, values: Any) -> None:
        vector, count = values.shape
        groups, length = count >> bits, x.shape[1] // vector
        cost, least = np.empty(count, np.float32), np.empty(groups, np.float32)
        came = np.empty((length, groups), np.uint8)
        for i in range(len(x)):
            least[:] = np.float32(0) if seam[i] < 0 else FAR
            if seam[i] >= 0:
                least[seam[i]] = np.float32(0)
            for t in range(length):
                if t:
                    arrive(cost, least, came[t])
                _leave(cost, least, values[0], x[i, t * vector], weight[i, t * vector])
                for v in range(1, vector):
                    _add(cost, values[v], x[i, t * vector + v], weight[i, t * vector + v])
            begin, end = (0, count) if seam[i] < 0 else (seam[i] << bits, (seam[i] + 1) << bits)
            state = begin + np.argmin(cost[begin:end])
            for t in range(length - 1, 0, -1):
                states[i, t] = state
                low = state & (groups - 1)
                state = low << bits | came[t, low]
            states[i, 0] = state

    return run


@njit(**SETTINGS)
def _leave(cost: Any, least: Any, values: Any, x: Any, weight: Any) -> None:
    groups = len(least)
    for way in range(len(cost) // groups):  # a range with a step of `groups` would not be turned into vectors
        first = way * groups
        for u in range(groups):
            off = x - values[first + u]
            cost[first + u] = least[u] + weight * (off * off)


@njit(**SETTINGS)
def _add(cost: Any, values: Any, x: Any, weight: Any) -> None:
    for state in range(len(cost)):
        off = x - values[state]
        cost[state] += weight * (off * off)


def _arrival(ways: int) -> Any:
    @njit(**SETTINGS)
    def arrive(cost: Any, least: Any, came: Any) -> None:
        for u in range(len(least)):
            best, way = cost[ways * u], np.uint8(0)
            for k in range(1, ways):
                other = cost[ways * u + k]
                if other < best:
                    best, way = other, np.uint8(k)
            least[u], came[u] = best, way

    return arrive


_ARRIVE = tuple(_arrival(1 << bits) for bits in range(1, 9))
