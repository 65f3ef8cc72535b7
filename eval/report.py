"""The answer to "how good is this checkpoint?", with every setting that the answer depends on."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.errors import ResourceError
from quant.eval.compare import Divergence
from quant.eval.encoder import HiddenStates
from quant.eval.footprint import Memory, Size, Speed
from quant.eval.generate import Generation
from quant.eval.perplexity import Perplexity
from quant.eval.subject import Kind
from quant.machine import Machine


@dataclass(frozen=True)
class Settings:
    """Everything that decides the figures of a report. `window_rule` is explained in `quant.eval.perplexity`."""

    text: str
    text_sha256: str
    window_rule: str
    window: int
    stride: int | None
    max_windows: int | None
    bos: bool
    device: str
    dtype: str
    prompts: int
    new_tokens: int
    machine: Machine
    versions: dict[str, str]


@dataclass(frozen=True)
class Report:
    """One model judged. `original` is the original's perplexity on the same windows; what needs an original is None
    without one, and what needs a language-model head is None for an encoder. `note`: what makes figures doubtful."""

    model: str
    path: str | None
    kind: Kind
    against: str | None
    perplexity: Perplexity | None
    original: Perplexity | None
    divergence: Divergence | None
    hidden: HiddenStates | None
    generations: tuple[Generation, ...]
    size: Size
    speed: Speed
    memory: Memory
    seconds: float
    settings: Settings
    note: str | None = None

    @property
    def common_prefix(self) -> float | None:
        """Mean length in tokens of what both greedy continuations share."""
        return _mean([g.common_prefix for g in self.generations])

    @property
    def repetition(self) -> float | None:
        """Mean share of repeated 4-grams in the greedy continuations."""
        return _mean([g.repetition for g in self.generations])

    @property
    def ratio(self) -> float | None:
        """Perplexity over the original's."""
        if self.perplexity is None or self.original is None:
            return None
        return self.perplexity.token / self.original.token

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values only; a number that is not finite becomes None."""
        means = {"perplexity_ratio": self.ratio, "common_prefix": self.common_prefix, "repetition": self.repetition}
        return plain({**asdict(self), **means})


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def plain(value: Any) -> Any:
    """Lists and dictionaries of JSON; a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(target: str, figures: dict[str, Any]) -> None:
    """Writes figures with the command that made them; `-` is standard output.

    Raises:
        ResourceError: the file cannot be written.
    """
    data = {"format": 1, "command": ["quant-eval", *sys.argv[1:]], **figures}
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"json {target}: cannot be written ({error.strerror}).") from error
