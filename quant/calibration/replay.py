"""Runs one block of a model at a time, inside the model's own forward pass.

Block k needs what the whole model would give it: hidden states, but also masks, rotary tables, position ids, whatever
the architecture computes around its blocks. Instead of recording and guessing (which breaks for models whose layers get
different masks), a `Replay` calls the real forward with every other block replaced: those before k answer at once with
the stored output of block k-1, and k's own output ends the pass. The cost is the glue between blocks, a few
microseconds each; the gain is that no model needs code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


class Stop(BaseException):
    """Ends a forward pass early. A BaseException, so that no `except Exception` in a model swallows it."""


class Replay:
    """A context in which `model` can be run block by block. `names`: all blocks of the chain in call order."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self._active = 0
        self._given: Any = None
        self._result: Any = None
        self._only_arguments = False

    def __enter__(self) -> Replay:
        for index, name in enumerate(self.names):
            module = self.model.get_submodule(name)
            module.forward = self._stand_in(index, module.forward)  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            del self.model.get_submodule(name).forward  # the class's own forward shows again

    def _stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if index < self._active:
                return self._given
            if self._only_arguments:
                self._result = (args, kwargs)
            else:
                self._result = forward(*args, **kwargs)
            raise Stop

        return stand_in

    def output(self, index: int, batch: Mapping[str, Any], previous: Any) -> Any:
        """Block `index`'s output on a batch, given the output of the block before it (None for the first).

        A hook inside the block may raise `Stop` to end the pass early; the result is then None.
        """
        return self._run(index, batch, previous, only_arguments=False)

    def arguments(self, index: int, batch: Mapping[str, Any], previous: Any) -> Any:
        """The `(args, kwargs)` that block `index` would be called with."""
        return self._run(index, batch, previous, only_arguments=True)

    def head(self, batch: Mapping[str, Any], last: Any) -> Any:
        """The whole model's output, given the output of the last block."""
        self._active = len(self.names)
        self._given = copy(last)
        return self.model(**batch)

    def _run(self, index: int, batch: Mapping[str, Any], previous: Any, only_arguments: bool) -> Any:
        self._active, self._only_arguments = index, only_arguments
        self._given = copy(previous)
        self._result = None
        try:
            self.model(**batch)
        except Stop:
            pass
        finally:
            self._given = None
        result, self._result = self._result, None
        return result


def copy(tree: Any) -> Any:
    """Own memory for every tensor of a nest: models may write into what they are given."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, tree)
