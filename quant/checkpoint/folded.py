"""The float tensors that a fold changed, on their way into the checkpoint (`models/folding.py`).

They are made anew from the float model's own whenever the checkpoint is written, one in memory at a time: a killed run
has nothing of them to keep.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from quant.checkpoint.shards import Atomic, Piece, disk_error, read_pieces
from quant.models.folding import stored_anew

if TYPE_CHECKING:
    from quant.prepare import Prepared


def promised_folds(prepared: Prepared) -> dict[str, Piece]:
    """By name, before any exists."""
    entries, pieces = prepared.source.entries, dict[str, Piece]()
    for name, (key, parameter) in _changed(prepared).items():
        entry, width = entries[key], prepared.folded.dtypes[parameter].itemsize
        pieces[name] = Piece(name, entry.dtype, entry.shape, width * math.prod(entry.shape))
    return pieces


def folded_pieces(prepared: Prepared, folder: Path) -> dict[str, Piece]:
    """Writes each into a file of its own in `folder`; by name."""
    pieces: dict[str, Piece] = {}
    for number, (name, (key, parameter)) in enumerate(sorted(_changed(prepared).items())):
        file = folder / "folded" / f"{number:05d}.safetensors"
        try:
            file.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(file, error) from None
        with Atomic(file) as out:
            out.write(save({name: prepared.folded.stored(prepared.source, key, parameter)}))
        pieces |= read_pieces(file)
    return pieces


def untied_config(prepared: Prepared) -> dict[str, Any]:
    """The float model's config, which says so where a head is no longer tied."""
    config = dict(prepared.source.config)
    if prepared.folded.untied:
        config["tie_word_embeddings"] = False
        for key, part in config.items():
            if isinstance(part, dict) and "tie_word_embeddings" in part:
                config[key] = {**part, "tie_word_embeddings": False}
    return config


def _changed(prepared: Prepared) -> dict[str, tuple[str, str]]:
    return stored_anew(prepared.folded, prepared.skeleton.targets, prepared.skeleton.tied)
