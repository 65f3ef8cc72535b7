"""What a block leaves for later ones beside its output: entries of a dict that they are all called with.

Gemma 3n and 4 share keys and values so: a layer writes its own into the dict, and those behind it read them there. A
block that is run alone must find in the dict what the blocks before it wrote, so notes travel with their outputs.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from typing import Any, NamedTuple

Notes = dict[Any, dict[Any, Any]]  # what was written, by the dict's place among the arguments or its name


class Left(NamedTuple):
    """A block's `output`, and the `notes` of all blocks up to it; a nest for pytree."""

    output: Any
    notes: Notes


def boards(args: Any, kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """The dicts among the arguments of a call."""
    given = {**dict(enumerate(args)), **kwargs}
    return {key: value for key, value in given.items() if isinstance(value, dict | UserDict)}


def before(args: Any, kwargs: Mapping[str, Any]) -> Notes:
    """What is written as a call begins."""
    return {key: dict(board) for key, board in boards(args, kwargs).items()}


def written(seen: Notes, args: Any, kwargs: Mapping[str, Any]) -> Notes:
    """What has been written since `before` gave `seen`."""
    new = {
        key: {name: value for name, value in board.items() if seen[key].get(name) is not value}
        for key, board in boards(args, kwargs).items()
    }
    return {key: entries for key, entries in new.items() if entries}


def pin(notes: Notes, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Writes notes where a call's block would have left them."""
    for key, board in boards(args, kwargs).items():
        board.update(notes.get(key, {}))


def merged(earlier: Notes, later: Notes) -> Notes:
    return {key: {**earlier.get(key, {}), **later.get(key, {})} for key in [*earlier, *later]}


def left(output: Any, notes: Notes) -> Any:
    """What a block leaves: its output alone where nobody wrote any notes."""
    return Left(output, notes) if notes else output


def parted(made: Any) -> tuple[Any, Notes]:
    """A block's own output, and the notes."""
    return (made.output, made.notes) if isinstance(made, Left) else (made, {})
