"""What an error of the prediction at each timestep does to the final image.

A few samples follow the float model from noise to image. Then once for each step they go there again: what the model
said before that step is said again, there a small random error is added, and the model answers for the rest of the way.
How far the end moves, squared, over the error squared, is that step's effect: the schedule's coefficients, and what the
later steps make good or make worse. On `demo/dit` it spans four decades: the first steps decide what is drawn, the last
ones correct nothing any more. The way is a transformer's own under its scheduler (`trajectory`) or its whole pipeline's
(`painting`); for `S` steps it takes `S (S + 1) / 2` passes of `SAMPLES` samples through the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quant.calibration.replay import copy
from quant.errors import CalibrationError
from quant.models.stream import first_tensor

SIZE = 0.02  # of the prediction's root mean square; 0.1 gives the same but for the first steps
SAMPLES = 8

Answer = Callable[[int, Callable[[], Any]], Any]
Draw = Callable[[Answer], Tensor]
"""Takes its samples from noise to image and returns the final latents float32 `[rows, ...]`. Wherever it would run the
model it goes on with `answer(n, ask)`, where `n` is the number of the step and `ask()` the model's own output. A step
may run the model several times, and on several copies of the rows one after another, as guidance does."""


def honest(_: int, ask: Callable[[], Any]) -> Any:
    """The `Answer` of the model itself."""
    return ask()


def effects(draws: Sequence[Draw], seed: int) -> list[float]:
    """For each step: squared movement of the end over the squared error of the prediction, over the samples of all
    `draws`. All that is said at a step of a sample, under guidance too, has the same error.

    Raises:
        CalibrationError: the latents leave the range of numbers, or `draws` take different numbers of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [list(_movements(draw, generator)) for draw in draws]
    if len({len(part) for part in parts}) > 1:
        raise CalibrationError(
            "samples took different numbers of steps, so no step has an effect of its own; leave trajectory.weighting "
            "uniform"
        )
    found = [sum(m for m, _ in step) / max(sum(e for _, e in step), 1e-300) for step in zip(*parts, strict=True)]
    if not all(math.isfinite(effect) for effect in found):
        raise CalibrationError("the latents are not finite at the end of the way from noise; try --dtype float32")
    return found


def _movements(draw: Draw, generator: torch.Generator) -> Generator[tuple[float, float]]:
    """For each step the squared movement of the end, and the squared error that was made there."""
    steps, said = list[int](), list[Any]()

    def listen(step: int, ask: Callable[[], Any]) -> Any:
        steps.append(step)
        said.append(copy(ask()))
        return copy(said[-1])

    end = draw(listen)
    for number in sorted(set(steps)):
        first = steps.index(number)
        known = first_tensor(said[first]).float()
        error = torch.randn((len(end), *known.shape[1:]), generator=generator) * known.square().mean().sqrt().cpu()
        error *= SIZE
        calls = count()

        def answer(step: int, ask: Callable[[], Any], number: int = number, first: int = first) -> Any:
            call = next(calls)  # noqa: B023 (used up before the next step)
            out = copy(said[call]) if call <= first else ask()
            return _with(out, error) if step == number else out  # noqa: B023

        yield float((draw(answer) - end).square().sum()), float(error.square().sum())


def _with(output: Any, error: Tensor) -> Any:
    """A model's output with `error` `[rows, ...]` in its main tensor, in each copy of the rows."""
    leaves, form = pytree.tree_flatten(output)
    place = next(n for n, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point())
    x = leaves[place]
    copies, rest = divmod(len(x), len(error))
    if rest:
        raise CalibrationError(
            f"the transformer answers {len(error)} samples with {len(x)} rows, so it is not known which row is whose; "
            "leave trajectory.weighting uniform"
        )
    leaves[place] = x + error.repeat(copies, *[1] * (x.dim() - 1)).to(x)
    return pytree.tree_unflatten(leaves, form)


def relative(found: Sequence[float], steps: Sequence[int], rows: Sequence[int]) -> list[float]:
    """The effects of the batches' `steps`, scaled to a mean of 1 over all of their `rows`."""
    mean = sum(found[step] * count for step, count in zip(steps, rows, strict=True)) / sum(rows)
    return [found[step] / mean if mean > 0 else 1.0 for step in steps]
