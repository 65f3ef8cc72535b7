"""Runs one block of a model at a time, inside the model's own forward pass.

Block k needs what the whole model would give it: hidden states, but also masks, rotary tables, position ids, whatever
the architecture computes around its blocks. Instead of recording and guessing (which breaks for models whose layers get
different masks), a `Replay` calls the real forward with every other block replaced: those before k answer at once with
the stored output of block k-1, and k's own output ends the pass. The cost is the glue between blocks, a few
microseconds each; the gain is that no model needs code of its own. `models/trace` proves for each model that this gives
what the whole pass gives.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from quant.calibration.notes import before, left, merged, parted, pin, written
from quant.errors import ModelError


class Stop(BaseException):
    """Ends a forward pass early. A BaseException, so that no `except Exception` in a model swallows it."""


class Replay(ExitStack):
    """A context in which `model` can be run block by block. `names`: all blocks of the chain in call order."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.number: int | None = None  # of the batch in the pass under way, and its path, for `remember`
        self.path = 0
        self._active = 0
        self._given: Any = None  # what block `_active` gets from the one before it
        self._filler: Any = None  # what the blocks before that answer; its numbers never arrive anywhere
        self._gave: dict[tuple[Any, ...], Any] = {}  # shapes of a block's output, where not all have the same
        self._shapes: tuple[Any, ...] = ()  # of the batch under way
        self._result: Any = None
        self._reached = False

    def __enter__(self) -> Self:
        self.enter_context(cacheless(self.model))
        for index, name in enumerate(self.names):
            module = self.model.get_submodule(name)
            self.enter_context(instead(module, "forward", self._stand_in(index, module.forward)))
        return self

    def _stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            output, notes = parted(self._given)
            if index == self._active - 1:
                pin(notes, args, kwargs)
                return output
            if index < self._active:
                return self._fill(index)
            if index > self._active:
                raise ModelError(
                    f"{self.names[index]}: called before {self.names[self._active]}, after which it came in the traced "
                    "pass; a model whose order of blocks depends on its input cannot be run block by block"
                )
            self._reached = True
            seen = before(args, kwargs)
            output = forward(*args, **kwargs)
            self._gave[(index, *self._shapes)] = _shapes(output)
            self._result = left(output, merged(notes, written(seen, args, kwargs)))
            raise Stop

        return stand_in

    def _fill(self, index: int) -> Any:
        """Something of the shapes that block `index` gave when it ran; blocks of one kind share it."""
        gave = self._gave.get((index, *self._shapes))
        if gave is None or gave == _shapes(self._filler):
            return self._filler
        return pytree.tree_map_only(Shape, lambda x: torch.zeros(x.size, dtype=x.dtype, device=x.device), gave)

    def output(
        self, index: int, batch: Mapping[str, Any], previous: Any, number: int | None = None, path: int = 0
    ) -> Any:
        """Block `index`'s output on a batch, given the output of the block before it (None for the first). `number`:
        the batch's, where what it gave earlier on this `path` (0 quantized, 1 float) may be used again (`remember`).

        A hook inside the block may raise `Stop` to end the pass early; the result is then None.

        Raises:
            ModelError: this batch does not take the model through block `index`.
        """
        self.number, self.path = number, path
        self._result, self._reached = None, False
        try:
            with self._answering(index, batch, previous), suppress(Stop):
                self.model(**batch)
        finally:
            self.number = None
        result, self._result = self._result, None
        if not self._reached:
            raise ModelError(
                f"{self.names[index] or 'the model'}: not reached by this batch; every batch must take the same way"
            )
        return result

    def head(self, batch: Mapping[str, Any], last: Any) -> Any:
        """The whole model's output, given the output of the last block."""
        with self._answering(len(self.names), batch, last):
            return self.model(**batch)

    @contextmanager
    def _answering(self, index: int, batch: Mapping[str, Any], previous: Any) -> Generator[None]:
        self._active = index
        self._shapes = tuple(x.shape for x in pytree.tree_leaves(dict(batch)) if isinstance(x, torch.Tensor))
        self._given = copy(previous)
        self._filler = copy(parted(previous)[0]) if index > 1 else None
        try:
            yield
        finally:
            self._given = self._filler = None


@dataclass(frozen=True)
class Shape:
    """What a tensor looks like without its numbers."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device


def _shapes(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda x: Shape(x.shape, x.dtype, x.device), tree)


def copy(tree: Any) -> Any:
    """Own memory for every tensor of a nest: models may write into what they are given."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, tree)


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Generator[None]:
    """`value` in the place of an attribute of `owner`; one of its class's shows again behind it."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


@contextmanager
def cacheless(model: nn.Module) -> Generator[None]:
    """No pass here is continued, so none needs to keep keys and values; some models keep them unless told not to."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kept = [(part, part.use_cache) for part in (config, text) if hasattr(part, "use_cache")]
    try:
        for part, _ in kept:
            part.use_cache = False
        yield
    finally:
        for part, value in reversed(kept):
            part.use_cache = value
