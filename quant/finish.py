"""The end-to-end stage of a run: the whole model, once all blocks are journalled, tuned and put into the journal too.

What it changes lies in one more entry of the journal, behind the blocks': the packed tensors that differ from theirs,
and the float vectors that were trained. The writer takes it over the blocks' and the float model's own.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from quant.blocks import fill
from quant.calibration.batch import Mixed
from quant.calibration.samples import moved
from quant.checkpoint.journal import Journal
from quant.ends import Ends
from quant.kernels.packed import Packed
from quant.linear import stored_name, stored_weight
from quant.models.skeleton import Skeleton
from quant.models.source import STORED
from quant.models.stream import first_tensor
from quant.prepare import Prepared
from quant.progress import Progress
from quant.recovery.distillation import Tuned, Whole
from quant.rounding import rounding

PAUSE = 60.0
"""Seconds between two writings of an unfinished tuning's state."""


def distil(prepared: Prepared, journal: Journal, progress: Progress, ends: Ends) -> Tensor:
    """Runs the recipe's distillation unless the journal has it; returns the tuned model's output on the probe."""
    skeleton, end, recipe = prepared.skeleton, len(prepared.walk.chain), prepared.recipe
    assert recipe.distillation is not None
    names = skeleton.names_under("")
    with ends.apart():
        skeleton.load(names)
    tensors = {name: tensor for index in range(end) for name, tensor in journal.load(index).items()}
    vectors = _vectors(skeleton, set(tensors))
    if not journal.finished(end):
        began = time.perf_counter()
        packed = _packed(prepared, tensors)
        tuned = recipe.distillation.tune(_whole(prepared, journal, packed, vectors, progress, ends))
        record = {"before": tuned.before, "after": tuned.after, "seconds": round(time.perf_counter() - began, 2)}
        journal.write(end, _changed(prepared, tensors, tuned, vectors), record)
    tensors |= journal.load(end)
    solved = _packed(prepared, tensors)
    for site in prepared.walk.sites:
        if site.name in solved:
            fill(skeleton.model.get_parameter(site.parameter), site, solved[site.name])
    ends.fill()
    for name, key in vectors.items():
        if key in tensors:
            skeleton.model.get_parameter(name).data.copy_(tensors[key])
    with rounding(skeleton.model, {site.name: site for site in prepared.walk.sites}, solved):
        output = first_tensor(skeleton.model(**prepared.probe()))
    skeleton.unload(names)
    return output


def _whole(
    prepared: Prepared, journal: Journal, packed: dict[str, Packed], vectors: dict[str, str], progress: Progress,
    ends: Ends,
) -> Whole:  # fmt: skip
    entries = prepared.source.entries
    batches = [moved(batch, prepared.settings.device) for batch in prepared.samples.batches]
    mixed = Mixed(batches, prepared.recipe.trajectory.mix) if prepared.source.is_diffusion else None
    shown = [moved(batch, prepared.settings.device) for batch in prepared.windows()] or batches
    device, sites = prepared.settings.device, {site.name: site for site in prepared.walk.sites}

    def metric(name: str) -> Tensor | None:
        known = prepared.plan.metric(sites[name])
        return None if known is None else known.to(device)

    train, judge = (shown, batches) if mixed is None else (mixed, mixed)
    return Whole(
        prepared.skeleton.model, lambda batch: first_tensor(prepared.skeleton.model(**batch)), prepared.walk.chain,
        sites, packed, metric, {name: STORED[entries[key].dtype] for name, key in vectors.items()}, ends.weights(),
        train, judge, None if mixed is None else mixed.times, progress.distilling,
        journal.folder / "distillation.safetensors", PAUSE,
    )  # fmt: skip


def _packed(prepared: Prepared, tensors: dict[str, Tensor]) -> dict[str, Packed]:
    found: dict[str, Packed] = {}
    for site in prepared.walk.sites:
        spec = prepared.plan.specs[site.name]
        if spec is not None:
            found[site.name] = stored_weight(site, spec, tensors).to(prepared.settings.device)
    return found


def _vectors(skeleton: Skeleton, taken: set[str]) -> dict[str, str]:
    """The float parameters of one dimension that are one stored tensor each: its name, by the parameter's."""
    tied = {*skeleton.tied, *skeleton.tied.values()}
    flat = [name for name, x in skeleton.model.named_parameters() if x.dim() == 1 and name not in tied]
    return {name: key for name in flat if (key := skeleton.alone(name)) is not None and key not in taken}


def _changed(prepared: Prepared, before: dict[str, Tensor], tuned: Tuned, vectors: dict[str, str]) -> dict[str, Tensor]:
    changed: dict[str, Any] = {vectors[name]: value for name, value in tuned.vectors.items()}
    for site in prepared.walk.sites:
        if site.name in tuned.packed:
            for key, tensor in tuned.packed[site.name].tensors().items():
                name = stored_name(site, key)
                if not torch.equal(tensor.cpu(), before[name]):
                    changed[name] = tensor
    return changed
