"""A command that was stopped, by Ctrl-C or SIGTERM: what is left of its work, and how to go on."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.checkpoint.journal import FOLDER

INTERRUPTED, TERMINATED = 130, 143
SLACK = 0.1  # seconds by which a file's time may lag behind


class Terminated(BaseException):
    """SIGTERM, raised like KeyboardInterrupt, so that files are closed and the lock is given back."""


def terminate(*_: object) -> None:
    raise Terminated


@dataclass
class Begun:
    """What the command that goes on needs to know. `recipe`: that a time budget has picked; `places`: where a journal
    or a finished component may lie, once the work has begun, at `since`."""

    recipe: str = ""
    places: Sequence[Path] = ()
    since: float = 0.0

    def clear(self) -> None:
        self.recipe, self.places = "", ()

    def begin(self, places: Sequence[Path]) -> None:
        self.places, self.since = places, time.time()

    def told(self, arguments: Sequence[str]) -> str:
        """How to go on from the command of these `arguments`: without what says how to begin, and with the recipe that
        was picked."""
        made = [file for place in self.places for file in (place / FOLDER / "run.json", place / "config.json")]
        ours = any(file.exists() and file.stat().st_mtime >= self.since - SLACK for file in made)
        if not ours and "--resume" not in arguments:
            return "stopped before there was anything to keep; the same command begins again"
        kept, rest = list[str](), iter(arguments)
        for argument in rest:
            if argument == "--time-budget":
                next(rest, None)
            elif argument not in ("--resume", "--restart") and not argument.startswith("--time-budget="):
                kept.append(argument)
        command = shlex.join(["quantize", *kept, *(["--recipe", self.recipe] if self.recipe else []), "--resume"])
        return f"stopped; finished blocks are kept. Continue with:\n  {command}"


BEGUN = Begun()
