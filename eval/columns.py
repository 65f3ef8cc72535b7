"""Tables of figures: a row per model, columns that are left out where nobody fills them, and wrapped where they do not
fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text as Styled


class Row(Protocol):
    """What a column reads; `model` is its name."""

    @property
    def model(self) -> str: ...


@dataclass(frozen=True)
class Column:
    """A heading, how a row fills it ("" for nothing to say), and what it means."""

    heading: str
    cell: Callable[[Any], str]
    meaning: str


def some(value: float | None, form: str, unit: float = 1.0) -> str:
    """`value` in `unit`s; "" for None."""
    return "" if value is None else format(value / unit, form)


def filled(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    return [column for column in columns if any(column.cell(row) for row in rows)]


def tables(title: str, rows: Sequence[Row], columns: Sequence[Column], width: int) -> Group:
    """The filled columns; what does not fit in `width` characters continues in a table below. A legend at the end."""
    columns = filled(columns, rows)
    name = min(32, max(len("model"), *(len(row.model) for row in rows)))
    parts: list[list[Column]] = [[]]
    left = room = width - name - 2
    for column in columns:
        need = 3 + max(len(column.heading), *(len(column.cell(row)) for row in rows))
        if need > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= need
    legend = "; ".join(f"{column.heading}: {column.meaning}" for column in columns)
    return Group(Styled(title), *(_grid(rows, part, name) for part in parts), Styled(legend, style="dim"))


def _grid(rows: Sequence[Row], columns: Sequence[Column], name: int) -> Table:
    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("model", overflow="fold", min_width=name, max_width=name)
    for column in columns:
        grid.add_column(column.heading, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(row.model, *(column.cell(row) or "-" for column in columns))
    return grid
