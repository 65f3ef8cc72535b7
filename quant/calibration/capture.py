"""Statistics of what a stage's sites read, from one block run on every batch.

A linear's input comes from a hook on it; since all sites of a stage read the same tensor, the first one called is
enough and the pass ends there. An expert's input is seen where it is multiplied: a function mode recognises the matrix
by its place inside the stack's memory, so every expert gets its own statistics and its own count of tokens, however the
architecture routes; one that multiplies a whole stack at once gives each expert zeros in place of the others' tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quant.calibration.activations import Activations
from quant.calibration.batch import timestep
from quant.calibration.replay import Replay, Stop
from quant.calibration.samples import Batch
from quant.calibration.statistics import HessianCollector, RangeCollector, Statistics
from quant.errors import CalibrationError
from quant.models.products import product
from quant.models.walk import Site

Outputs = Sequence[Any] | Activations  # a block's outputs, one nest per batch
Take = Callable[[int, torch.Tensor], None]  # expert (0 for a linear), its tokens [..., in]


class Stage:
    """Collectors for one stage: one for its shared input, or one per expert of its stack. `ranges`: what rounding its
    shared input will meet is collected too; its first token is always."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], cross: bool, ranges: bool = False) -> None:
        self.model = model
        self.site = sites[0]
        device = model.get_parameter(self.site.parameter).device
        self.collectors = {
            expert: HessianCollector(self.site.inputs, device=device, cross=cross)
            for expert in range(max(1, self.site.experts))
        }
        self.ranges = RangeCollector(self.site.inputs, device) if ranges else None
        self.first: torch.Tensor | None = None

    def watch(self, take: Take, alone: bool) -> AbstractContextManager[Any]:
        """A context in which `take(expert, x)` sees the stage's inputs; `alone`: the pass may end once they came."""
        if self.site.kind == "experts":
            return _ExpertInputs(self.model.get_parameter(self.site.parameter), take)

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            take(0, args[0])
            if alone:
                raise Stop

        return self.model.get_submodule(self.site.name).register_forward_pre_hook(hook)

    def take(self, weights: torch.Tensor | None, reference: torch.Tensor | None = None, time: float = 0.0) -> Take:
        """Adds what it is given to the collectors. `weights` `[B, T]`: of the batch's tokens; for linears only, since
        an expert's rows do not say which tokens they are. Of no dimension: of all of them. `time`: the batch's
        timestep."""
        given = None if self.site.kind == "experts" and weights is not None and weights.dim() else weights

        def add(expert: int, x: torch.Tensor) -> None:
            weights = given if given is None or given.dim() else given.to(x.device).expand(x.shape[:-1])
            if weights is not None and x.shape[:-1] not in (weights.shape, (weights.numel(),)):
                raise CalibrationError(
                    f"{self.site.name}: its inputs {list(x.shape)} are not those of the {list(weights.shape)} tokens "
                    "that the recipe weighs; set importance to null in the recipe"
                )
            self.collectors[expert].update(x, reference=reference, weights=weights)
            if self.first is None and x.numel():
                self.first = x.detach().reshape(-1, x.shape[-1])[0].float().clone()
            if self.ranges is not None:
                self.ranges.update(x, time)

        return add

    def finish(self) -> dict[int, Statistics]:
        try:
            found = {expert: self.collectors.pop(expert).finish() for expert in [*self.collectors]}  # its sum goes
            seen = None if self.ranges is None else self.ranges.finish()
            if self.site.kind == "linear":
                found = {0: replace(found[0], anchor=self.first)}
            return found if seen is None else {0: replace(found[0], peaks=seen[0], sample=seen[1])}
        except CalibrationError as error:
            raise CalibrationError(f"{self.site.name}: {error}") from None


class _ExpertInputs(TorchFunctionMode):
    """Sees every product with a matrix that lies inside one stack's memory."""

    def __init__(self, stack: torch.Tensor, take: Take) -> None:
        super().__init__()
        self.place = stack.untyped_storage().data_ptr()
        self.first, self.step = stack.storage_offset(), stack.stride(0)
        self.take = take

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = product(func, args)
        if used is not None and used[1].untyped_storage().data_ptr() == self.place:
            x, weight, _ = used
            if weight.dim() == 3:
                for expert in range(weight.shape[0]):
                    self.take(expert, x[expert][x[expert].any(-1)])  # a token for others is a row of zeros to it
            else:
                self.take((weight.storage_offset() - self.first) // self.step, x)
        return func(*args, **(kwargs or {}))


def collect(
    stages: Sequence[Stage], replay: Replay, index: int, batches: Sequence[Batch], previous: Outputs,
    weights: Sequence[torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Feeds the stages' collectors with block `index` on every batch; `previous[b]`: the earlier block's output,
    `weights[b]`: how much its tokens count."""
    for number, batch in enumerate(batches):
        with ExitStack() as watching:
            for stage in stages:
                take = stage.take(None if weights is None else weights[number], time=timestep(batch))
                watching.enter_context(stage.watch(take, alone=len(stages) == 1))
            replay.output(index, batch, previous[number], number)


def collect_matched(
    stage: Stage, replay: Replay, index: int, batches: Sequence[Batch], previous: Outputs, float_previous: Outputs,
    float_weights: Callable[[], AbstractContextManager[None]], weights: Sequence[torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """As `collect` for a stage of linears, with the float path's inputs of the same tokens (`Statistics.cross`)."""
    for number, batch in enumerate(batches):
        seen: list[torch.Tensor] = []
        with float_weights(), stage.watch(lambda _, x, seen=seen: seen.append(x.detach().clone()), alone=True):
            replay.output(index, batch, float_previous[number], number, path=1)
        take = stage.take(None if weights is None else weights[number], seen[0], timestep(batch))
        with stage.watch(take, alone=True):
            replay.output(index, batch, previous[number], number)
