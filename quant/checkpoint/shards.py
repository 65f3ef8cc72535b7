"""Safetensors files assembled from pieces of other files, without holding a tensor in memory.

A checkpoint is made of tensors that already lie on disk: packed sites in the journal's block files, everything else in
the float model's shards. A `Piece` names such a stretch of bytes; `write` lays pieces one after another behind a header
and copies them through a small buffer, so a tensor that is not quantized keeps its very bits and the peak memory is the
buffer's. The same `header` tells the dry run the exact size of a file that does not exist yet.

The library's own `save_file` wants every tensor of a file in memory at once; reading goes through the library.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import CheckpointError, ResourceError
from quant.models.source import variant

BUFFER = 4 * 1024 * 1024
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint8": "U8"}
STEMS = ("model", "diffusion_pytorch_model")  # how weight files begin: of transformers, of diffusers


@dataclass(frozen=True)
class Piece:
    """One tensor: `dtype` as safetensors spells it, and where its `nbytes` bytes lie (no file yet in a dry run)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path | None = None
    offset: int = 0


def read_pieces(file: Path) -> dict[str, Piece]:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is not a whole safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries: Any = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        pieces: dict[str, Piece] = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end:
                raise ValueError(f"{name} lies at bytes {begin} to {end}")
            if end > size - 8 - length:
                raise ValueError(f"{name} lies at bytes {begin} to {end}, past the end: the file was cut short")
            pieces[name] = Piece(name, entry["dtype"], tuple(entry["shape"]), end - begin, file, 8 + length + begin)
    except FileNotFoundError:
        advice = variant(file.parent) or "; copy the checkpoint again, whole"
        raise CheckpointError(f"{file}: missing{advice}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); copy the checkpoint again, whole") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); copy the checkpoint again") from None
    return pieces


def header(pieces: Sequence[Piece]) -> bytes:
    """Length and JSON of a safetensors header, padded to 8 bytes; pieces lie in the given order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        entries[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [at, at + piece.nbytes],
        }
        at += piece.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def arrange(pieces: Iterable[Piece]) -> list[Piece]:
    """Widest items first, then by name: every tensor is aligned to its item, and the order depends on nothing else."""
    return sorted(pieces, key=lambda piece: (-ITEM_BYTES.get(piece.dtype, 1), piece.name))


def group(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """Pieces in the given order, cut into shards of at most `limit` bytes (a larger tensor gets its own)."""
    shards: list[list[Piece]] = [[]]
    held = 0
    for piece in pieces:
        if shards[-1] and held + piece.nbytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.nbytes
    return [arrange(shard) for shard in shards]


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def file_names(count: int, stem: str) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_text(shards: Sequence[Sequence[Piece]], stem: str) -> str:
    """The content of the index of several files."""
    names = file_names(len(shards), stem)
    weight_map = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
    total = sum(piece.nbytes for shard in shards for piece in shard)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )


def sizes(shards: Sequence[Sequence[Piece]], stem: str) -> dict[str, int]:
    """Exact bytes of every file that these shards will make, the index included."""
    made = {
        name: len(header(shard)) + sum(piece.nbytes for piece in shard)
        for name, shard in zip(file_names(len(shards), stem), shards, strict=True)
    }
    if len(shards) > 1:
        made[index_name(stem)] = len(index_text(shards, stem).encode())
    return made


def write(path: Path, pieces: Sequence[Piece]) -> None:
    """Writes one shard, whole or not at all."""
    with Atomic(path) as out:
        for chunk in _stream(pieces):
            out.write(chunk)


def _stream(pieces: Sequence[Piece]) -> Iterable[bytes]:
    yield header(pieces)
    for piece in pieces:
        if piece.file is None:
            raise CheckpointError(f"{piece.name}: has no bytes to write")
        with piece.file.open("rb") as source:
            source.seek(piece.offset)
            left = piece.nbytes
            while left:
                chunk = source.read(min(BUFFER, left))
                if not chunk:
                    raise CheckpointError(f"{piece.file}: ends inside {piece.name}; it changed while it was read")
                left -= len(chunk)
                yield chunk


class Atomic:
    """A file that appears under its name only when it is complete and on the disk.

    Raises:
        ResourceError: the disk is full; says how much was wanted for what.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")

    def __enter__(self) -> Atomic:
        try:
            self.stream = self.part.open("wb")
        except OSError as failure:
            raise disk_error(self.path, failure) from None
        return self

    def write(self, data: bytes) -> None:
        self.stream.write(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if kind is None:
                self.stream.flush()
                os.fsync(self.stream.fileno())
                self.stream.close()
                os.replace(self.part, self.path)
        except OSError as failure:
            kind, error = type(failure), failure
        if kind is None:
            return
        with suppress(OSError):  # closing tries once more to write what the disk did not take
            self.stream.close()
        with suppress(OSError):
            self.part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_error(self.path, error) from None


def write_text(path: Path, text: str) -> None:
    with Atomic(path) as out:
        out.write(text.encode())


def disk_error(path: Path, error: OSError) -> ResourceError:
    """What an operating system's refusal to write means for the user."""
    what = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    }.get(error.errno or 0, "make the folder writable")
    return ResourceError(
        f"{path}: cannot be written ({error.strerror or error}); {what}, then run the same command with --resume: "
        "finished blocks are kept. Or choose another --out"
    )


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
