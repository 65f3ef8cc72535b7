"""How many CPU threads work is worth: small matrices are done before a second thread wakes up.

Measured on two busy cores: columns of a few hundred rows solve 3 to 40 times faster on one thread, because the other
one spins while it waits. The count can change the last bits of a sum, so it is part of a run's identity.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

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
