"""What the command line shows while it works: one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import resource
import sys
import time
from io import TextIOWrapper
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column

from quant.blocks import Solved
from quant.progress import Progress

WIDE = 110  # columns


class Display(Progress):
    """Block k of n, site, error, ETA, memory. The ETA counts weights: blocks may differ in size. A narrow terminal has
    no room for a bar and the time that has passed."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console = console or Console(stderr=True)
        wide = console.width >= WIDE
        self.bars = Bars(
            _column("description"),
            *([BarColumn(bar_width=24)] if wide else []),
            TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True)),
            _column("fields[site]", "cyan", Column(no_wrap=True, overflow="ellipsis", ratio=1, min_width=8)),
            _column("fields[error]"),
            _column("fields[eta]", "green"),
            *([TimeElapsedColumn()] if wide else []),
            _column("fields[memory]", "magenta"),
            console=console,
            transient=True,
        )
        self.task = self.bars.add_task("", total=None, site="", error="", eta="", memory="")
        self.blocks, self.weights, self.done_weights, self.steps = 0, 0, 0, 0
        self.began, self.before = time.perf_counter(), 0  # the pace is that since then, when so many weights were done
        self.name, self.said = "", set[str]()
        self.errors: list[float] = []

    def __enter__(self) -> Self:
        if self.console.is_terminal:  # a log gets plain lines instead
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def begin(self, blocks: int, weights: int, done: int) -> None:
        self.blocks, self.weights = blocks, weights
        self.began, self.before, self.done_weights, self.errors = time.perf_counter(), 0, 0, []
        self.bars.update(self.task, total=max(1, weights), completed=0)
        if done:
            self.console.print(f"resuming: {done} of {blocks} blocks are done")

    def block(self, index: int, name: str) -> None:
        self.errors, self.name = [], name
        self.bars.update(self.task, description=f"block {index + 1}/{self.blocks}", site=name, memory=_memory())

    def site(self, solved: Solved) -> None:
        self.errors.append(solved.error)
        done = self.bars.tasks[0].completed + solved.site.weights
        name = solved.site.name
        eta = self._eta(done) if self.done_weights > self.before else ""  # a block begins with what its sites share
        site = name.removeprefix(f"{self.name}.")
        self.bars.update(self.task, completed=done, site=site, error=f"error {solved.error:.2e}", eta=eta)
        for note in solved.notes:
            self.console.print(f"[yellow]note[/yellow] {name}: {note}", highlight=False)

    def recovering(self, done: int, steps: int, loss: float) -> None:
        self.bars.update(self.task, site=f"tuning {done}/{steps}", error=f"loss {loss:.3f}")

    def distilling(self, done: int, steps: int, loss: float) -> None:
        if self.weights:  # the first step: from here on steps are counted
            self.weights, self.steps, self.began = 0, steps - done, time.perf_counter()
            self.bars.update(self.task, total=steps)
        left = _left(self.began, self.steps - (steps - done), steps - done)
        self.bars.update(self.task, completed=done, error=f"loss {loss:.3f}", eta=left, memory=_memory())
        if not self.console.is_terminal and (done == steps or done % max(1, steps // 8) == 0):
            self.console.print(f"tuning end to end {done}/{steps}: loss {loss:.3f}{left and ', ' + left}")

    def advanced(self, index: int, weights: int) -> None:
        self.done_weights += weights
        if not self.errors:
            self.began, self.before = time.perf_counter(), self.done_weights  # a journal's blocks say nothing of it
        self.bars.update(self.task, completed=self.done_weights, memory=_memory(), eta=self._eta(self.done_weights))
        if not self.console.is_terminal and self.errors:
            left = self._eta(self.done_weights)
            self.console.print(
                f"block {index + 1}/{self.blocks}: worst error {max(self.errors):.2e}{left and ', ' + left}"
            )

    def step(self, what: str) -> None:
        self.bars.update(self.task, description=what, site="", error="", eta="", memory=_memory())

    def say(self, what: str) -> None:
        if what not in self.said:  # a model is prepared more than once to find its recipe
            self.console.print(what, markup=False, highlight=False, soft_wrap=True)
        self.said.add(what)

    def _eta(self, done: float) -> str:
        return _left(self.began, done - self.before, self.weights - done)


def _column(what: str, style: str = "none", column: Column | None = None) -> TextColumn:
    return TextColumn(f"{{task.{what}}}", style=style, table_column=column or Column(no_wrap=True))


def _left(began: float, done: float, more: float) -> str:
    elapsed = time.perf_counter() - began
    if done <= 0 or more <= 0 or elapsed < 1:
        return ""
    left = int(elapsed / done * more)
    return f"{left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d} left"


def _memory() -> str:
    with open("/proc/self/statm") as stream:
        pages = int(stream.read().split()[1])
    return human(pages * resource.getpagesize())


def show_any() -> None:
    """A character that standard output cannot encode, as in what a model says, becomes a ? and ends nothing."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def human(count: float) -> str:
    """Bytes for people: powers of 1024, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 100 and unit != "B" else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
