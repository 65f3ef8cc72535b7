"""The float checkpoint on disk: found, checked, and read one tensor at a time.

A `Source` is a Hugging Face folder (or a hub name, downloaded once) whose weights are safetensors. Nothing is read
until asked for, nothing in it is executed, and no path named inside it may leave its folder. Its fingerprint tells two
models apart without reading either whole: every tensor's name, dtype, shape and a sample of its bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quant.errors import ModelError

SAMPLE_BYTES = 64 * 1024
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIPELINE = "model_index.json"  # what makes a folder a diffusers pipeline
NEEDED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")  # the last for its licence
MODULES, TEMPLATES = "modules.json", "additional_chat_templates"  # of sentence-transformers, of a tokenizer
COPIED = (".json", ".txt", ".model", ".jinja")
DIFFUSION_STEM = "diffusion_pytorch_model"
COMPONENT = "transformer"  # of a diffusers pipeline: what is quantized
DUPLICATES = ("*/*.safetensors", "consolidated*.safetensors")  # the same weights in other people's layouts


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `file` name in the folder, stored `dtype` as safetensors spells it, `shape`."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Source:
    """A safetensors checkpoint folder. `entries` maps each stored name to its place, in sorted order. `copied`: files
    that go with it as they are, by their names in the folder: those of sentence-transformers' modules and of a
    tokenizer's further chat templates lie in folders there. `inside`: which component it is of the pipeline in the
    parent folder; "" if it stands alone."""

    def __init__(self, folder: Path, name: str, inside: str = "") -> None:
        self.folder = folder
        self.name = name
        self.inside = inside
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.stem = DIFFUSION_STEM if self.is_diffusion else "model"
        self.copied = self._copied()
        self.files = self._weight_files()
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self._read_header(file)
        self.entries = dict(sorted(self.entries.items()))

    @property
    def is_diffusion(self) -> bool:
        """Whether it is for diffusers, not transformers."""
        return "_class_name" in self.config

    @property
    def home(self) -> Path:
        """The pipeline's folder, or its own."""
        return self.folder.parent if self.inside else self.folder

    @property
    def tokenizer(self) -> Path:
        """Where its tokenizer lies: a pipeline has a text encoder's beside it, under a like name."""
        beside = self.home / self.inside.replace("text_encoder", "tokenizer")
        return beside if self.inside and beside.is_dir() else self.folder

    def _copied(self) -> dict[str, Path]:
        home = self.folder.resolve()
        home = next((place.parent for place in home.parents if place.name.startswith("models--")), home)  # hub's links
        found = [path for path in sorted(self.folder.iterdir()) if path.suffix in COPIED and path.is_file()]
        listed = parsed(self.folder / MODULES) if (self.folder / MODULES).is_file() else []
        modules = [module for module in listed if isinstance(module, dict)] if isinstance(listed, list) else []
        for name in [*(str(module["path"]) for module in modules if module.get("path")), TEMPLATES]:
            top = self.folder / name
            inside = is_plain(name) and name[0] != "." and not top.is_symlink()
            inner = [path for path in sorted(top.rglob("*")) if path.is_file()] if inside else []
            if not inside or not all(path.resolve().is_relative_to(home) for path in inner):
                raise ModelError(f"{self.folder}: {name!r} leads out of it (by {MODULES} or a link); copy it there")
            found += [path for path in inner if path.suffix in (*COPIED, ".safetensors")]
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def _weight_files(self) -> list[str]:
        index = self.folder / f"{self.stem}.safetensors.index.json"
        if (self.folder / f"{self.stem}.safetensors").is_file():  # as transformers does: before an index, and alone
            names = [f"{self.stem}.safetensors"]
        elif index.exists():
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
            if not is_plain(file) or not (self.folder / file).is_file():
                raise ModelError(f"{self.folder}: the index names {file!r}, which is not a file of this folder")
        return names

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.folder / file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if key in self.entries:
                        raise ModelError(
                            f"{self.folder}: {key} is stored twice, in {self.entries[key].file} and in {file}; remove "
                            "the file that does not belong to the model"
                        )
                    view = tensors.get_slice(key)
                    self.entries[key] = Entry(file, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.folder / file}: not a readable safetensors file ({error})") from None

    @contextmanager
    def open(self, keys: Iterable[str]) -> Generator[dict[str, Any]]:
        """Lazy slices of the named tensors: indexing one with `[...]` reads it."""
        keys = list(keys)
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            try:
                for file in sorted({self.entries[key].file for key in keys}):
                    handles[file] = stack.enter_context(safe_open(self.folder / file, framework="pt"))
                slices = {key: handles[self.entries[key].file].get_slice(key) for key in keys}
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self.folder}: changed while it was being read ({first_line(error)})") from None
            yield slices

    def tensor(self, key: str) -> torch.Tensor:
        """One stored tensor, bit for bit, on the CPU."""
        with self.open([key]) as slices:
            return slices[key][...]

    def same(self, first: str, second: str) -> bool:
        """Whether two stored tensors are equal bit for bit."""
        if (a := self.entries[first]).dtype != (b := self.entries[second]).dtype or a.shape != b.shape:
            return False
        with self.open([first, second]) as slices:
            step = max(1, SAMPLE_BYTES // max(1, math.prod(a.shape[1:])))
            return all(
                torch.equal(slices[first][row : row + step], slices[second][row : row + step])
                for row in range(0, a.shape[0], step)
            )

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


def find(model: str, part: str = "") -> Source:
    """The source behind `--model`: a local folder, or a hub name. `part`: which component of a diffusers pipeline; ""
    for its transformer, or for a model that stands alone.

    Raises:
        ModelError: no such folder and the hub cannot give it, or it has no such component.
    """
    return _at(local(model).resolve(), model.rstrip("/"), part)


def local(model: str) -> Path:
    """The folder of `--model`: itself, or where the hub's cache keeps what was downloaded of this name.

    Raises:
        ModelError: no such folder, and the hub cannot give it.
    """
    try:
        folder = Path(model).expanduser()
        found, there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a user who does not exist
        raise ModelError(f"{model}: not a folder ({first_line(error)})") from None
    if found:
        return folder
    if there or model.startswith((".", "/", "~")):
        raise ModelError(f"{model}: not a folder; give the folder that holds config.json and the .safetensors files")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, allow_patterns=list(NEEDED), ignore_patterns=list(DUPLICATES)))
        if any((folder / name).is_file() for name in (PIPELINE, MODULES)):
            folder = Path(snapshot_download(model, allow_patterns=list(NEEDED), ignore_patterns=DUPLICATES[1]))
    except Exception as error:  # hub errors come from three libraries
        raise ModelError(
            f"{model}: no folder of this name here, and the hub did not give it ({first_line(error)}). "
            "Give the path of a local folder, or download the model where there is a network and copy it here."
        ) from None
    return folder


def _at(folder: Path, name: str, part: str) -> Source:
    """The model in a folder: its own, or a component of a pipeline."""
    if not (folder / PIPELINE).is_file() or (folder / "config.json").is_file():
        if part:
            raise ModelError(
                f"{folder}: no diffusers pipeline (no {PIPELINE}), so it has no components; leave them out"
            )
        return Source(folder, name)
    part = part or COMPONENT
    has = {key: value for key, value in read_json(folder / PIPELINE).items() if isinstance(value, list)}
    if part not in has or not (folder / part / "config.json").is_file():
        raise ModelError(
            f"{folder}: a diffusers pipeline without a {part} (it has {', '.join(sorted(has))}); bitwright quantizes "
            "diffusion transformers and text encoders, not UNets"
        )
    if has[part][:1] != ["transformers"] and not part.startswith(COMPONENT):
        raise ModelError(f"{folder}: its {part} is {has[part]}; bitwright quantizes transformers and text encoders")
    return Source(folder / part, name, part)


def is_plain(name: Any) -> bool:
    """Whether it may be what a file or a folder is called, and is no path."""
    plain = isinstance(name, str) and name.isprintable() and "/" not in name and name not in ("", ".", "..")
    return plain and len(os.fsencode(name)) < 256  # as file systems have it


def variant(folder: Path, pattern: str = "*.*.safetensors") -> str:
    """What to say where weights are missed, of files that `save_pretrained(variant="fp16")` has written there."""
    ends = (".safetensors", ".safetensors.index.json")  # of those that are looked for, which may lie beside
    alone = lambda file: not any(file.with_name(file.name.partition(".")[0] + end).exists() for end in ends)  # noqa: E731
    found = next(filter(alone, folder.glob(pattern)), None)
    return "" if found is None else f"; {found.name} is a variant's, and none is looked for: save it without `variant`"


def read_json(path: Path) -> dict[str, Any]:
    data = parsed(path)
    if not isinstance(data, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data  # pyright: ignore[reportUnknownVariableType]


def parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; give a folder that transformers can load") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({first_line(error)})") from None
    except (ValueError, RecursionError) as error:  # what is not JSON, not UTF-8, or nested without end
        raise ModelError(f"{path}: not valid JSON ({first_line(error)})") from None


def first_line(error: object) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
