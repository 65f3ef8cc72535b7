"""The proof that blocks form a chain: each, run from the output of the one before it alone, gives what it gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from quant.calibration.replay import Replay
from quant.errors import ModelError
from quant.models.products import main
from quant.models.source import first_line
from quant.models.weightless import same


def prove_chain(
    model: nn.Module, batch: Mapping[str, Any], chain: tuple[str, ...], outputs: Mapping[str, Any], whole: Any
) -> None:
    """Every block from its predecessor's output alone, then the head from the last block's."""
    names = [*(name or "the model" for name in chain), "the head"]
    expected = [*(outputs[name] for name in chain), whole]
    with Replay(model, chain) as replay:
        for index, name in enumerate(names if chain else []):
            previous = expected[index - 1] if index else None
            try:
                if index < len(chain):
                    got = replay.output(index, batch, previous)
                else:
                    got = main(replay.head(batch, previous))
                why = None if same(got, expected[index]) else "the results differ: a skip connection past a block?"
            except Exception as error:  # a model's own code may raise anything
                why = line(error)
            if why is not None and index == 0:
                raise ModelError(
                    f"{name}: does not give the same result twice ({why}); switch off what is random in it"
                )
            if why is not None:
                raise ModelError(
                    f"{name}: reads more than the output of {names[index - 1]} ({why}); models whose blocks do not "
                    "form a chain cannot be quantized block by block yet"
                )


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
