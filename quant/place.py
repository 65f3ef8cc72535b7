"""Where a run goes: what does not belong to a recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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

    @cached_property
    def told(self) -> dict[str, Any]:
        """What the plan file says, read once: it may be a pipe. Raises `SettingsError` where it cannot be read."""
        try:
            told: Any = {} if self.plan is None else json.loads(self.plan.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # what is not JSON, or not UTF-8, too
            raise SettingsError(f"--plan {self.plan}: cannot be read ({error})") from None
        if not isinstance(told, dict):
            raise SettingsError(f"--plan {self.plan}: expected a JSON object, found {told!r}")
        return told  # pyright: ignore[reportUnknownVariableType]
