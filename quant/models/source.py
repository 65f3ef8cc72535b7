"""The float checkpoint on disk: found, checked, and read one tensor at a time.

A `Source` is a Hugging Face folder (or a hub name, downloaded once) whose weights are safetensors. Nothing is read until
asked for, nothing in it is executed, and no path named inside it may leave its folder. Its fingerprint tells two models
apart without reading either whole: every tensor's name, dtype, shape and a sample of its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quant.errors import ModelError

SAMPLE_BYTES = 64 * 1024
NEEDED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `file` name in the folder, stored `dtype` as safetensors spells it, `shape`."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Source:
    """A safetensors checkpoint folder. `entries` maps each stored name to its place, in sorted order."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.files = self._weight_files()
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self._read_header(file)
        self.entries = dict(sorted(self.entries.items()))

    def _weight_files(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index}: no weight_map; the index is damaged, download the model again")
            names = sorted({str(file) for file in weight_map.values()})  # pyright: ignore[reportUnknownVariableType]
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = (
                f" It holds {pickled[0]}, a pickle, which bitwright never opens: convert it with "
                "transformers' save_pretrained first."
                if pickled
                else " Give the folder that save_pretrained wrote."
            )
            raise ModelError(f"{self.folder}: no .safetensors weights found.{hint}")
        for file in names:
            if PurePosixPath(file).name != file or not (self.folder / file).is_file():
                raise ModelError(f"{self.folder}: the index names {file!r}, which is not a file of this folder")
        return names

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.folder / file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    view = tensors.get_slice(key)
                    self.entries[key] = Entry(file, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.folder / file}: not a readable safetensors file ({error})") from None

    @contextmanager
    def open(self, keys: list[str]) -> Iterator[dict[str, Any]]:
        """Lazy slices of the named tensors: indexing one with `[...]` reads it."""
        handles: dict[str, Any] = {}
        try:
            for file in sorted({self.entries[key].file for key in keys}):
                handles[file] = safe_open(self.folder / file, framework="pt").__enter__()
            yield {key: handles[self.entries[key].file].get_slice(key) for key in keys}
        finally:
            for handle in handles.values():
                handle.__exit__(None, None, None)

    def tensor(self, key: str) -> torch.Tensor:
        """One stored tensor, bit for bit, on the CPU."""
        with self.open([key]) as slices:
            return slices[key][...]

    def nbytes(self) -> int:
        return sum((self.folder / file).stat().st_size for file in self.files)

    def fingerprint(self) -> str:
        """sha256 over the config, each file's header, and 64 evenly spaced samples of 64 KiB of each file."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            size = (self.folder / file).stat().st_size
            digest.update(f"{file}:{size}".encode())
            with (self.folder / file).open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(header))
                step = max(SAMPLE_BYTES, (size - 8 - header) // 64)
                for offset in range(8 + header, size, step):
                    stream.seek(offset)
                    digest.update(stream.read(SAMPLE_BYTES))
        return digest.hexdigest()


def find(model: str) -> Source:
    """The source behind `--model`: a local folder, or a hub name.

    Raises:
        ModelError: no such folder and the hub cannot give it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Source(folder.resolve(), str(model).rstrip("/"))
    if folder.exists() or model.startswith((".", "/", "~")):
        raise ModelError(f"{model}: not a folder; give the folder that holds config.json and the .safetensors files")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Source(Path(snapshot_download(model, allow_patterns=list(NEEDED))), model)
    except (OSError, HFValidationError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model}: no folder of this name here, and the hub did not give it ({reason}). "
            "Give the path of a local folder, or download the model where there is a network and copy it here."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; give a folder that transformers can load") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data  # pyright: ignore[reportUnknownVariableType]
