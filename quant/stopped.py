"""A command that was stopped, by Ctrl-C or SIGTERM: what is left of its work, and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.checkpoint.journal import FOLDER

INTERRUPTED, TERMINATED = 130, 143


class Terminated(BaseException):
    """SIGTERM, raised like KeyboardInterrupt, so that files are closed and the lock is given back."""


def terminate(*_: object) -> None:
    raise Terminated


@dataclass
class Begun:
    """What the command that goes on needs to know. `recipe`: that a time budget has picked; `places`: where a journal
    may lie, once the work has begun."""

    recipe: str = ""
    places: Sequence[Path] = ()

    def clear(self) -> None:
        self.recipe, self.places = "", ()

    def told(self, arguments: Sequence[str]) -> str:
        """How to go on from the command of these `arguments`: without what says how to begin, and with the recipe that
        was picked."""
        if not any((place / FOLDER / "run.json").exists() for place in self.places):
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
