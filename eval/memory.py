"""What running a model takes: the bytes of its tensors, and how far memory rises above them while it runs.

On a GPU the rise is that of torch's allocator on the device. On a CPU it is that of the resident set of this process
(`VmHWM` of Linux, reset before the run; elsewhere the lifetime maximum of `getrusage`, which hides a rise after
something bigger ran). The resident set itself also holds Python, torch (about 0.5 GB) and whatever else is loaded, so
the rise is reported apart from the peak.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from quant.memory import give_back, peak_bytes


@dataclass(frozen=True)
class Rise:
    """Bytes: the highest level of `meter` inside the block, and how far that lies above the level before it."""

    meter: str
    peak: int
    rise: int


class Watched:
    """Filled when the `watch` block ends."""

    result: Rise


@contextmanager
def watch(device: torch.device) -> Generator[Watched]:
    """Measures the peak inside the block; `result` is there after it."""
    meter = _cuda(device) if device.type == "cuda" else _process()
    watched = Watched()
    before = next(meter)
    yield watched
    peak = max(next(meter), before)
    what = "torch allocator on the GPU" if device.type == "cuda" else "resident set of the process"
    watched.result = Rise(what, peak, peak - before)


def _cuda(device: torch.device) -> Iterator[int]:
    torch.cuda.reset_peak_memory_stats(device)
    yield torch.cuda.memory_allocated(device)
    yield torch.cuda.max_memory_allocated(device)


def _process() -> Iterator[int]:
    gc.collect()
    give_back()  # freed pages would hide growth
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    yield peak_bytes()
    yield peak_bytes()
