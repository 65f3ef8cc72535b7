"""Makes the Hugging Face folder: shards, config, tokenizer, recipe, plan, checksums, report and model card.

Packed tensors come from the journal; every other stored tensor of the float model is copied bit for bit, in its own
dtype and under its own name, so what transformers does to it on loading stays what it was. `arrangement` decides which
tensors go where; the dry run calls it with tensors that do not exist yet and so knows the bytes to the last one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint import shards
from quant.checkpoint.card import card
from quant.checkpoint.folded import folded_pieces, promised_folds, untied_config
from quant.checkpoint.journal import Journal
from quant.checkpoint.manifest import CHECKSUMS, PEOPLE, quantization_config, seal, stored_tensors
from quant.checkpoint.report import render
from quant.checkpoint.shards import Piece
from quant.kernels.spec import Spec
from quant.linear import stored_name
from quant.models.walk import Site
from quant.prepare import Prepared
from quant.version import VERSION

MADE = ("config.json", *map(shards.index_name, shards.STEMS), "recipe.json", "plan.json", "report.json", CHECKSUMS)


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk. `files`: bytes of each weight file; `measured_bits`: 8 * packed bytes on disk / weights."""

    out: Path
    files: dict[str, int]
    measured_bits: float

    def finish(self, report: dict[str, Any]) -> None:
        """Writes what is for people."""
        report["bits"]["measured"] = self.measured_bits
        report["files"] = self.files
        shards.write_text(self.out / "report.json", json.dumps(report, indent=2) + "\n")
        shards.write_text(self.out / "report.html", render(report))
        shards.write_text(self.out / "README.md", card(report))


def quantized_sites(prepared: Prepared) -> dict[str, tuple[Site, Spec]]:
    """Those in blocks, whose bits are asked for."""
    specs = prepared.plan.specs
    return {site.name: (site, spec) for site in prepared.walk.sites if (spec := specs[site.name]) is not None}


def packed_sites(prepared: Prepared) -> dict[str, tuple[Site, Spec]]:
    """The packed ends of the model as well."""
    specs = prepared.plan.specs
    return {site.name: (site, spec) for site in prepared.walk.all if (spec := specs[site.name]) is not None}


def promised_pieces(prepared: Prepared) -> dict[str, Piece]:
    """The packed tensors as the specs promise them, and the float ones that a fold changes, before any exists."""
    pieces = promised_folds(prepared)
    for site, spec in packed_sites(prepared).values():
        for key, tensor in spec.tensors(site.shape).items():
            name = stored_name(site, key)
            pieces[name] = Piece(name, shards.NAMES[tensor.dtype], tensor.shape, tensor.nbytes)
    return pieces


def arrangement(prepared: Prepared, packed: Mapping[str, Piece]) -> list[list[Piece]]:
    """The shards, in model order: packed tensors, and the float model's own for all that no packed site replaces
    and no fold or tuning changed (`packed` holds those too)."""
    skeleton, source = prepared.skeleton, prepared.source
    replaced = {site.parameter for site, _ in packed_sites(prepared).values()}
    replaced |= {name for pair in skeleton.tied.items() for name in pair if not replaced.isdisjoint(pair)}
    rank = {name: number for number, name in enumerate(prepared.walk.chain)}

    def place(name: str) -> int:
        return next((number for block, number in rank.items() if name.startswith(block + ".")), -1)

    ranked = [(place(name), piece) for name, piece in packed.items()]
    stored = {name: piece for file in source.files for name, piece in shards.read_pieces(source.folder / file).items()}
    for name, piece in stored.items():
        targets = skeleton.targets[name]
        if name not in packed and not replaced.intersection(targets):
            ranked.append((place(targets[0]) if targets else -1, piece))
    limit = max((source.folder / file).stat().st_size for file in source.files)
    ordered = [piece for _, piece in sorted(ranked, key=lambda item: (item[0], item[1].name))]
    return shards.group(ordered, limit)


def write_checkpoint(prepared: Prepared, journal: Journal, report: dict[str, Any]) -> Written:
    """Writes everything but what is for people; the same bytes however often it is called."""
    out = journal.out
    packed = folded_pieces(prepared, journal.folder)  # tuning may have changed some of them further
    for index in range(len(prepared.walk.chain) + 2):  # the tuning's and the ends' too
        packed |= journal.pieces(index) if journal.finished(index) else {}
    arranged = arrangement(prepared, packed)
    stem = prepared.source.stem
    names, index = shards.file_names(len(arranged), stem), [shards.index_name(stem)] if len(arranged) > 1 else []
    copied = {name: path for name, path in prepared.source.copied.items() if name not in MADE}
    sealed_names = [*names, *index, *copied, "recipe.json", "plan.json"]
    journal.claim([*sealed_names, "config.json", *PEOPLE])
    for name, shard in zip(names, arranged, strict=True):
        shards.write(out / name, shard)
    for name in index:
        shards.write_text(out / name, shards.index_text(arranged, stem))
    try:
        for name, path in copied.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)
    except OSError as error:
        raise shards.disk_error(out, error) from None
    shards.write_text(out / "recipe.json", json.dumps(prepared.decided.to_dict(), indent=2) + "\n")
    shards.write_text(out / "plan.json", json.dumps(prepared.plan.to_dict(), indent=2) + "\n")
    sites = quantized_sites(prepared)
    packing = quantization_config(packed_sites(prepared), VERSION)
    config = {**untied_config(prepared), "quantization_config": packing}
    manifest, sealed = seal(out, config, sealed_names)
    shards.write_text(out / CHECKSUMS, manifest)
    shards.write_text(out / "config.json", sealed)
    stored = stored_tensors(out)
    packed_bytes = sum(
        stored[stored_name(s, key)].nbytes for s, spec in sites.values() for key in spec.tensors(s.shape)
    )
    weights = sum(site.weights for site, _ in sites.values())
    files = {name: (out / name).stat().st_size for name in (*names, *index)}
    return Written(out, files, 8 * packed_bytes / max(1, weights))
