"""Proves that blocks form a chain: from the output of the one before it alone, each gives what it gave in the pass.

Some models have lists of blocks that do not: Lumina's refine the text and the noise apart from each other, Chroma's
make all modulations from the timestep; the first block of the next list reads more than the last of these gave. Where
such lists, whole, have fewer weights than those behind them, they are no part of the chain: they stay float and in
memory, like an embedder, and run in every replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from quant.calibration.replay import Replay
from quant.errors import ModelError
from quant.models.source import first_line
from quant.models.stream import first_tensor
from quant.models.weightless import same


class Broken(ModelError):
    """Block number `index` of `chain` reads more than the output of the one before it."""

    def __init__(self, chain: tuple[str, ...], index: int, why: str) -> None:
        self.chain, self.index = chain, index
        name = chain[index] if index < len(chain) else "the head"
        super().__init__(
            f"{name}: reads more than the output of {chain[index - 1] or 'the model'} ({why}); models whose blocks do "
            "not form a chain cannot be quantized block by block yet"
        )

    def before(self, model: nn.Module) -> tuple[str, ...]:
        """The blocks that may be left out of the chain. Raises itself where it is broken inside a list, or where they
        would be most of it."""
        names, size = {True: set[str](), False: set[str]()}, {True: 0, False: 0}
        for number, block in enumerate(self.chain):
            early = number < self.index
            names[early].add(block.rpartition(".")[0])
            size[early] += sum(parameter.numel() for parameter in model.get_submodule(block).parameters())
        if names[True] & names[False] or size[True] >= size[False]:
            raise self
        return self.chain[: self.index]


def prove(
    model: nn.Module, batch: Mapping[str, Any], chain: tuple[str, ...], outputs: Mapping[str, Any], whole: Any
) -> None:
    """Every block from its predecessor's output alone, then the head from the last block's.

    Raises:
        ModelError: it is not so; `Broken` but for the first.
    """
    expected = [*(outputs[name] for name in chain), whole]
    with Replay(model, chain) as replay:
        for index in range(len(expected) if chain else 0):
            previous = expected[index - 1] if index else None
            try:
                if index < len(chain):
                    got = replay.output(index, batch, previous)
                else:
                    got = first_tensor(replay.head(batch, previous))
                why = None if same(got, expected[index]) else "the results differ: a skip connection past a block?"
            except Exception as error:  # a model's own code may raise anything
                why = line(error)
            if why is not None and index == 0:
                raise ModelError(
                    f"{chain[0] or 'the model'}: does not give the same result twice ({why}); switch off what is "
                    "random in it"
                )
            if why is not None:
                raise Broken(chain, index, why)


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
