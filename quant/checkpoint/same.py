"""Whether two runs are the same one, and where they are not."""

from __future__ import annotations

import json
from typing import Any

from quant.errors import ResumeError


def compare(before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Raises `ResumeError` with the first difference. `what`: where it was found."""
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            place, was, given = _difference(before.get(key), now.get(key), key)
            raise ResumeError(
                f"{what}: {place} = {was} then, {given} now. Resume with what it was begun with, or use --restart to "
                "begin anew"
            )


def _difference(before: Any, now: Any, where: str) -> tuple[str, str, str]:
    """The first place where two nests differ, and what is there in each."""
    if isinstance(before, dict) and isinstance(now, dict):
        rank = lambda key: (key not in ("spec", "average"), str(key))  # noqa: E731 (bits say most)
        for key in sorted({*before, *now}, key=rank):  # pyright: ignore[reportUnknownArgumentType]
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{where}.{key}")
    return where, json.dumps(before), json.dumps(now)
