"""The calibration inputs of a run: windows of a text, or what a diffusion transformer meets on its way to an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from quant.calibration import painting, trajectory
from quant.calibration.beginning import calibrates_behind
from quant.calibration.samples import Samples, context_length, draw, load_tokenizer, noise
from quant.models.diffusion import DiffusionSkeleton, scheduler
from quant.models.skeleton import Skeleton
from quant.models.source import Source
from quant.models.stream import Forward
from quant.models.walk import Walk
from quant.order import threads
from quant.place import Settings
from quant.planning import weighed
from quant.progress import Progress
from quant.recipe import Calibration, Recipe


def inputs(
    skeleton: Skeleton, found: Walk, recipe: Recipe, settings: Settings, progress: Progress
) -> Callable[..., Samples]:
    """Makes a run's calibration inputs; a diffusion transformer's own run to get there is work. `begun`: whether
    windows of a text stand behind the token that begins one, where the recipe leaves that to the model and nobody asked
    it."""
    if isinstance(skeleton, DiffusionSkeleton):
        return lambda **_: _follow(skeleton, found, recipe, settings, progress)
    progress.step("reading the calibration text")
    calibration = text_of(recipe.calibration, skeleton.source)
    if calibration is None:
        return lambda **_: noise(skeleton.model)
    drawn = draw(calibration, skeleton.source, skeleton.model)
    if calibration.sequence_length > (most := context_length(skeleton.model)):
        progress.say(f"note: calibration windows have {most} tokens, the most that this model takes")

    @cache
    def samples(begun: bool | None = None) -> Samples:
        if calibration.bos is None and begun is None:
            first = drawn.batches[0]["input_ids"][0]
            with threads(settings.threads or torch.get_num_threads()):
                begun = calibrates_behind(skeleton, found.chain, load_tokenizer(skeleton.source), first, progress)
        again = calibration.bos is None and begun
        return draw(replace(calibration, bos=True), skeleton.source, skeleton.model) if again else drawn

    return samples


def text_of(calibration: Calibration | None, source: Source) -> Calibration | None:
    """The calibration of a model that reads text."""
    given = Path(calibration.text) if calibration is not None else Path()
    if calibration is not None and source.inside and (given.suffix == ".safetensors" or given.is_dir()):
        return replace(calibration, text=Calibration.text)  # what was given is for the transformer
    return calibration


def _follow(
    skeleton: DiffusionSkeleton, found: Walk, recipe: Recipe, settings: Settings, progress: Progress
) -> Samples:
    if recipe.calibration is None:
        return trajectory.noise(skeleton)
    missing = painting.complete(source := skeleton.source)
    with threads(settings.threads or torch.get_num_threads()):
        if missing is None:
            progress.step("running the pipeline from noise to image")
            return painting.follow(skeleton, found.chain, recipe, settings.spill_bytes, weighed(recipe, source))
        progress.step("following the model from noise to image")
        if "FlowMatch" in type(scheduler(source)).__name__:  # no answer of the model tells the direction
            progress.say(
                f"note: its pipeline was not run ({missing}), so time runs as its scheduler counts; of a model that "
                "counts backwards (Lumina, Z-Image) those are the wrong steps: give its whole pipeline"
            )
        with Forward(skeleton, found.chain, settings.spill_bytes) as forward:
            samples = trajectory.follow(skeleton, forward, recipe, weighed(recipe, source))
    said = f"; the pipeline was not run: {missing}" if source.inside else ""
    return replace(samples, text=samples.text + said)
