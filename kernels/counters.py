"""Counters for kernels that share K between programs: the last program to come, whichever it is, adds up the parts.

Scratch memory under CUDA graphs: outputs and partial sums come from torch's allocator, which keeps what a graph
allocated for that graph alone; counters, which must be zero before the first launch and are zero after each, come from
here. `torch.compile(mode="reduce-overhead")` records graphs by itself, warms up on a stream of its own and wants to
know of every allocation that lasts: that stream's counters come from the stock (tried without a GPU alone).
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}
_pools: dict[torch.device, list[Tensor]] = {}
"""Per device counters for launches in CUDA graphs: one zeroed buffer after another, of the last what is left. None is
ever let go, since a graph holds addresses alone."""

POOL = 1 << 20
_lock = Lock()


def fresh_counters(count: int, device: torch.device) -> Tensor:
    """Counters at zero; every launch leaves them so. Each stream has its own, since launches on one never overlap. A
    larger buffer replaces one that a launch may still use, which nobody else gets. While a CUDA graph is recorded each
    launch gets some of its own: graphs may run side by side, and a graph may run beside its stream's ordinary launches.
    They are zeroed beforehand, when a launch that is not recorded comes by, so that a graph spends no kernel on it;
    past `POOL` of them between two such launches, in the graph."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return taken(count, device)
    stock(device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters or len(_counters[key]) < count:
        _counters[key] = taken(max(count, 1 << 14), device)
    return _counters[key]


def stock(device: torch.device) -> None:
    """Sees to it that at least half of `POOL` counters are left for graphs."""
    with _lock:
        pools = _pools.setdefault(device, [])
        if not pools or 2 * len(pools[-1]) < POOL:
            pools.append(torch.zeros(POOL, dtype=torch.int32, device=device))
            if device.type == "cuda":  # the graph may run on any stream
                torch.cuda.synchronize(device)


def taken(count: int, device: torch.device) -> Tensor:
    """Counters that nobody else gets, in lines of 128 bytes."""
    lines = -(-count // 32) * 32
    with _lock:
        pools = _pools.get(device, [])
        if not pools or len(pools[-1]) < lines:
            return torch.zeros(count, dtype=torch.int32, device=device)
        found, pools[-1] = pools[-1][:count], pools[-1][lines:]
    return found
