"""Quantizes one block: stage by stage, each on the inputs that the already quantized part of the model gives it.

A stage is a group of sites that read the same tensor. Its statistics are collected, its sites solved, and their float
weights replaced in place by the dequantized ones before the next stage is looked at ("true sequential" order). Sites of
a stage with one spec (q, k and v; gate and up) and the experts of a stack are solved together: the same codes in less
time. Small uniform ones are one matrix of more rows, trellises go in lockstep (`solvers/lockstep.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quant.calibration.activations import Activations
from quant.calibration.capture import Outputs, Stage, collect, collect_matched
from quant.calibration.remember import Remembered, finished
from quant.calibration.replay import Replay
from quant.calibration.samples import Batch
from quant.calibration.statistics import Statistics
from quant.kernels.packed import Packed, concatenate
from quant.kernels.spec import Smoothed, Spec, Uniform, rounds_inputs
from quant.memory import give_back
from quant.models.walk import Block, Site
from quant.order import threads, worth
from quant.plan import Plan
from quant.recipe import Recipe
from quant.recovery.placed import oriented
from quant.rounding import Rounding, unrounded
from quant.solvers.lockstep import goes, stackable
from quant.solvers.solution import Problem, solve_named

TOGETHER = 1 << 26
"""Weights up to which uniform sites are solved as one matrix. Larger ones keep a processor busy alone and only take
memory."""


@dataclass(frozen=True)
class Solved:
    """One site's packed weight. `error`: relative output error on its calibration inputs (see `solvers.solution`), or
    the relative squared error of the weight when data-free. `tokens`: seen by each matrix of the site."""

    site: Site
    spec: Spec
    packed: Packed
    error: float
    tokens: tuple[int, ...]
    notes: tuple[str, ...]
    seconds: float

    def record(self) -> dict[str, Any]:
        return {
            "site": self.site.name,
            "spec": self.spec.to_dict(),
            "shape": list(self.site.shape),
            "experts": self.site.experts,
            **({"end": self.site.end} if self.site.end else {}),
            "bits_per_weight": self.spec.bits_per_weight(self.site.shape),
            "nbytes": self.spec.nbytes(self.site.shape),
            "error": self.error if math.isfinite(self.error) else None,  # JSON knows no infinity
            "tokens": list(self.tokens),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 4),
        }


class BlockSolver:
    """Everything that solving a block needs beside the block. `float_store`: the float path's activations, for recipes
    that match it."""

    def __init__(
        self, replay: Replay, recipe: Recipe, plan: Plan, batches: Sequence[Batch], store: Outputs,
        float_store: Outputs | None, on_site: Callable[[Solved], None], room: Callable[[str], Activations],
        weights: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        """`room`: makes a store for the outputs of a submodule that later passes need no more compute. `weights`: how
        much each batch counts, of mean 1 over tokens."""
        self.replay, self.recipe, self.plan = replay, recipe, plan
        self.batches, self.store, self.float_store = batches, store, float_store
        self.on_site = on_site
        self.room = room
        self.remembered: list[Remembered] = []
        self.model: nn.Module = replay.model
        self.rounding = Rounding(replay.model)
        # of each batch's tokens in the block, where they differ
        self.weights = None if weights is None else [torch.tensor(weight) for weight in weights]

    def solve(self, index: int, block: Block, originals: dict[str, torch.Tensor]) -> list[Solved]:
        """Solves block `index` of the chain and leaves its dequantized weights in the model. `originals` is filled with
        the float weights that were replaced, if the recipe matches the float path or recovers."""
        stages = [tuple(s for s in stage if self.plan.specs[s.name] is not None) for stage in block.stages]
        stages = [stage for stage in stages if stage]
        if self.recipe.importance is not None and stages:
            self.weights = self.recipe.importance.weights(self.replay, index, self.batches, self.store)
        if self.recipe.calibration is None or not self.recipe.sequential:
            statistics = self._statistics_at_once(index, stages)
        else:
            statistics = None
        solved: list[Solved] = []
        for number, stage in enumerate(stages):
            give_back()
            stats = statistics[number] if statistics is not None else self._statistics(index, stage, originals)
            for sites in self._together(stage):
                for result in self._solve_sites(sites, stats):
                    self._replace(result.site, result.packed, originals)
                    self.on_site(result)
                    solved.append(result)
            if number + 1 < len(stages):
                self._remember(block, {s.name for stage in stages for s in stage}, {s.site.name for s in solved})
            del stats  # before the next stage's come
        return solved

    def _remember(self, block: Block, sites: set[str], solved: set[str]) -> None:
        """From now on the outputs of what is finished inside the block are computed once."""
        if self.recipe.calibration is None or not self.recipe.sequential:
            return
        known = {one.name for one in self.remembered}
        for name in finished(self.model.get_submodule(block.name), block.name, sites, solved):
            if name not in known:
                module = self.model.get_submodule(name)
                rooms = [self.room(f"{name}{path}") for path in ("", " float")]
                self.remembered.append(Remembered(name, module, self.replay, rooms))

    def forget(self) -> None:
        """The block is done with: its outputs are stored."""
        while self.remembered:
            self.remembered.pop().close()

    def _statistics_at_once(self, index: int, stages: Sequence[Sequence[Site]]) -> list[dict[int, Statistics]]:
        if self.recipe.calibration is None:
            free = lambda site: Statistics.identity(site.inputs, self._device())  # noqa: E731 (all experts share one)
            return [dict.fromkeys(range(max(1, stage[0].experts)), free(stage[0])) for stage in stages]
        if self.float_store is not None:  # nothing is solved yet, so one stage after another sees what all would
            return [self._statistics(index, stage, {}) for stage in stages]
        watched = [Stage(self.model, stage, cross=False, ranges=self._ranged(stage)) for stage in stages]
        collect(watched, self.replay, index, self.batches, self.store, self.weights)
        return [stage.finish() for stage in watched]

    def _statistics(
        self, index: int, stage: Sequence[Site], originals: dict[str, torch.Tensor]
    ) -> dict[int, Statistics]:
        matched = self.float_store is not None and stage[0].kind == "linear"
        watched = Stage(self.model, stage, cross=matched, ranges=self._ranged(stage))
        if matched and self.float_store is not None:
            swap = lambda: float_weights(self.model, originals)  # noqa: E731 (a fresh context for each batch)
            where = (self.replay, index, self.batches, self.store)
            collect_matched(watched, *where, self.float_store, swap, self.weights)
        else:
            collect([watched], self.replay, index, self.batches, self.store, self.weights)
        return watched.finish()

    def _ranged(self, stage: Sequence[Site]) -> bool:
        """Whether a spec of the stage asks for more of its inputs than their Hessian."""
        specs = [self.plan.specs[site.name] for site in stage]
        return any(spec is not None and (isinstance(spec, Smoothed) or rounds_inputs(spec)) for spec in specs)

    def _together(self, stage: Sequence[Site]) -> list[list[Site]]:
        """The sites of a stage in groups that are solved together: they share a Hessian and a spec, and rows, or the
        sequences of a trellis, know nothing of each other. Each gets the codes that it would get alone."""
        groups = list[list[Site]]()
        for site in stage:
            spec, group = self.plan.specs[site.name], groups[-1] if groups else []
            alike = all(one.kind == site.kind == "linear" and self.plan.specs[one.name] == spec for one in group)
            fits = isinstance(spec, Uniform) and sum(s.out for s in (*group, site)) * site.inputs <= TOGETHER
            if spec is not None and goes(spec):
                fits = len(group) < stackable(site.shape, self._device())
            if group and alike and fits:
                group.append(site)
            else:
                groups.append([site])
        return groups

    def _solve_sites(self, sites: Sequence[Site], stats: dict[int, Statistics]) -> list[Solved]:
        """An expert stack, or linears of one spec."""
        spec, began = self.plan.specs[sites[0].name], time.perf_counter()
        assert spec is not None
        with threads(worth(sum(site.out * site.inputs for site in sites))):
            if sites[0].kind == "experts":
                return [self._solve_experts(sites[0], spec, stats, began)]
            metrics = [(self.plan.metrics(site) or [None])[0] for site in sites]
            problems = [self._problem(self._weight(site), stats[0], m) for site, m in zip(sites, metrics, strict=True)]
            parts = solve_named(self.recipe.solver, [site.name for site in sites], problems, spec)
        each = (time.perf_counter() - began) / sum(site.out for site in sites)
        tokens = (stats[0].tokens,)
        return [
            Solved(site, spec, part.packed, part.error, tokens, part.notes, each * site.out)
            for site, part in zip(sites, parts, strict=True)
        ]

    def _weight(self, site: Site) -> torch.Tensor:
        return oriented(self.model.get_parameter(site.parameter), site).float()

    def _solve_experts(self, site: Site, spec: Spec, stats: dict[int, Statistics], began: float) -> Solved:
        tokens = tuple(stats[e].tokens for e in sorted(stats))
        metrics, weight = self.plan.metrics(site) or [None] * site.experts, self._weight(site)
        stats, notes = self._with_priors(stats)
        if self.float_store is not None:
            notes = ("matches its own outputs: the float path may send a token to other experts", *notes)
        packed, error = list[Packed](), 0.0
        step = max(1, stackable(weight.shape[1:], weight.device) // 2) if goes(spec) else 1  # in two bases
        for start in range(0, site.experts, step):
            part = range(start, min(start + step, site.experts))
            problems = [self._problem(weight[e], stats[e], metrics[e]) for e in part]
            solved = solve_named(self.recipe.solver, [f"{site.name}[{e}]" for e in part], problems, spec)
            for e, one in zip(part, solved, strict=True):
                notes += tuple(f"expert {e}: {note}" for note in one.notes)
                packed.append(one.packed)
                error += one.error * max(1, tokens[e])
                stats[e].forget()
        error /= sum(max(1, count) for count in tokens)
        return Solved(site, spec, concatenate(packed), error, tokens, notes, time.perf_counter() - began)

    def _problem(self, weight: torch.Tensor, statistics: Statistics, metric: torch.Tensor | None) -> Problem:
        return Problem(weight, statistics, None if metric is None else metric.to(weight.device))

    def _with_priors(self, stats: dict[int, Statistics]) -> tuple[dict[int, Statistics], tuple[str, ...]]:
        """Experts with too few tokens get their whole stack's mean Hessian as a prior."""
        minimum = self.recipe.experts.minimum_tokens
        few = [e for e, s in stats.items() if s.tokens < minimum]
        total = sum(s.tokens for s in stats.values())
        if not few or self.recipe.calibration is None:
            return stats, ()
        if total == 0:
            free = Statistics.identity(stats[0].features, stats[0].hessian.device)
            return dict.fromkeys(stats, free), ("no expert saw a token: rounded without data",)
        pooled = torch.zeros_like(stats[0].hessian)
        for s in stats.values():
            pooled += s.hessian * (s.tokens / total)
        mended = {
            e: s.with_prior(pooled, minimum, "its stack's mean Hessian") if e in few else s for e, s in stats.items()
        }
        return mended, tuple(f"expert {e}: saw {stats[e].tokens} tokens, {mended[e].prior}" for e in few)

    def _replace(self, site: Site, packed: Packed, originals: dict[str, torch.Tensor]) -> None:
        parameter = self.model.get_parameter(site.parameter)
        if self.float_store is not None or self.recipe.recovery is not None:
            originals[site.parameter] = parameter.data.clone()
        fill(parameter, site, packed)
        self.rounding.put(site, packed)

    def _device(self) -> torch.device:
        return next(p.device for p in self.model.parameters() if p.device.type != "meta")


def fill(parameter: torch.Tensor, site: Site, packed: Packed) -> None:
    """Writes the dequantized weight into a float parameter, matrix by matrix."""
    target = oriented(parameter, site)
    rows = site.out
    for expert in range(max(1, site.experts)):
        part = packed.dequantize(parameter.dtype, expert * rows, (expert + 1) * rows).to(parameter.device)
        (target[expert] if site.experts else target).copy_(part)


@contextmanager
def float_weights(model: nn.Module, originals: dict[str, torch.Tensor]) -> Generator[None]:
    """The model with the float weights of already solved sites back in place, and no input rounded."""
    kept = {name: model.get_parameter(name).data for name in originals}
    for name, weight in originals.items():
        model.get_parameter(name).data = weight
    try:
        with unrounded():
            yield
    finally:
        for name, weight in kept.items():
            model.get_parameter(name).data = weight
