"""What a figure depends on beside its settings: the machine and its devices, and the versions of what computed it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from quant.errors import SettingsError
from quant.models.source import first_line
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


def check_device(device: str) -> None:
    """Raises `SettingsError` unless torch can compute on `device`."""
    try:
        torch.zeros(1, device=device).item()  # which a device without memory refuses
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = "there is no such kind of device" if str(error).startswith("Expected one of") else first_line(error)
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu, the only one here"
        raise SettingsError(f"device {device!r}: torch cannot use it ({reason}); choose {usable}") from None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
