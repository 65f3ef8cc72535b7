"""Where a run goes: what does not belong to a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quant.errors import SettingsError
from quant.machine import check_device

SPILL_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Settings:
    """What does not belong to a recipe: where and how a run goes. `spill_bytes`: activations kept in memory, the rest
    on disk. `plan`: a file with specs for some sites. `threads`: of the CPU; 0 is torch's choice."""

    device: str = "cpu"
    dtype: str = "float32"
    plan: Path | None = None
    spill_bytes: int = SPILL_BYTES
    threads: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise SettingsError(f"dtype {self.dtype!r}: choose float32, float16 or bfloat16")
        check_device(self.device)
