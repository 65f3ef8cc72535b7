"""Everything up to the first computation: the model found and walked, its sites planned, its calibration windows drawn.

The pipeline runs what is prepared here; the dry run rehearses it; the writer and the verification read it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant.calibration import painting, trajectory
from quant.calibration.samples import Batch, Samples, draw, moved, noise
from quant.errors import SettingsError
from quant.inputs import inputs, text_of
from quant.kernels.spec import Uniform
from quant.machine import versions
from quant.models.arguments import build, cast
from quant.models.diffusion import DiffusionSkeleton, components
from quant.models.foldable import find as find_folds
from quant.models.folding import Folded
from quant.models.skeleton import Skeleton
from quant.models.source import COMPONENT, Source, find
from quant.models.walk import Walk, turned, walk
from quant.order import deterministic, threads
from quant.place import Settings as Settings
from quant.plan import Plan, given
from quant.planning import allowance, measured, planned, weighed_rows
from quant.progress import Progress
from quant.recipe import Recipe
from quant.recovery.tunable import check_tunable
from quant.recovery.tuning import BlockTuning
from quant.solvers.nearest import Nearest

TRACE_TOKENS = 16
TRACE_ROWS = 2
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Prepared:
    """A model that was walked and planned, with its calibration inputs: all that is known before work starts. `draw`:
    makes them; a diffusion transformer's own run to get there is work, and waits until they are asked for, as does the
    decision whether windows of text begin as texts do, unless `begun` says so. `make`: the
    plan, from them where it is measured. `folded`: the rotations that the skeleton's weights are loaded with."""

    source: Source
    skeleton: Skeleton
    walk: Walk
    make: Callable[[Settings, Samples | None], Plan]
    draw: Callable[..., Samples]
    recipe: Recipe
    settings: Settings
    folded: Folded = field(default_factory=Folded)

    @cached_property
    def samples(self) -> Samples:
        return self.draw()

    @cached_property
    def plan(self) -> Plan:
        plan = self.make(self.settings, self.samples if self.measures else None)
        for name, spec in plan.specs.items() if isinstance(self.recipe.solver, Nearest) else ():
            if spec is not None and not isinstance(spec.core, Uniform):
                raise SettingsError(
                    f"{name}: round to nearest knows uniform grids, and this is a {spec.core.layout}; take another "
                    "recipe, or another spec"
                )
        if self.recipe.distillation is not None or isinstance(self.recipe.recovery, BlockTuning):
            for spec in plan.specs.values():
                if spec is not None:
                    check_tunable(spec)
        if self.recipe.distillation is not None:
            vectors = {name for name, one in self.skeleton.model.named_parameters() if one.dim() == 1}
            self.recipe.distillation.check({site.name for site in self.walk.sites} | vectors)
        self.folded.packed = frozenset(s.parameter for s in self.walk.sites if plan.specs[s.name] is not None)
        return plan

    @property
    def measures(self) -> bool:
        """Whether the plan is made by what errors cost."""
        costs = measured(self.recipe, self.source)
        return bool(self.walk.sites) and (costs or weighed_rows(self.recipe, self.source, self.walk, self.settings))

    @cached_property
    def outline(self) -> tuple[Batch, int, int]:
        """A batch like those of `samples`, how many there are, and the rows of a sample."""
        calibration, skeleton = self.recipe.calibration, self.skeleton
        if calibration is None or not isinstance(skeleton, DiffusionSkeleton):
            batches = self.draw(begun=False).batches  # of the same shape, whatever is decided
            return batches[0], 0 if calibration is None else len(batches), 1
        if painting.complete(self.source) is None:
            return painting.outline(skeleton, self.walk.chain, self.recipe)
        return trajectory.outline(skeleton, calibration, self.recipe.trajectory)

    @property
    def decided(self) -> Recipe:
        """The recipe, with what it leaves to the model said."""
        calibration = self.recipe.calibration
        if calibration is None or calibration.bos is not None:
            return self.recipe
        bos = not self.source.is_diffusion and self.samples.bos
        return replace(self.recipe, calibration=replace(calibration, bos=bos))

    @property
    def threads(self) -> int:
        """CPU threads of the run."""
        return self.settings.threads or torch.get_num_threads()

    def in_order(self) -> AbstractContextManager[None]:
        """The run's sums are added in one order (`order.py`)."""
        return deterministic(self.settings.device, self.recipe.trains and not self.source.is_diffusion)

    def windows(self) -> tuple[Batch, ...]:
        """What the end-to-end tuning trains on, if not on `samples`: windows of the same text, drawn by the next
        seed, which may overlap those."""
        calibration, distillation = text_of(self.decided.calibration, self.source), self.recipe.distillation
        if calibration is None or distillation is None or not distillation.samples or self.source.is_diffusion:
            return ()
        text = replace(calibration, samples=distillation.samples, seed=calibration.seed + 1)
        return draw(text, self.source, self.skeleton.model).batches

    def probe(self) -> Batch:
        """What the verification runs on: the first window's first tokens, or a sample of its own."""
        if self.samples.probe is not None:
            return moved(self.samples.probe, self.settings.device)
        first = self.samples.batches[0]
        return {key: value[:1, :PROBE_TOKENS].to(self.settings.device) for key, value in first.items()}

    def known(self) -> dict[str, Any]:
        """What of `identity` takes no time to tell."""
        part = self.source.inside
        named = {"component": part} if part not in ("", COMPONENT) else {}
        return {
            "model": {"name": self.source.name, "sha256": self.source.fingerprint(), **named},
            "recipe": self.decided.to_dict(),
            "compute": {
                "device": self.settings.device,
                "dtype": self.settings.dtype,
                "threads": self.threads,
                "machine": platform.machine(),
            },
            "versions": versions(),
        }

    def identity(self) -> dict[str, Any]:
        """What two runs must share to give the same bytes."""
        times = self.samples.by_timestep()
        folding = {"folding": {"folded": self.folded.said}} if self.recipe.folding is not None else {}
        return {
            **self.known(),
            **folding,
            "plan": self.plan.to_dict(),
            **({"rows": self.plan.fingerprint()} if self.plan.rows else {}),
            "calibration": {
                "text": self.samples.text,
                "sha256": self.samples.sha256,
                "tokens_sha256": self.samples.tokens_sha256(),
                **({"timesteps": times} if times else {}),
                **({"begun": self.samples.bos} if self.recipe.calibration and self.decided != self.recipe else {}),
            },
        }


def prepare(
    model: str, recipe: Recipe, settings: Settings | None = None, progress: Progress | None = None, part: str = ""
) -> Prepared:
    """Everything up to the first computation: find the model, walk it, plan it, draw the calibration windows. `part`:
    which component of a pipeline, its transformer without."""
    settings, progress = settings or Settings(), progress or Progress()
    progress.step("reading the model")
    source = find(model, part)
    for name in () if part or not source.inside else sorted({*components(source.home)} - {COMPONENT}):
        if name.startswith(COMPONENT):  # one for the first steps, another for the last
            progress.say(f"note: its {name} stays float; --components {COMPONENT},{name} packs both")
    skeleton = skeleton_of(source, settings)
    found = _walk(skeleton, recipe, progress)
    skeleton.lent = found.lent
    folded = _fold(skeleton, found, recipe, settings, progress)
    if folded.untied:
        skeleton.untie()
        found = _walk(skeleton, recipe, progress)
    if recipe.folding is not None and not recipe.folding.online:
        found = turned(found, folded.turned)
    make = lambda place, samples: planned(skeleton, found, recipe, place, samples, progress)  # noqa: E731
    prepared = Prepared(
        source, skeleton, found, make, inputs(skeleton, found, recipe, settings, progress), recipe, settings, folded
    )
    if measured(recipe, source):  # what is wrong is said now
        allowance(recipe, found, settings)
    else:
        _ = replace(prepared, make=lambda place, _: make(place, None)).plan
    return prepared


def _walk(skeleton: Skeleton, recipe: Recipe, progress: Progress) -> Walk:
    ends = recipe.embeddings is not None
    if ends and skeleton.source.is_diffusion:
        progress.say("note: a diffusion transformer has no embedding of tokens: --embedding-bits changes nothing")
        ends = False
    found = walk(skeleton.model, _trace(skeleton), only=recipe.only, skip=recipe.skip, ends=ends)
    if ends and not found.ends:
        reasons = [f"{name}: {why}" for name, why in found.left.items() if "embed" in name or "head" in name]
        why = "; ".join(reasons) or "the model has none"
        said = f"embeddings: no embedding or head that could be packed ({why})"
        if not skeleton.source.inside:
            raise SettingsError(f"{said}; leave it out")
        progress.say(f"note: {skeleton.source.inside}: {said}; they stay float")  # other components may have some
    return found


def _fold(skeleton: Skeleton, found: Walk, recipe: Recipe, settings: Settings, progress: Progress) -> Folded:
    """Finds what can be folded, and has the skeleton's weights loaded with it."""
    if recipe.folding is None:
        return Folded()
    progress.step("proving which rotations can be folded")
    alone = skeleton_of(skeleton.source, replace(settings, dtype="float32"), lent=found.lent)
    batch = _trace(alone) if isinstance(alone, DiffusionSkeleton) else noise(alone.model, TRACE_TOKENS).batches[0]
    with threads(settings.threads or torch.get_num_threads()):
        skeleton.change = folded = find_folds(alone, found.chain, batch, recipe.folding)
    return folded


def with_plan(prepared: Prepared, plan: Plan | None, told: Path) -> Prepared:
    """With a plan that was made before for these sites, and what the plan file says now. Where none was made yet, with
    what the run's plan file said, which is kept as `told`."""
    if plan is None and prepared.settings.plan is None and told.exists():
        return replace(prepared, settings=replace(prepared.settings, plan=told))
    if plan is None or plan.specs.keys() != {site.name for site in prepared.walk.all}:
        return prepared
    plan = replace(plan, specs=plan.specs | given(prepared.settings, prepared.walk))
    return replace(prepared, make=lambda *_: plan)


def settled(prepared: Prepared) -> Prepared:
    """With the plan that is carried out: of a diffusion transformer, it needs the calibration inputs, to see whose
    first token stays in float."""
    recipe, source = prepared.recipe, prepared.source
    if not source.is_diffusion or recipe.calibration is None or recipe.average is not None:
        return prepared  # an average was planned with them, or leaves no room
    samples = prepared.samples
    plan = prepared.make(prepared.settings, samples)
    return replace(prepared, make=lambda *_: plan, draw=lambda **_: samples)


def skeleton_of(
    source: Source, settings: Settings, put: Callable[[nn.Module], None] | None = None,
    lent: frozenset[str] = frozenset(),
) -> Skeleton:  # fmt: skip
    """The skeleton of a model of either kind. `put`: see `Skeleton`; `lent`: known of it already."""
    kind = DiffusionSkeleton if source.is_diffusion else Skeleton
    skeleton = kind(source, dtype=getattr(torch, settings.dtype), device=settings.device, prepare=put)
    skeleton.lent = lent
    return skeleton


def _trace(skeleton: Skeleton) -> Batch:
    """What the pass that finds the layers runs on."""
    if isinstance(skeleton, DiffusionSkeleton):
        return cast(build(skeleton.model, skeleton.form.layout, skeleton.form.traced, TRACE_ROWS), skeleton.dtype)
    return {"input_ids": torch.zeros((1, TRACE_TOKENS), dtype=torch.int64)}
