"""The plan of a run: specs from a recipe and a file, and what is measured on the calibration inputs first.

Bits by what a site's error costs (`fisher.py`, `allocation.py`, `decoupled.py`), how much each row of a matrix counts
and two of them together (`fisher.py`, `pairs.py`), and the sites of a diffusion transformer whose first token stays in
float (`calibration/anchors.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from quant.allocation import allocate, errors, sensitivities
from quant.calibration import painting
from quant.calibration.anchors import anchored
from quant.calibration.effects import SAMPLES
from quant.calibration.samples import Batch, Samples, moved
from quant.calibration.trajectory import drawer
from quant.decoupled import SPLITS, decoupled
from quant.errors import SettingsError
from quant.fisher import UNMEASURED, Cost, information
from quant.kernels.spec import Rotated, Spec, Trellis
from quant.memory import enough_memory
from quant.models.diffusion import DiffusionSkeleton
from quant.models.skeleton import Skeleton
from quant.models.source import Source
from quant.models.stream import Forward, first_tensor
from quant.models.walk import Site, Walk
from quant.order import deterministic, threads
from quant.pairs import LONGEST
from quant.place import Settings
from quant.plan import Plan, given, left, make_plan, of_width, too_few, with_anchor
from quant.progress import Progress
from quant.recipe import Recipe, respec

WIDTHS = (2, 3, 4, 8)
LEAST = 1e-3  # of the mean cost of a weight, for matrices that no gradient reaches
POWER = 0.75  # of a row's cost, which is an estimate: its weight in a search. 0.5 to 1 tried on two models
FAINTEST = 2.0**-6  # weight of a row, beside 1 for the mean cost
PROBED = 20  # batches that the sensitivity of a site is measured on, spread over all


def measured(recipe: Recipe, source: Source) -> bool:
    """Whether the bits of each site are chosen by what its error costs."""
    core, mixed = recipe.spec.core, recipe.mixed and not source.is_diffusion
    if recipe.calibration is None or recipe.widths == ():
        return False
    if recipe.average is not None and (source.is_diffusion or recipe.widths):
        return True
    among = widths(recipe)
    return mixed and isinstance(core, Trellis) and (recipe.average is not None or among[0] < core.bits < among[-1])


def weighed_rows(recipe: Recipe, source: Source, found: Walk, settings: Settings) -> bool:
    """Whether rows count by what an error in each costs: where codes share bits among them."""
    if not recipe.mixed or recipe.calibration is None or source.is_diffusion:
        return False
    told = given(settings, found)
    return any(_shares(told.get(site.name, recipe.spec)) for site in found.sites)


def _shares(spec: Spec | None) -> bool:
    return spec is not None and isinstance(spec.core, Trellis)


def _sequence(spec: Spec | None) -> int:
    """How many rows share bits, where a search can know what errors in two of them cost."""
    if spec is None or not isinstance(spec.core, Trellis) or spec.core.length > LONGEST:
        return 1
    return 1 if isinstance(spec, Rotated) and spec.outputs else spec.core.length


def widths(recipe: Recipe) -> list[int]:
    """The bits to choose among."""
    if recipe.widths is not None or not isinstance(recipe.spec.core, Trellis):
        return sorted(recipe.widths or WIDTHS)
    found = list[int]()
    for bits in range(1, 9):
        with suppress(SettingsError):
            found.append(respec(recipe.spec, bits=bits).core.to_dict()["bits"])
    return found


def weighed(recipe: Recipe, source: Source) -> bool:
    """Whether it is measured what an error at each timestep does to the image (`calibration/effects.py`)."""
    return recipe.trajectory.weighting == "image" or (measured(recipe, source) and recipe.sensitivity != "image")


def allowance(recipe: Recipe, found: Walk, settings: Settings) -> tuple[list[Site], float]:
    """Where bits are chosen by cost: the sites that no plan file names, and the bytes that may be spent on them, what
    the average leaves or even bits take.

    Raises:
        SettingsError: the narrowest codes take more, or the recipe's own fit no site; or as `given`.
    """
    told, even = given(settings, found), make_plan(replace(recipe, average=None), found, settings).specs
    free = [site for site in found.sites if site.name not in told]
    if recipe.average is None:
        budget = float(sum(spec.nbytes(site.shape) for site in free if (spec := even[site.name]) is not None))
    else:
        budget = left(recipe, found, told) / 8
    weights, narrow = sum(site.weights for site in free), widths(recipe)[0]
    least = sum(of_width(recipe.spec, narrow, site).nbytes(site.shape) for site in free)
    if free and least > budget:
        average = 8 * budget / weights
        raise too_few(recipe.average or average, average, bool(told), narrow, 8 * least / weights)
    return free, budget


def probes(recipe: Recipe, source: Source, sites: int, batches: int) -> float:
    """How many batches' worth of passes through the whole model `planned` takes."""
    if not measured(recipe, source) or recipe.calibration is None:
        return 0.0
    few = len(_probed(batches))
    tried = sites * len(set(widths(recipe)))
    if recipe.sensitivity != "image":
        return (tried + 2.0) * few
    halves = 1 if (recipe.trajectory.guidance or 1) == 1 else 2
    rows = min(SAMPLES, recipe.calibration.samples) * recipe.trajectory.steps * halves
    return few + (tried + SPLITS + 1) * rows / recipe.calibration.batch_size


def _probed(batches: int) -> range:
    return range(0, batches, max(1, batches // PROBED))


def planned(
    skeleton: Skeleton, found: Walk, recipe: Recipe, settings: Settings, samples: Samples | None, progress: Progress
) -> Plan:
    """The spec of each site. `samples`: the calibration inputs, for what is chosen by measurement; None before there
    are any."""
    anchors = frozenset[str]() if samples is None else _anchors(skeleton, found, settings, samples)
    chosen, counted = measured(recipe, skeleton.source), weighed_rows(recipe, skeleton.source, found, settings)
    free, budget = allowance(recipe, found, settings) if chosen else ([], 0.0)
    if samples is None or not (free or counted):
        return make_plan(recipe, found, settings, anchors=anchors)

    def size(site: Site, bits: int) -> int:
        spec = of_width(recipe.spec, bits, site)
        return (with_anchor(spec) if site.name in anchors else spec).nbytes(site.shape)

    progress.say("measuring what an error of each site costs")
    order = deterministic(settings.device, gradients=not skeleton.source.is_diffusion)
    bits, costs = dict[str, int](), dict[str, Cost]()
    with threads(settings.threads or torch.get_num_threads()), order:
        if isinstance(skeleton, DiffusionSkeleton):
            bits = _by_image(skeleton, found, recipe, settings, samples, free, anchors, size, budget)
        else:
            costs = _costs(skeleton, found, recipe, settings, samples, progress)
            bits = _by_words(recipe, found, costs, free, size, budget) if free else bits
    if bits:
        counts = sorted(Counter(bits.values()).items())
        progress.say("bits by what errors cost: " + ", ".join(f"{n} x {width}" for width, n in counts))
        bits = {site.name: widths(recipe)[0] for site in found.sites} | bits  # those that a plan file has
    plan = make_plan(recipe, found, settings, bits or None, anchors)
    shared = [site for site in found.sites if counted and _shares(plan.specs[site.name])]
    rows = {site.name: relative(costs[site.name], site.experts) for site in shared}
    pairs = {name: known for name in rows if (known := costs[name].pairs) is not None}
    return replace(plan, rows=rows, pairs=pairs)


def _costs(
    skeleton: Skeleton, found: Walk, recipe: Recipe, settings: Settings, samples: Samples, progress: Progress
) -> dict[str, Cost]:
    if recipe.sensitivity == "image":
        raise SettingsError("sensitivity=image asks for images, which this model does not draw; leave it at output")
    half = samples.batches[0]["input_ids"].shape[1] // 2
    remedy = f"it takes gradients: --set calibration.sequence_length={half}, or {UNMEASURED}"
    told = given(settings, found)
    asked = weighed_rows(recipe, skeleton.source, found, settings)
    specs = {site.name: told.get(site.name, recipe.spec) for site in found.sites if asked and not site.experts}
    lengths = {name: count for name, spec in specs.items() if (count := _sequence(spec)) > 1}
    with enough_memory(remedy, " while the cost of errors was measured"):
        return information(skeleton, found, samples.batches, settings.spill_bytes, progress.step, lengths)


def _by_words(
    recipe: Recipe, found: Walk, costs: Mapping[str, Cost], free: Sequence[Site], size: Callable[[Site, int], int],
    budget: float,
) -> dict[str, int]:  # fmt: skip
    """Bits of each site of a language model that no plan file names."""
    among, weights = widths(recipe), {site.name: site.weights for site in found.sites}
    least = LEAST * sum(cost.zero for cost in costs.values()) / sum(weights.values())
    # rounded: sums differ in their last bits from machine to machine, choices should not
    zero = {name: float(f"{max(cost.zero, least * weights[name]):.3g}") for name, cost in costs.items()}
    return allocate(free, among, {name: [cost * 4.0**-b for b in among] for name, cost in zero.items()}, size, budget)


def relative(cost: Cost, experts: int) -> Tensor:
    """`Plan.rows` of a site, each expert's for itself; rounded for the same reason."""
    rows = cost.rows.double().view(max(1, experts), -1)
    share = (rows / rows.mean(1, keepdim=True).clamp_min(1e-300)).flatten()
    return (4 * share.pow(POWER).clamp_min(FAINTEST).log2()).round().clamp_max(127).to(torch.int8)


def _by_image(
    skeleton: DiffusionSkeleton, found: Walk, recipe: Recipe, settings: Settings, samples: Samples,
    free: Sequence[Site], anchors: frozenset[str], size: Callable[[Site, int], int], budget: float,
) -> dict[str, int]:  # fmt: skip
    """Bits of each site of a diffusion transformer that no plan file names."""
    which, model, among = _probed(len(samples.batches)), skeleton.model, widths(recipe)
    batches = [moved(samples.batches[number], settings.device) for number in which]
    weights = [1.0 if samples.weights is None else samples.weights[number] for number in which]
    says = lambda some: [first_tensor(model(**moved(batch, settings.device))) for batch in some]  # noqa: E731
    draw = None
    if recipe.sensitivity == "image":
        piped = painting.complete(skeleton.source) is None
        draw = painting.drawer(skeleton, recipe) if piped else drawer(skeleton, says, recipe)
    names = skeleton.names_under("")
    skeleton.load(names)
    if draw is not None:
        own = lambda: [one for one in errors(model, found, batches, anchors) if one[0] in free]  # noqa: E731
        bits = decoupled(model, own, draw, among, size, budget)
    else:
        bits = allocate(free, among, sensitivities(model, found, batches, weights, among, anchors), size, budget)
    skeleton.unload(names)
    return bits


def _anchors(skeleton: Skeleton, found: Walk, settings: Settings, samples: Samples) -> frozenset[str]:
    if not isinstance(skeleton, DiffusionSkeleton):
        return frozenset()

    def forward(batches: Sequence[Batch]) -> None:
        with Forward(skeleton, found.chain, settings.spill_bytes) as run:
            run(batches)

    with threads(settings.threads or torch.get_num_threads()):
        return anchored(skeleton.model, found.sites, samples.batches, forward)
