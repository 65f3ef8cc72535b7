"""The dry run: what a run will take, found out by rehearsing its largest block on one batch.

Bytes on disk need no guess: the specs promise them and the writer's own arrangement is computed on tensors that do not
exist yet. Memory and time are measured, not modelled: the largest block is loaded, its statistics are collected on one
calibration batch, its sites are solved and thrown away. The peak of that is the run's peak but for the stored
activations, which are counted; the times scale with the number of batches and with each block's weights.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from quant.blocks import BlockSolver, Solved, float_weights
from quant.calibration.activations import Activations, scratch
from quant.calibration.painting import complete
from quant.calibration.remember import SHARE
from quant.calibration.replay import Replay
from quant.calibration.samples import moved
from quant.calibration.statistics import Statistics
from quant.calibration.trajectory import passes
from quant.checkpoint.shards import sizes
from quant.checkpoint.writer import arrangement, promised_pieces, quantized_sites
from quant.ends import rehearsed
from quant.fisher import enough, kept
from quant.kernels.spec import LowRank, Smoothed, Spec, Trellis
from quant.memory import enough_memory, peak_bytes
from quant.models.stream import Forward, outside_blocks
from quant.models.structure import end_of
from quant.order import threads
from quant.planning import probes, weighed
from quant.prepare import Prepared, skeleton_of
from quant.recovery.block import task
from quant.recovery.tunable import training_bytes
from quant.recovery.tuning import REHEARSED, BlockTuning, Task

WARM = 32  # columns


@dataclass(frozen=True)
class Estimate:
    """`weight_files`: exact bytes by name. `promised_bits`: per quantized weight. `peak_rss_bytes`, `peak_gpu_bytes`,
    `seconds`: predicted for the run; `again_seconds`: of them more where moving codes helps nothing, and scales are
    tuned alone. `spilled_bytes`: activations that will go to disk meanwhile."""

    sites: int
    weights: int
    promised_bits: float
    weight_files: dict[str, int]
    float_bytes: int
    peak_rss_bytes: int
    peak_gpu_bytes: int
    spilled_bytes: int
    seconds: float
    again_seconds: float
    rehearsal_seconds: float

    @property
    def weight_bytes(self) -> int:
        return sum(self.weight_files.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weight_bytes": self.weight_bytes}


@dataclass
class _Rehearsal:
    block_weights: int  # quantized, or all where none is
    load: float  # seconds for the block
    collect: float  # seconds for one batch
    advance: float  # seconds for one batch
    solve: float  # seconds for the block
    recover: float  # seconds for the block, all batches
    step: float  # seconds for the block, one batch, in one step of the end-to-end tuning
    stored: int  # bytes of one batch's output
    remembered: int  # bytes of one batch's outputs inside the block


def estimate(prepared: Prepared) -> Estimate:
    """Predicts a run. Takes about as long as one block of it; where it matters what errors cost, measuring that comes
    on top, as much as in the run."""
    began = time.perf_counter()
    sites = quantized_sites(prepared)  # where errors are measured that is as much work as in the run
    planning = time.perf_counter() - began
    weights = sum(site.weights for site, _ in sites.values())
    packed = sum(spec.nbytes(site.shape) for site, spec in sites.values())
    files = sizes(arrangement(prepared, promised_pieces(prepared)), prepared.source.stem)
    cuda = prepared.settings.device.startswith("cuda")
    memory = enough_memory(
        "lower --set calibration.batch_size=1 or --samples", " in the rehearsal, as the run would be"
    )
    with memory, threads(prepared.threads), prepared.in_order():
        _warm(prepared)
        follow = _follow(prepared)
        seen = _rehearse(prepared)
        share = weights / seen.block_weights or len(prepared.walk.chain)  # in blocks of the rehearsed size
        ends, embedding = rehearsed(prepared, seen.advance * share * prepared.outline[1])
        opening = _timed(lambda: skeleton_of(prepared.source, prepared.settings))
    batch, batches, halves = prepared.outline
    paths = 2 if prepared.recipe.followed and batches else 1
    spill = prepared.settings.spill_bytes
    between, inside = (size * (batches + 1) for size in (seen.stored, seen.remembered))
    activations = (between + inside) * paths
    held = (min(between, spill) + min(inside, spill // SHARE)) * paths
    measuring = 0  # what costs are measured with, in TMPDIR
    if prepared.measures and not prepared.source.is_diffusion:
        used = len(enough(prepared.samples.batches, prepared.walk.sites))
        measuring = seen.stored * used * kept(len(prepared.walk.chain)) - prepared.settings.spill_bytes
    per_block = seen.load + seen.solve + seen.recover + (seen.collect + seen.advance * paths) * batches
    peak_gpu = torch.cuda.max_memory_allocated() + held if cuda else 0
    peak_rss = peak_bytes() + (0 if cuda else held)
    verification = planning + opening + (seen.load + seen.advance) * share
    if (calibration := prepared.recipe.calibration) is not None and prepared.source.is_diffusion:
        whole = follow if follow is not None else seen.advance * share
        recipe, source = prepared.recipe, prepared.source
        piped = complete(source) is None
        samples = passes(calibration, recipe.trajectory, weighed(recipe, source), piped)
        verification += samples * halves / len(batch["hidden_states"]) * whole
        verification += probes(recipe, source, len(prepared.walk.sites), batches) * whole
    distillation, again, more = _distillation(prepared, seen, share, batches)
    return Estimate(
        sites=len(sites),
        weights=weights,
        promised_bits=8 * packed / max(1, weights),
        weight_files=files,
        float_bytes=prepared.source.nbytes(),
        peak_rss_bytes=peak_rss + (0 if cuda else more + embedding),
        peak_gpu_bytes=peak_gpu + (more + embedding if cuda else 0),
        spilled_bytes=max(activations - held, measuring),
        seconds=per_block * share + verification + distillation + ends,
        again_seconds=again,
        rehearsal_seconds=time.perf_counter() - began,
    )


def _distillation(prepared: Prepared, seen: _Rehearsal, share: float, batches: int) -> tuple[float, float, int]:
    """Seconds of the end-to-end tuning, those of a second one without codes, and the bytes that it adds to the peak of
    solving: the whole float model, what is trained of the codes, the outputs between the blocks, and the logits with
    their gradients."""
    recipe, model = prepared.recipe, prepared.skeleton.model
    if recipe.distillation is None:
        return 0.0, 0.0, 0
    head = end_of(model, "head")
    logits = 0 if head is None else 3 * prepared.samples.tokens // max(1, batches) * head.weight.shape[0] * 4
    mixed = 1.0  # calibration batches in a step
    if prepared.source.is_diffusion:
        mixed = max(1.0, recipe.trajectory.mix / len(prepared.outline[0]["hidden_states"]))
    share += (0 if head is None else head.weight.numel()) / seen.block_weights
    step = (seen.step + 2 * seen.advance) * share * mixed  # with the teacher's pass, and what checkpointing does twice
    passes = 4 * batches * seen.advance * share  # teacher and student, before and after
    parameters = sum(parameter.numel() for parameter in model.parameters())
    width = getattr(torch, prepared.settings.dtype).itemsize
    trained = recipe.distillation.codes > 0 and not prepared.source.is_diffusion
    held = sum(training_bytes(spec, trained) * site.weights for site, spec in quantized_sites(prepared).values())
    held += sum(4 * known.numel() for known in prepared.plan.pairs.values()) if trained else 0  # couplings, float32
    more = parameters * width + int(held) + int(seen.stored * mixed) * len(prepared.walk.chain) + logits
    seconds = recipe.distillation.steps * step + passes
    return seconds, seconds if trained and recipe.distillation.rate else 0.0, more


def _warm(prepared: Prepared) -> None:
    """Has compiled what solving and reading a trellis calls: once, kept on disk, and no block's own time."""
    device, specs = torch.device(prepared.settings.device), list[Spec]()
    for spec in prepared.plan.specs.values():
        while isinstance(spec, LowRank | Smoothed):  # which ask for inputs
            spec = spec.base
        specs += [] if spec is None else [spec]
    for spec in dict.fromkeys(specs):
        if isinstance(spec.core, Trellis):
            weight = torch.randn((spec.core.length, WARM), generator=torch.Generator().manual_seed(0)).to(device)
            prepared.recipe.solver.solve(weight, Statistics.identity(WARM, device), spec)


def _follow(prepared: Prepared) -> float | None:
    """Seconds of one batch through a diffusion transformer that a run holds in memory while it follows it; None for all
    other models."""
    if not prepared.source.is_diffusion or prepared.recipe.calibration is None:
        return None
    batches = [prepared.outline[0]]  # which a pipeline may be asked for, with the same weights
    with Forward(prepared.skeleton, prepared.walk.chain, prepared.settings.spill_bytes) as forward:
        return _timed(lambda: forward(batches)) if forward.whole else None


@torch.no_grad()
def _rehearse(prepared: Prepared) -> _Rehearsal:
    skeleton, chain = prepared.skeleton, prepared.walk.chain
    blocks = {block.name: block for block in prepared.walk.blocks}
    largest = max(prepared.walk.blocks, key=lambda block: sum(s.weights for s in block.sites))
    outside, _ = outside_blocks(skeleton, chain)
    skeleton.load(outside)
    device = prepared.settings.device
    batch, count, _ = prepared.outline
    batch = moved(batch, device)
    solved: list[Solved] = []
    with scratch() as folder, Replay(skeleton.model, chain) as replay:
        store = Activations(1, folder, prepared.settings.spill_bytes, device)
        first = skeleton.names_under(chain[0])
        skeleton.load(first)
        replay.output(0, batch, None)  # the first call pays for what later ones share
        store[0] = replay.output(0, batch, None)
        if chain[0] != largest.name:
            skeleton.unload(first)
        index = chain.index(largest.name)
        if type(skeleton.model.get_submodule(chain[0])) is not type(skeleton.model.get_submodule(largest.name)):
            for before in range(1, index):  # what the first block gives is not what the largest takes
                between = skeleton.names_under(chain[before])
                skeleton.load(between)
                store[0] = replay.output(before, batch, store[0])
                skeleton.unload(between)
        if index == 0:
            store[0] = None
        names = skeleton.names_under(largest.name)
        load = _timed(lambda: skeleton.load(names))
        room = lambda name: Activations(1, folder / name, prepared.settings.spill_bytes, device)  # noqa: E731
        recipe, aim = prepared.recipe, store if prepared.recipe.matched else None
        recipe = replace(recipe, recovery=BlockTuning()) if recipe.trains else recipe  # keeps float weights
        solver = BlockSolver(replay, recipe, prepared.plan, [batch], store, aim, solved.append, room)
        originals: dict[str, torch.Tensor] = {}
        whole = _timed(lambda: solver.solve(index, blocks[largest.name], originals))
        output: list[Any] = []
        advance = _timed(lambda: output.append(replay.output(index, batch, store[0], 0)))
        stored = sum(t.nbytes for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor))
        inside = [one.stores[0] for one in solver.remembered]  # of each path as much
        remembered = sum(store.held + store.spilled for store in inside)
        solver.forget()
        recover = step = 0.0
        if recipe.trains:
            targets = room("targets")
            with float_weights(skeleton.model, originals):
                targets[0] = replay.output(index, batch, store[0])
            work = task(replay, index, [batch], store, targets, solved, originals, lambda *_: None)
            if prepared.recipe.recovery is not None:
                recover = prepared.recipe.recovery.rehearse(work, count)
            if prepared.recipe.distillation is not None:
                step = BlockTuning(steps=REHEARSED).rehearse(_weighed(work, prepared), 0) / REHEARSED
        solver.rounding.close()
        skeleton.unload([*names, *outside])
    solve = sum(s.seconds for s in solved)
    weights = sum(s.site.weights for s in solved)
    weights = weights or sum(one.numel() for one in skeleton.model.get_submodule(largest.name).parameters())
    return _Rehearsal(weights, load, max(0.0, whole - solve), advance, solve, recover, step, stored, remembered)


def _weighed(work: Task, prepared: Prepared) -> Task:
    """With what the end-to-end tuning knows of the rows."""
    known = {site.name: prepared.plan.metric(site) for site in work.sites}
    device = prepared.settings.device
    metrics = {name: None if metric is None else metric.to(device) for name, metric in known.items()}
    return replace(work, metric=metrics.get)


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
