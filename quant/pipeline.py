"""The straight line from a float checkpoint to a packed one: read this file to know what `quantize` does.

One block of the model is in memory at a time. Its inputs are the stored outputs of the block before it, computed with
the already quantized weights; when its sites are solved it is journalled, run once more to give the next block's
inputs, and dropped. So the peak memory is that of the largest block, the embeddings and the activations, whatever the
depth; and a killed run goes on from the last finished block to the very same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quant.blocks import BlockSolver, Solved, fill, float_weights
from quant.calibration.activations import Activations
from quant.calibration.remember import SHARE
from quant.calibration.replay import Replay
from quant.calibration.samples import Batch, moved
from quant.checkpoint.components import check_home, clear_others, copy_beside, copy_card
from quant.checkpoint.journal import FOLDER, TOLD, Journal, Mode, check_same, complete, finished_report
from quant.checkpoint.provenance import provenance
from quant.checkpoint.recall import begun_texts, keep, recall
from quant.checkpoint.verify import compare_logits
from quant.checkpoint.writer import Written, write_checkpoint
from quant.ends import Ends
from quant.errors import SettingsError
from quant.finish import distil
from quant.kernels.spec import spec_from_dict
from quant.linear import stored_name, stored_weight
from quant.memory import enough_memory, give_back, peak_bytes
from quant.models.source import STORED
from quant.models.stream import finite, first_tensor, outside_blocks
from quant.models.walk import Block
from quant.order import threads
from quant.prepare import Prepared, Settings, prepare, settled, with_plan
from quant.progress import Progress
from quant.recipe import Recipe, load_recipe
from quant.recovery.block import put
from quant.recovery.block import record as recovery_record
from quant.recovery.block import task as block_task
from quant.rounding import Rounding


@dataclass(frozen=True)
class Result:
    """A finished run. `report`: the content of report.json. `others`: of a pipeline's further components."""

    out: Path
    written: Written
    report: dict[str, Any] = field(repr=False)
    others: tuple[Result, ...] = ()


def quantize(
    model: str, out: str | Path, recipe: Recipe | str | None = None, *, settings: Settings | None = None,
    mode: Mode = "new", progress: Progress | None = None, components: Sequence[str] = (),
) -> Result:  # fmt: skip
    """Quantizes `model` (a local folder or a hub name) into the packed checkpoint folder `out`.

    `recipe`: one of `load_recipe`, or its name. `mode`: "new" wants an empty or absent folder, "resume" continues an
    unfinished run to the same bytes, "restart" begins anew. `progress`: a `quant.display.Display` shows it.
    `components`: of a diffusers pipeline (`("transformer", "text_encoder")`), its transformer without.

    Raises:
        BitwrightError: see `quant.errors` for the kinds; the folder can then be resumed unless the message says no.
    """
    progress = progress or Progress()
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    with progress:
        parts = [prepare(model, recipe or Recipe(), settings, progress, part) for part in components or ("",)]
        return run_all(parts, Path(out), mode, progress)


def run_all(parts: Sequence[Prepared], out: Path, mode: Mode = "new", progress: Progress | None = None) -> Result:
    """A model, or several components of a pipeline, one after another into the same folder."""
    names = [part.source.inside for part in parts]
    if len(set(names)) < len(names):
        raise SettingsError(f"components {', '.join(names)}: name each once")
    results: list[Result] = []
    for part in parts:
        begun = not results or (out / part.source.inside).exists()  # a killed run may not have come to this one
        results.append(run(part, out, mode if begun or mode == "restart" else "new", progress, names))
    return replace(results[0], others=tuple(results[1:]))


@torch.no_grad()
def run(
    prepared: Prepared, out: Path, mode: Mode = "new", progress: Progress | None = None, parts: Sequence[str] = ()
) -> Result:
    """The computation, the checkpoint and its verification. `parts`: all components of the pipeline that are to be
    quantized into `out`."""
    progress = progress or Progress()
    began, source = time.perf_counter(), prepared.source
    parts = parts or [source.inside]
    check_home(out, source, parts, mode)
    place = out / source.inside
    if mode == "resume":
        prepared = replace(prepared, draw=partial(prepared.draw, begun=begun_texts(place)))
        check_same(place, prepared.known())
        prepared = with_plan(prepared, recall(place), place / FOLDER / TOLD)
    prepared = settled(prepared)
    if mode == "resume" and complete(place):
        progress.say("the checkpoint is already complete: its files are checked, and nothing else is done")
        report = finished_report(place, prepared.identity())
        return Result(out, Written(place, report["files"], report["bits"]["measured"]), report)
    clear_others(out, source, parts, mode, prepared.settings.told)
    memory = enough_memory(
        "lower --set calibration.batch_size=1 or --samples, then --restart; --dry-run predicts the peak. Unfinished "
        f"work is in {place / FOLDER}"
    )
    with memory, threads(prepared.threads), prepared.in_order(), Journal(place, prepared.identity(), mode) as journal:
        keep(journal.folder, prepared.plan)
        resumed = sum(journal.finished(i) for i in range(len(prepared.walk.chain)))
        ends = Ends.solved(prepared, journal, progress)
        logits = _blocks(prepared, journal, progress, ends)
        if prepared.recipe.distillation is not None:
            progress.step("tuning end to end")
            logits = distil(prepared, journal, progress, ends)
        progress.step("writing the checkpoint")
        records = [journal.record(i) for i in range(len(prepared.walk.chain)) if journal.finished(i)]
        report = _report(prepared, records, ends.records)
        if prepared.recipe.distillation is not None:
            report["distillation"] = journal.record(len(prepared.walk.chain))
        written = write_checkpoint(prepared, journal, report)
        copy_beside(source, out, parts)
        progress.step("verifying: reloading from disk")
        report["verification"] = compare_logits(place, prepared, logits)
        report["seconds"] = round(time.perf_counter() - began, 2)
        report["resumed_blocks"] = resumed
        report["peak_gpu_bytes"] = torch.cuda.max_memory_allocated() if "cuda" in prepared.settings.device else 0
        report["peak_rss_bytes"] = peak_bytes()
        written.finish(report)
        copy_card(source, out, parts)
        journal.close()
    return Result(out, written, report)


def _blocks(prepared: Prepared, journal: Journal, progress: Progress, ends: Ends) -> torch.Tensor:
    """Solves every block that the journal does not have; returns the quantized model's output on the probe."""
    skeleton, recipe, chain = prepared.skeleton, prepared.recipe, prepared.walk.chain
    model = skeleton.model
    used = prepared.samples.batches if recipe.calibration is not None else ()  # none for a data-free recipe
    batches = [*(moved(batch, prepared.settings.device) for batch in used), prepared.probe()]
    calibration = batches[:-1]  # the last one, the probe, is carried along for the verification and seen by no solver
    store = _activations(prepared, journal.folder, "quantized", len(batches))
    float_store = _activations(prepared, journal.folder, "float", len(batches)) if recipe.followed else None
    blocks = {block.name: block for block in prepared.walk.blocks}
    outside, head = outside_blocks(skeleton, chain)
    skeleton.load(outside)
    floats = ends.floats() if recipe.followed else {}  # for every block: Gemma 4 looks tokens up for each
    weights = {name: sum(s.weights for s in block.sites) for name, block in blocks.items()}
    progress.begin(len(chain), sum(weights.values()), sum(journal.finished(i) for i in range(len(chain))))
    with Replay(model, chain) as replay:
        room = lambda name: _activations(prepared, journal.folder, name, len(batches), SHARE)  # noqa: E731
        aim = float_store if recipe.matched else None
        counts = prepared.samples.weights if recipe.trajectory.weighting == "image" else None
        solver = BlockSolver(replay, recipe, prepared.plan, calibration, store, aim, progress.site, room, counts)
        for index, name in enumerate(chain):
            began = time.perf_counter()
            progress.block(index, name)
            names = skeleton.names_under(name)
            skeleton.load(names)
            originals = {**floats}
            wanted = range(len(batches)) if index + 1 < len(chain) else [len(batches) - 1]  # only the probe has a head
            if journal.finished(index):
                kept = originals if recipe.followed else None
                _restore(prepared, journal, index, blocks.get(name), kept, solver.rounding)
                _advance_float(replay, index, batches, wanted, float_store, originals)
            else:
                solved = solver.solve(index, blocks[name], originals) if name in blocks else []
                all_of_them = range(len(batches)) if recipe.recovery is not None else wanted
                _advance_float(replay, index, batches, all_of_them, float_store, originals)
                recovered = None
                if recipe.recovery is not None and float_store is not None and solved:
                    solver.forget()  # its outputs are about to change
                    task = block_task(
                        replay, index, calibration, store, float_store, solved, originals, progress.recovering
                    )
                    recovered = recipe.recovery.recover(task)
                    solved = put(replay, solved, recovered)
                record = {"block": name, "seconds": round(time.perf_counter() - began, 4)}
                record |= {"sites": [s.record() for s in solved], **recovery_record(recovered)}
                journal.write(index, _stored(solved, prepared, names), record)
            _advance(replay, index, batches, wanted, store)
            solver.forget()
            solver.rounding.close()
            skeleton.unload(names)
            give_back()
            progress.advanced(index, weights.get(name, 0))
        skeleton.load(head)
        output = first_tensor(replay.head(batches[-1], store[len(batches) - 1]))
        skeleton.unload([*outside, *head])
    return output


def _activations(prepared: Prepared, folder: Path, kind: str, count: int, share: int = 1) -> Activations:
    settings = prepared.settings
    return Activations(count, folder / "activations" / kind, settings.spill_bytes // share, settings.device)


def _restore(
    prepared: Prepared, journal: Journal, index: int, block: Block | None, originals: dict[str, torch.Tensor] | None,
    rounding: Rounding,
) -> None:  # fmt: skip
    """Puts a finished block's dequantized weights into the model, as solving it left them."""
    if block is None:
        return
    tensors = journal.load(index)
    specs = {entry["site"]: spec_from_dict(entry["spec"]) for entry in journal.record(index)["sites"]}
    for site in block.sites:
        if site.name not in specs:
            continue
        parameter = prepared.skeleton.model.get_parameter(site.parameter)
        if originals is not None:
            originals[site.parameter] = parameter.data.clone()
        packed = stored_weight(site, specs[site.name], tensors)
        fill(parameter, site, packed)
        rounding.put(site, packed)


def _stored(solved: Sequence[Solved], prepared: Prepared, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """A finished block's tensors under their checkpoint names: packed sites, and float tensors that share a stored
    tensor with a packed one (a fused qkv on disk of which only a part was quantized)."""
    tensors = {stored_name(s.site, key): tensor for s in solved for key, tensor in s.packed.tensors().items()}
    packed = {s.site.parameter for s in solved}
    skeleton = prepared.skeleton
    for key in skeleton.converted:
        targets = skeleton.targets[key]
        if packed.intersection(targets):
            stored = STORED.get(prepared.source.entries[key].dtype, torch.float32)
            for name in targets:
                if name not in packed and name in names:
                    tensors[name] = skeleton.model.get_parameter(name).detach().to(stored)
    return tensors


def _advance_float(
    replay: Replay, index: int, batches: Sequence[Batch], wanted: Sequence[int], float_store: Activations | None,
    originals: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    """The float block's outputs on the wanted batches replace its inputs in the float path's store."""
    if float_store is not None:
        with float_weights(replay.model, originals):
            for number in wanted:
                float_store[number] = replay.output(index, batches[number], float_store[number], number, path=1)


def _advance(replay: Replay, index: int, batches: Sequence[Batch], wanted: Sequence[int], store: Activations) -> None:
    """Block `index`'s outputs on the wanted batches replace its inputs in the store."""
    for number in wanted:
        store[number] = finite(replay.output(index, batches[number], store[number], number), replay.names[index])


def _report(prepared: Prepared, records: Sequence[dict[str, Any]], ends: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """report.json before the run's last figures are known."""
    sites = [{"block": record["block"], **site} for record in records for site in record["sites"]]
    weights = sum(site["shape"][0] * site["shape"][1] for site in sites)
    packed = sum(site["nbytes"] for site in sites)
    return {
        **json.loads(json.dumps(prepared.identity())),
        "bits": {"promised": 8 * packed / max(1, weights), "weights": weights, "packed_bytes": packed},
        "left_float": prepared.walk.left
        | {n: "the plan keeps it float" for n, s in prepared.plan.specs.items() if s is None},
        **({"folding": prepared.folded.to_dict()} if prepared.recipe.folding is not None else {}),
        "modulations": [site.name for site in prepared.walk.sites if site.modulation],
        **provenance(prepared),
        "blocks": [
            {"name": record["block"], **{key: record[key] for key in ("seconds", "recovery") if key in record}}
            for record in records
        ],
        "sites": sites,
        **({"ends": [{"block": "", **end} for end in ends]} if ends else {}),
    }
