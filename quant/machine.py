"""What a figure depends on beside its settings: the machine, and the versions of what computed it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from quant.version import VERSION


@dataclass(frozen=True)
class Machine:
    """Where figures were measured. `threads`: of the CPU, as torch uses them."""

    cpu: str
    cores: int
    threads: int
    gpu: str | None
    platform: str


def machine() -> Machine:
    """The machine this process runs on, without its name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(_cpu(), os.cpu_count() or 1, torch.get_num_threads(), gpu, platform.platform())


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    libraries = {name: version(name) for name in ("transformers", "tokenizers")}
    return {"bitwright": VERSION, "torch": torch.__version__, **libraries, "python": platform.python_version()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
