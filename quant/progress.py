"""What the pipeline tells whoever watches. The base class watches nothing; the command line draws it."""

from __future__ import annotations

from typing import Self

from quant.blocks import Solved


class Progress:
    def __enter__(self) -> Self:
        """It is being watched from here on; `quant.quantize` enters it."""
        return self

    def __exit__(self, *_: object) -> None: ...

    def begin(self, blocks: int, weights: int, done: int) -> None:
        """A run of `blocks` blocks with `weights` weights to quantize in all; `done` blocks come from a journal."""

    def block(self, index: int, name: str) -> None:
        """Block `index` (from 0) begins."""

    def site(self, solved: Solved) -> None:
        """One site is solved."""

    def recovering(self, done: int, steps: int, loss: float) -> None:
        """Step `done` of `steps` on a solved block; `loss`: relative to that of the block as solved."""

    def distilling(self, done: int, steps: int, loss: float) -> None:
        """Step `done` of `steps` on the whole model; `loss`: relative to that of the model as solved."""

    def advanced(self, index: int, weights: int) -> None:
        """Block `index`, with `weights` quantized weights, is written and its output computed."""

    def step(self, what: str) -> None:
        """Something outside the blocks begins: reading the text, writing, verifying."""

    def say(self, what: str) -> None:
        """Something was chosen that a log should keep."""
