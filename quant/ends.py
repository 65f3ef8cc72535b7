"""The ends of a language model in a grid: the embedding of its tokens and its head, together or each for itself.

They are solved before the blocks, which then make up for what they lose: wherever weights are loaded from now on, the
dequantized ones come. What an error in the head costs is told by the inputs that it has in the float model, `H`; rows
of an embedding are looked up, and no column of them is worth more than another. One matrix for both takes the mean of
`H`, at a mean square of 1, and the identity.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quant.blocks import TOGETHER, Solved, fill
from quant.calibration.activations import Activations
from quant.calibration.capture import Stage
from quant.calibration.replay import Stop
from quant.calibration.samples import moved
from quant.calibration.statistics import Statistics
from quant.checkpoint.journal import Journal
from quant.kernels.packed import Packed, concatenate
from quant.kernels.spec import Spec
from quant.linear import stored_name, stored_weight
from quant.models.skeleton import Skeleton
from quant.models.stream import streamed
from quant.models.structure import end_of, name_of
from quant.models.walk import Site
from quant.prepare import Prepared
from quant.progress import Progress
from quant.solvers.solution import Problem, solve_named

CHUNK = 1 << 22
"""Weights that are solved together on a CPU; the dry run solves as many."""


@dataclass(frozen=True, eq=False)
class Ends:
    """The packed ends of a model by site, and their records in the report."""

    skeleton: Skeleton
    sites: tuple[Site, ...]
    packed: Mapping[str, Packed]
    records: Sequence[dict[str, Any]]

    @classmethod
    def solved(cls, prepared: Prepared, journal: Journal, progress: Progress) -> Ends:
        """Solves them unless the journal has them; from now on the skeleton loads what was solved."""
        specs, skeleton = prepared.plan.specs, prepared.skeleton
        sites = {site: spec for site in prepared.walk.ends if (spec := specs[site.name]) is not None}
        if not sites:
            return cls(skeleton, (), {}, ())
        entry = len(prepared.walk.chain) + 1  # behind the blocks and the tuning
        if not journal.finished(entry):
            progress.step("packing the embedding and the head")
            inputs = _inputs(prepared, journal, [*sites])
            solved = [_solved(prepared, site, spec, inputs) for site, spec in sites.items()]
            tensors = {stored_name(s.site, key): part for s in solved for key, part in s.packed.tensors().items()}
            journal.write(entry, tensors, {"ends": [one.record() for one in solved]})
        stored, device = journal.load(entry), prepared.settings.device
        packed = {site.name: stored_weight(site, spec, stored).to(device) for site, spec in sites.items()}
        ends = cls(skeleton, tuple(sites), packed, journal.record(entry)["ends"])
        skeleton.change = ends._changed
        return ends

    def _names(self, site: Site) -> list[str]:
        """A site's parameter under all its names."""
        pairs = [pair for pair in self.skeleton.tied.items() if site.parameter in pair]
        return [site.parameter, *(name for pair in pairs for name in pair if name != site.parameter)]

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        for site in self.sites:
            if name in self._names(site):
                fill(tensor, site, self.packed[site.name])
        return tensor

    @contextmanager
    def apart(self) -> Generator[None]:
        """What is loaded in it is the float model."""
        kept = self.skeleton.change
        self.skeleton.change = None if self.sites else kept  # which may be that of folds, where no end is packed
        try:
            yield
        finally:
            self.skeleton.change = kept

    def floats(self) -> dict[str, Tensor]:
        """The float embedding, by parameter; the model keeps the packed one's numbers."""
        names = [site.parameter for site in self.sites if site.end != "head"]
        with self.apart():
            self.skeleton.load(names)
        found = {name: self.skeleton.model.get_parameter(name).data for name in names}
        self.skeleton.load(names)
        return found

    def weights(self) -> dict[str, Tensor]:
        """The dequantized weights by every name of their parameters."""
        found = dict[str, Tensor]()
        for site in self.sites:
            weight = self.packed[site.name].dequantize(self.skeleton.dtype)
            found |= dict.fromkeys(self._names(site), weight)
        return found

    def fill(self) -> None:
        """Puts them into the loaded model."""
        for site in self.sites:
            fill(self.skeleton.model.get_parameter(site.parameter), site, self.packed[site.name])


def _inputs(prepared: Prepared, journal: Journal, sites: Sequence[Site]) -> Statistics | None:
    """What the head is given in the float model; None where there is no head to be packed, or no text."""
    skeleton, chain, settings = prepared.skeleton, prepared.walk.chain, prepared.settings
    model, heads = skeleton.model, [site for site in sites if site.end in ("head", "both")]
    if prepared.recipe.calibration is None or not heads:
        return None
    head = replace(heads[0], name=name_of(model, end_of(model, "head")))  # which may be the embedding's site
    batches = [moved(batch, settings.device) for batch in prepared.samples.batches]
    store = Activations(len(batches), journal.folder / "activations" / "ends", settings.spill_bytes, settings.device)
    with streamed(skeleton, chain, batches, store) as replay:
        stage = Stage(model, [head], cross=False)
        for number, batch in enumerate(batches):
            with suppress(Stop), stage.watch(stage.take(None), alone=True):
                replay.head(batch, store[number])
    return stage.finish()[0]


def _statistics(site: Site, inputs: Statistics | None, device: str) -> Statistics:
    if inputs is None or site.end == "embedding":
        return Statistics.identity(site.inputs, device)
    if site.end == "head":
        return inputs
    one = torch.eye(site.inputs, device=inputs.hessian.device)
    scale = inputs.diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return Statistics(torch.lerp(inputs.hessian / scale, one, 0.5), inputs.tokens)


def rehearsed(prepared: Prepared, through: float) -> tuple[float, int]:
    """Seconds that solving the ends will take, `through` of them where a head's inputs are to be seen, and the bytes of
    a float embedding."""
    seconds, held = 0.0, 0
    for site in prepared.walk.ends:
        spec, rows = prepared.plan.specs[site.name], min(site.out, _together(prepared, site))
        if spec is not None:
            seconds += _solved(prepared, site, spec, None, rows).seconds * site.out / rows
            seconds += 0 if site.end == "embedding" else through
            held += 0 if site.end == "head" else site.out * site.inputs * prepared.skeleton.dtype.itemsize
    return seconds, held


def _together(prepared: Prepared, site: Site) -> int:
    return max(1, (CHUNK if prepared.settings.device == "cpu" else TOGETHER) // site.inputs)


def _solved(prepared: Prepared, site: Site, spec: Spec, inputs: Statistics | None, rows: int = 0) -> Solved:
    """A site's packed weight, some rows after others; of its first `rows` where so many are given."""
    began, skeleton = time.perf_counter(), prepared.skeleton
    skeleton.load([site.parameter])
    weight = skeleton.model.get_parameter(site.parameter).detach()[: rows or site.out]
    statistics, error, notes = _statistics(site, inputs, prepared.settings.device), 0.0, list[str]()
    parts = list[Packed]()
    for part in weight.split(_together(prepared, site)):
        found = solve_named(prepared.recipe.solver, [site.name], [Problem(part.float(), statistics)], spec)[0]
        parts.append(found.packed)
        error += found.error * len(part) / len(weight)
        notes += [note for note in found.notes if note not in notes]
    skeleton.unload([site.parameter])
    seconds = time.perf_counter() - began
    return Solved(site, spec, concatenate(parts), error, (statistics.tokens,), tuple(notes), seconds)
