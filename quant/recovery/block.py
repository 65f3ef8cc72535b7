"""A recovery's task, from a block that was solved inside the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from quant.blocks import Solved, fill
from quant.calibration.activations import Activations
from quant.calibration.replay import Replay
from quant.calibration.samples import Batch
from quant.recovery.placed import oriented
from quant.recovery.tuning import Recovered, Task


def task(
    replay: Replay, index: int, batches: Sequence[Batch], store: Activations, targets: Activations,
    solved: Sequence[Solved], originals: dict[str, torch.Tensor], on_step: Callable[[int, int, float], None],
) -> Task:  # fmt: skip
    """Block `index`'s. `store`: its inputs on the quantized path; `targets`: its outputs on the float path."""
    sites, packed = [one.site for one in solved], {one.site.name: one.packed for one in solved}
    weights = {one.site.name: _matrix(one, originals) for one in solved}
    output = lambda number: replay.output(index, batches[number], store[number])  # noqa: E731
    rest = targets.__getitem__, index, on_step
    return Task(replay.model, replay.names[index], sites, packed, weights, len(batches), output, *rest)


def put(replay: Replay, solved: Sequence[Solved], recovered: Recovered) -> list[Solved]:
    """The recovered weights in the model and in the records."""
    changed: list[Solved] = []
    for one in solved:
        better = replace(one, packed=recovered.packed[one.site.name])
        fill(replay.model.get_parameter(one.site.parameter), one.site, better.packed)
        changed.append(better)
    return changed


def record(recovered: Recovered | None) -> dict[str, Any]:
    """What a block's record says of it."""
    return {} if recovered is None else {"recovery": {"before": recovered.before, "after": recovered.after}}


def _matrix(solved: Solved, originals: dict[str, torch.Tensor]) -> torch.Tensor:
    return oriented(originals[solved.site.parameter], solved.site).float().reshape(solved.site.shape)
