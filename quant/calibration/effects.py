"""What an error of the prediction at each timestep does to the final image.

A few samples follow the float model from noise to image. Then once for each step they go the rest of the way again,
with a small random error added to what the model says there. How far the end moves, squared, over the error squared, is
that step's effect: the schedule's coefficients, and what the later steps make good or make worse. On `demo/dit` it
spans four decades: the first steps decide what is drawn, the last ones correct nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

SIZE = 0.02  # of the prediction's root mean square; 0.1 gives the same but for the first steps
SAMPLES = 8


def effects(
    say: Callable[[Any, int, Tensor], Tensor],
    step: Callable[[Any, int, Tensor, Tensor], Tensor],
    schedule: Any,
    x: Tensor,
    steps: int,
    seed: int,
) -> list[float]:
    """For each of `steps` steps: squared movement of the end over the squared error of the prediction.

    `say(schedule, n, x)`: the prediction at step `n`; `step(schedule, n, said, x)`: the latents after it, and what the
    schedule remembers; `x` `[rows, ...]`: noise.
    """
    generator = torch.Generator().manual_seed(seed)
    way: list[tuple[Any, Tensor, Tensor]] = []
    for number in range(steps):
        before = deepcopy(schedule)
        said = say(schedule, number, x)
        way.append((before, x, said))
        x = step(schedule, number, said, x)
    found: list[float] = []
    for number, (schedule, start, said) in enumerate(way):
        error = torch.randn(said.shape, generator=generator) * said.square().mean().sqrt() * SIZE
        moved = step(schedule, number, said + error, start)
        for later in range(number + 1, steps):
            moved = step(schedule, later, say(schedule, later, moved), moved)
        found.append(float((moved - x).square().sum() / error.square().sum()))
    return found


def relative(found: Sequence[float], steps: Sequence[int], rows: Sequence[int]) -> list[float]:
    """The effects of the batches' `steps`, scaled to a mean of 1 over all of their `rows`."""
    mean = sum(found[step] * count for step, count in zip(steps, rows, strict=True)) / sum(rows)
    return [found[step] / mean if mean > 0 else 1.0 for step in steps]
