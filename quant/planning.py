"""The plan of a run: specs from a recipe and a file, and what is measured on the calibration inputs first.

Bits by what a site's error costs (`allocation.py`, `decoupled.py`), and the sites of a diffusion transformer whose
first token stays in float (`calibration/anchors.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant.allocation import allocate, errors, sensitivities
from quant.calibration import painting
from quant.calibration.anchors import anchored
from quant.calibration.effects import SAMPLES
from quant.calibration.samples import Batch, Samples, moved
from quant.calibration.trajectory import drawer
from quant.decoupled import SPLITS, decoupled
from quant.errors import SettingsError
from quant.models.diffusion import DiffusionSkeleton
from quant.models.skeleton import Skeleton
from quant.models.source import Source
from quant.models.stream import Forward, first_tensor
from quant.models.walk import Site, Walk
from quant.order import threads
from quant.place import Settings
from quant.plan import Plan, make_plan, of_width, with_anchor
from quant.progress import Progress
from quant.recipe import Recipe

WIDTHS = (2, 3, 4, 8)
PROBED = 20  # batches that the sensitivity of a site is measured on, spread over all


def measured(recipe: Recipe, source: Source) -> bool:
    """Whether the bits of each site are chosen by what its error costs (`allocation.py`)."""
    chosen = source.is_diffusion if recipe.widths is None else bool(recipe.widths)
    return recipe.average is not None and recipe.calibration is not None and chosen


def weighed(recipe: Recipe, source: Source) -> bool:
    """Whether it is measured what an error at each timestep does to the image (`calibration/effects.py`)."""
    return recipe.trajectory.weighting == "image" or (measured(recipe, source) and recipe.sensitivity != "image")


def probes(recipe: Recipe, source: Source, sites: int, batches: int) -> float:
    """How many batches' worth of passes through the whole model `planned` takes."""
    if not measured(recipe, source) or recipe.calibration is None:
        return 0.0
    few = len(_probed(batches))
    widths = sites * len(set(recipe.widths or WIDTHS))
    if recipe.sensitivity != "image":
        return (widths + 2.0) * few
    halves = 1 if (recipe.trajectory.guidance or 1) == 1 else 2
    rows = min(SAMPLES, recipe.calibration.samples) * recipe.trajectory.steps * halves
    return few + (widths + SPLITS + 1) * rows / recipe.calibration.batch_size


def _probed(batches: int) -> range:
    return range(0, batches, max(1, batches // PROBED))


def planned(
    skeleton: Skeleton, found: Walk, recipe: Recipe, settings: Settings, samples: Samples | None, progress: Progress
) -> Plan:
    """The spec of each site. `samples`: the calibration inputs, for what is chosen by measurement; None before there
    are any."""
    anchors = frozenset[str]() if samples is None else _anchors(skeleton, found, settings, samples)
    if samples is None or not measured(recipe, skeleton.source):
        return make_plan(recipe, found, settings.plan, anchors=anchors)
    assert recipe.average is not None
    progress.step("measuring what an error of each site costs")
    widths, names = sorted(recipe.widths or WIDTHS), skeleton.names_under("")
    which = _probed(len(samples.batches))
    batches = [moved(samples.batches[number], settings.device) for number in which]
    weights = [1.0 if samples.weights is None else samples.weights[number] for number in which]
    model = skeleton.model

    def size(site: Site, bits: int) -> int:
        spec = of_width(recipe.spec, bits, site)
        return (with_anchor(spec) if site.name in anchors else spec).nbytes(site.shape)

    def says(some: Sequence[Batch]) -> list[torch.Tensor]:
        return [first_tensor(model(**moved(batch, settings.device))) for batch in some]

    budget = recipe.average * sum(site.shape[0] * site.shape[1] for site in found.sites) / 8
    draw = None
    if recipe.sensitivity == "image":
        if not isinstance(skeleton, DiffusionSkeleton):
            raise SettingsError("sensitivity=image asks for images, which this model does not draw; leave it at output")
        piped = painting.complete(skeleton.source) is None
        draw = painting.drawer(skeleton, recipe) if piped else drawer(skeleton, says, recipe)
    skeleton.load(names)
    with threads(settings.threads or torch.get_num_threads()):
        if draw is not None:
            own = lambda: list(errors(model, found, batches, anchors))  # noqa: E731
            bits = decoupled(model, own, draw, widths, size, budget)
        else:
            costs = sensitivities(model, found, batches, weights, widths, anchors)
            bits = allocate(found.sites, widths, costs, size, budget)
    skeleton.unload(names)
    return make_plan(recipe, found, settings.plan, bits, anchors)


def _anchors(skeleton: Skeleton, found: Walk, settings: Settings, samples: Samples) -> frozenset[str]:
    if not isinstance(skeleton, DiffusionSkeleton):
        return frozenset()

    def forward(batches: Sequence[Batch]) -> None:
        with Forward(skeleton, found.chain, settings.spill_bytes) as run:
            run(batches)

    with threads(settings.threads or torch.get_num_threads()):
        return anchored(skeleton.model, found.sites, samples.batches, forward)
