"""In which order sums are added, on which the last bits of a result depend: by CPU threads and by a GPU's algorithms.

How many CPU threads work is worth: small matrices are done before a second thread wakes up. Measured on two busy cores:
columns of a few hundred rows solve 3 to 40 times faster on one thread, because the other one spins while it waits. The
count can change the last bits of a sum, so it is part of a run's identity.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.deterministic
from torch.nn.attention import SDPBackend, sdpa_kernel

SMALL = 1024 * 1024  # weights of a matrix that one thread handles fastest


def worth(weights: int) -> int:
    """Threads for matrices of this many weights."""
    return 1 if weights < SMALL else torch.get_num_threads()


@contextmanager
def threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(device: str, gradients: bool) -> Generator[None]:
    """On a GPU asks torch for algorithms that add in one order; it warns where it has none. `gradients`: through
    attention as well, which only its plain form adds in one order (the others do when every operation of a model is
    held to it, and then some models stop), in memory that grows with the square of a window's length: too much for a
    diffusion transformer. A CPU needs nothing."""
    if torch.device(device).type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch warns without; read when cuBLAS starts
    asked, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory  # would write every new tensor twice
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        with sdpa_kernel(SDPBackend.MATH) if gradients else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=warns)
        memory.fill_uninitialized_memory = fills
