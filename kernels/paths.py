"""What numba compiles for the CPU: rotations (`hadamard.py`), reading trellis codes, and their search (`viterbi.py`).

The search: two loops per step over arrays that stay in the first-level cache (20 KB at L = 12): the least of the `2^K`
ways into each group of states, and the costs from there. The compiler turns both into vector instructions. From 16 ways
on it would read costs that lie far apart, so the `2^K` states of a group are kept one row under another, and their
values too; then only the least costs, a `2^K`-th of all, are turned between the loops. No fast-math: the sums are those
of `viterbi.reference`, to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit  # pyright: ignore[reportMissingTypeStubs]


def _kept() -> bool:
    """Whether there is a folder to keep compiled code in: not where everything is read-only."""
    try:
        njit(cache=True)(lambda: None)
    except RuntimeError:
        return False
    return True


SETTINGS: Any = {"nogil": True, "cache": _kept(), "error_model": "numpy"}
FAR = np.float32(1e30)
APART = 4  # bits from which the states of a group are rows
LINE = 16  # floats


@njit(**SETTINGS)
def decode(streams: Any, values: Any, step: int, window: int, first: int, scales: Any, out: Any) -> None:
    """Fills `out` [rows, n] with the weights of a sequence's rows from `first` on: the `values` [2^window, V] of states
    that lie `step` bits apart in each of the `streams` [n, bytes], times the rows' `scales`."""
    (rows, columns), (size, vector) = out.shape, (streams.shape[1], values.shape[1])
    mask, stream = np.uint32((1 << window) - 1), np.empty(size + 2, np.uint8)
    found = np.empty((LINE, size * 8 // step * vector), np.float32)
    for begin in range(0, columns, LINE):  # what is written into one line of the cache is written at once
        count = min(LINE, columns - begin)
        for c in range(count):
            stream[:size] = streams[begin + c]
            stream[size], stream[size + 1] = stream[0], stream[1 % size]  # the end is joined to the beginning
            for t in range(size * 8 // step):
                bit = np.uint32(t) * np.uint32(step)
                byte = bit >> np.uint32(3)
                word = np.uint32(stream[byte]) | np.uint32(stream[byte + 1]) << np.uint32(8)
                state = (word | np.uint32(stream[byte + 2]) << np.uint32(16)) >> (bit & np.uint32(7)) & mask
                if vector == 1:
                    found[c, t] = values[state, 0]
                else:
                    found[c, 2 * t], found[c, 2 * t + 1] = values[state, 0], values[state, 1]
        for row in range(rows):
            for c in range(count):
                out[row, begin + c] = found[c, first + row] * scales[row]


@njit(**SETTINGS)
def rotate(x: Any, signs: Any, table: Any, size: int, inverse: bool, factor: float, out: Any) -> None:
    """`hadamard.reference` of `x` [rows, n] into `out`, the same operations in the same order. `table` [F, F]: of F's
    order; `size`: of W; `factor`: of the result, in the dtype of all others."""
    block = len(table) * size
    work, mixed = np.empty(block, x.dtype), np.empty(block, x.dtype)
    for row in range(len(x)):
        for begin in range(0, x.shape[1], block):
            for i in range(block):
                work[i] = x[row, begin + i] if inverse else x[row, begin + i] * signs[begin + i]
            if len(table) > 1:
                mixed[:] = 0
                for i in range(len(table)):
                    for j in range(len(table)):
                        for k in range(size):
                            mixed[i * size + k] += table[i, j] * work[j * size + k]
                work[:] = mixed
            half = 1
            while half < size:
                for pair in range(0, block, 2 * half):
                    for i in range(pair, pair + half):
                        even, odd = work[i], work[i + half]
                        work[i], work[i + half] = even + odd, even - odd
                half *= 2
            for i in range(block):
                turned = work[i] * factor
                out[row, begin + i] = turned * signs[begin + i] if inverse else turned


def searcher(bits: int) -> Any:
    """`run(x [n, T V], weight [n, T V], seam int32 [n], states int32 [n, T], values [V, 2^L])` fills `states`."""
    ways, apart = 1 << bits, bits >= APART

    @njit(**SETTINGS)  # of numbers alone: a process would not know a function in its closure that another has compiled
    def run(x: Any, weight: Any, seam: Any, states: Any, values: Any) -> None:
        vector, count = values.shape
        groups, length = count >> bits, x.shape[1] // vector
        # a state's cost is that of what leads to it, `source[a, c]`, and its own, at `[a, b, c]`
        shape = (ways, groups // max(1, groups >> bits), max(1, groups >> bits)) if apart else (1, ways, groups)
        known = np.empty((vector, count), np.float32)
        for v in range(vector):
            known[v] = values[v].reshape(groups, ways).T.copy().reshape(count) if apart else values[v]
        first, second = known[0].reshape(shape), known[vector - 1].reshape(shape)
        cost, least = np.empty(count, np.float32), np.empty(groups, np.float32)
        came = np.empty((length, groups), np.uint8)
        source = np.empty((ways, shape[2]), np.float32) if apart else least.reshape((1, groups))
        for i in range(len(x)):
            least[:] = np.float32(0) if seam[i] < 0 else FAR
            if seam[i] >= 0:
                least[seam[i]] = np.float32(0)
            for t in range(length):
                if t and apart:
                    _arrive_apart(cost, least, came[t], ways)
                elif t:
                    _arrive(cost, least, came[t], ways)
                if apart:
                    for a in range(ways):
                        for c in range(shape[2]):
                            source[a, c] = least[(c * ways + a) & (groups - 1)]
                begin, end = t * vector, (t + 1) * vector
                _leave(cost.reshape(shape), source, first, second, x[i, begin:end], weight[i, begin:end])
            begin, end = (0, count) if seam[i] < 0 else (seam[i] << bits, (seam[i] + 1) << bits)
            if apart:
                cost = cost.reshape(ways, groups).T.copy().reshape(count)
            state = begin + np.argmin(cost[begin:end])
            for t in range(length - 1, 0, -1):
                states[i, t] = state
                low = state & (groups - 1)
                state = low << bits | came[t, low]
            states[i, 0] = state

    return run


@njit(**SETTINGS)
def _leave(cost: Any, source: Any, first: Any, second: Any, x: Any, weight: Any) -> None:
    parts, times, each = cost.shape
    x0, x1, w0, w1 = x[0], x[-1], weight[0], weight[-1]
    for a in range(parts):
        if each == 1 and len(x) == 2:  # so few states that a row has one source
            for b in range(times):
                off, more = x0 - first[a, b, 0], x1 - second[a, b, 0]
                cost[a, b, 0] = source[a, 0] + w0 * (off * off) + w1 * (more * more)
        elif len(x) == 1:
            for b in range(times):  # a range with a step of `each` would not be turned into vectors
                for c in range(each):
                    off = x0 - first[a, b, c]
                    cost[a, b, c] = source[a, c] + w0 * (off * off)
        else:
            for b in range(times):
                for c in range(each):
                    off, more = x0 - first[a, b, c], x1 - second[a, b, c]
                    cost[a, b, c] = source[a, c] + w0 * (off * off) + w1 * (more * more)


@njit(inline="always")
def _arrive(cost: Any, least: Any, came: Any, ways: int) -> None:
    for u in range(len(least)):
        best, way = cost[ways * u], np.uint8(0)
        for k in range(1, ways):
            other = cost[ways * u + k]
            if other < best:
                best, way = other, np.uint8(k)
        least[u], came[u] = best, way


@njit(inline="always")
def _arrive_apart(cost: Any, least: Any, came: Any, ways: int) -> None:
    groups = len(least)
    rows = cost.reshape(ways, groups)
    least[:], came[:] = rows[0], np.uint8(0)
    for k in range(1, ways):
        for u in range(groups):
            best, way, other = least[u], came[u], rows[k, u]
            nearer = other < best
            least[u] = other if nearer else best
            came[u] = np.uint8(k) if nearer else way
