"""The checkpoint's own account of itself: which sites are packed how, and a checksum of every file.

`config.json` carries `quantization_config`: `quant_method` "bitwright", `format_version`, `version` of the writer,
`sites` (per site: `shape` `[rows, in]`, `spec`, and `experts`, `transposed` or `end` where they apply; `end` is that of
`models/walk.Site`, of embeddings and heads), and `checksums`, the sha256 of `checksums.json`. That file lists the
sha256 of every other file except those written for people (README.md,
report.*); of config.json it takes the content without the `checksums` entry. So one flipped bit anywhere is noticed
before a tensor is touched, and so is a further file that transformers would read. A folder written by transformers'
`save_pretrained` has no `checksums` entry; its tensors are still checked against the specs by name, dtype and shape.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint.hub import fetch
from quant.checkpoint.shards import NAMES, STEMS, Piece, index_name, read_pieces, sha256
from quant.errors import CheckpointError
from quant.kernels.spec import Spec, SpecError, Trellis, Uniform, spec_from_dict
from quant.linear import stored_name
from quant.models.source import is_plain
from quant.models.walk import Site

METHOD = "bitwright"
FORMAT_VERSION = 2
"""What is written, or 3 where an embedding or a head is packed. Version 1 is read too, but for the trellis code `mac`,
which had other numbers."""
WITH_ENDS = 3

CHECKSUMS = "checksums.json"
JOURNAL = ".bitwright"  # here while a run is under way; see `journal`
PEOPLE = ("README.md", "report.json", "report.html", CHECKSUMS)
READ = ("*.safetensors*", "adapter_config.json", "generation_config.json")  # by transformers, if it is there
INPUTS = ("*.jinja", "additional_chat_templates/*.jinja", "chat_template.json", "*processor_config.json")
TOKENIZER = (*INPUTS, "tokenizer*.json", "tokenizer.model", "added_tokens.json", "special_tokens_map.json")
VERIFIED: ContextVar[bool] = ContextVar("verified", default=False)  # whether `quant.load` has done so, or must not
LOADING = threading.Lock()
KEYS = {"quant_method", "format_version", "version", "sites", "checksums"}
SITE_KEYS = {"shape", "spec", "experts", "transposed", "end"}
ENDS = ("", "embedding", "head", "both")


@dataclass(frozen=True)
class PackedSite:
    """One entry of `sites`."""

    site: Site
    spec: Spec

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored tensor name -> (safetensors dtype, shape)."""
        tensors = self.spec.tensors(self.site.shape)
        return {stored_name(self.site, key): (NAMES[t.dtype], t.shape) for key, t in tensors.items()}


def quantization_config(sites: Mapping[str, tuple[Site, Spec]], version: str) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint with these sites, without checksums."""
    entries: dict[str, Any] = {}
    for name, (site, spec) in sites.items():
        entries[name] = {"shape": list(site.shape), "spec": spec.to_dict()}
        if site.experts:
            entries[name]["experts"] = site.experts
        if site.transposed:
            entries[name]["transposed"] = True
        if site.end:
            entries[name]["end"] = site.end
    form = WITH_ENDS if any(site.end for site, _ in sites.values()) else FORMAT_VERSION
    return {"quant_method": METHOD, "format_version": form, "version": version, "sites": entries}


def read_sites(config: Any, where: str) -> dict[str, PackedSite]:
    """The packed sites of a `quantization_config`.

    Raises:
        CheckpointError: not ours, a newer format, an unknown key, or an impossible entry.
    """
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{where}: not a bitwright checkpoint (its config.json has no quantization_config of ours)"
        )
    version = config.get("format_version")
    if isinstance(version, bool) or version not in (1, FORMAT_VERSION, WITH_ENDS):
        raise CheckpointError(f"{where}: format version {version!r}; this bitwright reads 1 to {WITH_ENDS}: upgrade it")
    unknown = sorted(set(config) - KEYS, key=str)
    if unknown or not isinstance(config.get("sites"), dict):
        raise CheckpointError(f"{where}: quantization_config is damaged ({unknown or 'no sites'}); copy it again")
    sites = {str(name): _read_site(str(name), entry, where) for name, entry in config["sites"].items()}
    for name, one in sites.items():
        if version == 1 and isinstance(one.spec.core, Trellis) and one.spec.core.code == "mac":
            raise CheckpointError(
                f"{where}: {name} has the trellis code mac of format version 1, whose numbers are others since; "
                "quantize the original model again"
            )
    return sites


def _read_site(name: str, entry: Any, where: str) -> PackedSite:
    try:
        if set(entry) - SITE_KEYS:
            raise ValueError(f"unknown keys {sorted(set(entry) - SITE_KEYS)}")
        rows, columns = entry["shape"]
        experts, transposed, end = entry.get("experts", 0), entry.get("transposed", False), entry.get("end", "")
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (rows, columns, experts))
        if not whole or min(rows, columns) < 1 or max(rows, columns) >= 2**31 or not isinstance(transposed, bool):
            raise ValueError(f"shape {entry['shape']}, experts {experts}, transposed {transposed}")
        if experts < 0 or (experts and rows % experts):
            raise ValueError(f"{rows} rows do not divide into {experts} experts")
        spec = spec_from_dict(entry["spec"])
        if end not in ENDS or (end and (experts or transposed or not isinstance(spec, Uniform))):
            raise ValueError(f"end {end!r} of {spec}, experts {experts}, transposed {transposed}")
        kind = "experts" if experts else "linear"
        return PackedSite(Site(name, kind, rows // max(1, experts), columns, transposed, experts, end=end), spec)
    except (ValueError, TypeError, KeyError, AttributeError, SpecError) as error:
        raise CheckpointError(
            f"{where}: the entry of site {name} is damaged ({error}); copy config.json again"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dict. Raises `CheckpointError` when it is not there or not JSON."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except OSError as error:
        if (folder / JOURNAL).is_dir():
            raise CheckpointError(f"{folder}: an unfinished run; continue it with quantize --resume") from None
        raise CheckpointError(f"{folder}: config.json cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: not valid JSON ({error}); copy the checkpoint again"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: not a JSON object; copy the checkpoint again")
    return config  # pyright: ignore[reportUnknownVariableType]


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a config without its `checksums` entry."""
    bare = {
        **config,
        "quantization_config": {k: v for k, v in config["quantization_config"].items() if k != "checksums"},
    }
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, config: dict[str, Any], names: Iterable[str]) -> tuple[str, str]:
    """The texts of `checksums.json` and `config.json` for a folder whose other files, `names`, are all written."""
    files = {name: sha256(folder / name) for name in names if name not in (*PEOPLE, "config.json")}
    files["config.json"] = config_digest(config)
    manifest = json.dumps({"format_version": FORMAT_VERSION, "files": dict(sorted(files.items()))}, indent=2) + "\n"
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    sealed = {**config, "quantization_config": {**config["quantization_config"], "checksums": digest}}
    return manifest, json.dumps(sealed, indent=2) + "\n"


def verify(folder: Path, files: Iterable[Path | str] = ()) -> dict[str, PackedSite]:
    """Checks a checkpoint folder, files before tensors, and returns its sites. What a folder of the hub's cache
    lacks is downloaded first. `files`: those of weights that are asked for, where a `variant` has names of its own.

    Raises:
        CheckpointError: a file is missing, altered or cut short, or a tensor is not what its spec promises.
    """
    config = read_config(folder)
    sites = read_sites(config.get("quantization_config"), str(folder))
    if "checksums" in config["quantization_config"]:
        _verify_files(folder, config)
    stored = stored_tensors(folder, [Path(file).name for file in files])
    for site, packed in sites.items():
        for name, (dtype, shape) in packed.stored().items():
            piece = stored.get(name)
            if piece is None:
                raise CheckpointError(f"{folder}: {name} is missing; {packed.spec} of {site} needs it")
            if (piece.dtype, piece.shape) != (dtype, shape):
                raise CheckpointError(
                    f"{folder}: {name} is {piece.dtype} {list(piece.shape)}; {dtype} {list(shape)} was expected"
                )
    return sites


@contextmanager
def verified() -> Generator[None]:
    """What transformers and diffusers load in it is not verified again, and by one thread at a time: they change torch
    and their own classes meanwhile, and two at once leave weights unread, even of models that are loaded later."""
    with LOADING:
        token = VERIFIED.set(True)
        try:
            yield
        finally:
            VERIFIED.reset(token)


def _verify_files(folder: Path, config: dict[str, Any]) -> None:
    path = folder / CHECKSUMS
    fetch(folder, [CHECKSUMS])
    if not path.is_file() or sha256(path) != config["quantization_config"]["checksums"]:
        state = "altered" if path.is_file() else "missing"
        raise CheckpointError(f"{path}: {state}; copy the checkpoint again, whole")
    files = listed_files(folder)
    fetch(folder, files)
    has_tokenizer = any(name.startswith(("tokenizer", "vocab")) or name.endswith(".model") for name in files)
    patterns = [*READ, *(TOKENIZER if has_tokenizer else ())]  # a checkpoint that has none may be given it
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        if file.relative_to(folder).as_posix() not in files:
            raise CheckpointError(
                f"{file}: does not belong to this checkpoint, and would be read as if it did; remove it, or, if it was "
                "added on purpose, load it in Python with verify=False"
            )
    for name, digest in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; copy the checkpoint again, whole")
        if (config_digest(config) if name == "config.json" else sha256(file)) != digest:
            raise CheckpointError(
                f"{file}: its content is not what was written (checksum differs); copy it again, or, if it was "
                "changed on purpose, load it in Python with verify=False"
            )


def listed_files(folder: Path) -> dict[str, str]:
    """The files of a sealed checkpoint and their sha256, as `checksums.json` lists them.

    Raises:
        CheckpointError: it cannot be read, or names what is not a file of the folder.
    """
    path = folder / CHECKSUMS
    try:
        files = json.loads(path.read_bytes())["files"]
        if not isinstance(files, dict):
            raise ValueError("no list of files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); copy the checkpoint again, whole") from None
    return {plain_name(name, path, inner=True): str(digest) for name, digest in files.items()}


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the tensors, chosen as transformers chooses: one file goes before an index."""
    stem = next((s for s in STEMS if (folder / f"{s}.safetensors").is_file()), None)
    index = folder / next((index_name(s) for s in STEMS if (folder / index_name(s)).exists()), "")
    if stem is not None or index == folder:
        return [f"{stem or STEMS[0]}.safetensors"]
    try:
        names: Any = json.loads(index.read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: damaged ({error}); copy the checkpoint again") from None
    return sorted({plain_name(name, index) for name in names})


def plain_name(name: Any, listed_in: Path, inner: bool = False) -> str:
    """`name` if it is that of a file in its folder; `inner`: or of one in a folder there. Raises `CheckpointError` for
    one that leads out of it."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if not all(map(is_plain, parts)) or (len(parts) > 1 and not inner):
        raise CheckpointError(f"{listed_in}: names {name!r}, which is not a file of this folder")
    return name


def stored_tensors(folder: Path, files: Iterable[str] = ()) -> dict[str, Piece]:
    """Every tensor of the folder's safetensors files, or of these, by name, from the headers."""
    stored: dict[str, Piece] = {}
    for file in files or weight_files(folder):
        for name, piece in read_pieces(folder / file).items():
            if name in stored:
                raise CheckpointError(f"{folder}: {name} is stored twice; copy the checkpoint again")
            stored[name] = piece
    return stored
