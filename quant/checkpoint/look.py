"""What is in a folder, as plain data: a packed checkpoint, an unfinished run, or a float model.

Specs come from config.json and bytes from the headers of the safetensors files, so bits are measured, not believed.
Errors, notes and provenance come from report.json, which no checksum covers and anybody may have edited: it is taken
apart with care, and where it does not hold what ours holds it counts as damaged and is left out.
"""

from __future__ import annotations

import fcntl
import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.journal import FOLDER
from quant.checkpoint.manifest import METHOD, PackedSite, read_config, read_sites, stored_tensors, verify
from quant.checkpoint.provenance import command
from quant.checkpoint.shards import Piece
from quant.errors import CheckpointError, ResumeError, SettingsError
from quant.kernels.dispatch import explain
from quant.kernels.layouts import LAYOUTS
from quant.linear import stored_name
from quant.models.source import Source

TOLD = ("model", "recipe", "calibration", "compute", "versions")
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


def look(folder: Path, check: bool = True) -> dict[str, Any]:
    """Describes `folder`. `kind` is "packed", "unfinished" or "float"; damage that `check` finds is in
    `verification.error`, so that the rest can still be shown.

    Raises:
        SettingsError: there is no such folder.
        CheckpointError: config.json cannot be read, or its account of the packed sites cannot.
        ModelError: a float model's files cannot be read.
        ResumeError: an unfinished run's own account cannot be read.
    """
    if not folder.is_dir():
        state = "a file" if folder.exists() else "not there"
        raise SettingsError(f"{folder}: {state}; give the folder of a checkpoint")
    if (folder / FOLDER).is_dir():
        return _unfinished(folder)
    config = read_config(folder)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == METHOD:
        return _packed(folder, config, check)
    return _float(folder, config, method)


def _packed(folder: Path, config: dict[str, Any], check: bool) -> dict[str, Any]:
    sites = read_sites(config["quantization_config"], str(folder))
    problem: CheckpointError | None = None
    stored: dict[str, Piece] = {}
    try:
        stored = stored_tensors(folder)
        if check:
            verify(folder)
    except CheckpointError as error:
        problem = error
    told, state = _told(folder)
    entries = [_site(site, told["sites"].get(site.name, {})) for site in sites.values()]
    weights = sum(math.prod(site.shape) for site in sites.values())
    promised = sum(entry["nbytes"] for entry in entries)
    names = [name for site in sites.values() for name in site.stored()]
    packed = sum(stored[name].nbytes for name in names) if all(name in stored for name in names) else None
    files = {piece.file for piece in stored.values() if piece.file is not None}
    return {
        "kind": "packed",
        "folder": str(folder),
        "architecture": _architecture(config),
        "format_version": config["quantization_config"]["format_version"],
        "written_by": config["quantization_config"].get("version"),
        "bits": {
            "promised": 8 * promised / max(1, weights),
            "measured": None if packed is None else 8 * packed / max(1, weights),
            "weights": weights,
        },
        "bytes": {
            "packed": packed,
            "float": None if packed is None else sum(piece.nbytes for piece in stored.values()) - packed,
            "weight_files": sum(file.stat().st_size for file in files),
            "folder": _folder_bytes(folder),
        },
        "verification": {
            "checked": check,
            "sealed": "checksums" in config["quantization_config"],
            "error": None if problem is None else str(problem),
        },
        "report": state,
        **{key: told.get(key) for key in (*TOLD, "command", "original_bytes", "left_float")},
        "sites": entries,
    }


def explain_kernels(folder: Path) -> list[str]:
    """What the dispatch table says to one token and one packed weight of each spec, on each kind of device here."""
    source, lines = Source(folder, str(folder)), list[str]()
    sites = read_sites(read_config(folder).get("quantization_config"), str(folder)).values()
    for spec, site in {site.spec: site for site in reversed(list(sites))}.items():
        names = {key: stored_name(site.site(), key) for key in spec.tensors(site.shape)}
        tensors = {key: source.tensor(name) for key, name in names.items()}
        packed = LAYOUTS[spec.layout].from_tensors(spec, site.shape, tensors)
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            said = explain(torch.zeros((1, site.shape[1]), device=device), packed.to(device)).splitlines()
            lines += [f"{site.name}, one token on {device}:", *(f"  {line}" for line in said)]
    return lines


def _site(site: PackedSite, told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "site": site.name,
        "block": told.get("block", ""),
        "shape": list(site.shape),
        "experts": site.experts,
        "spec": site.spec.to_dict(),
        "bits_per_weight": site.spec.bits_per_weight(site.shape),
        "nbytes": site.spec.nbytes(site.shape),
        "error": told.get("error"),
        "tokens": told.get("tokens", []),
        "notes": told.get("notes", []),
    }


def _told(folder: Path) -> tuple[dict[str, Any], str]:
    """What report.json says, and whether it was "read", is "missing" or "damaged"."""
    path = folder / "report.json"
    if not path.is_file():
        return {"sites": {}}, "missing"
    try:
        report = json.loads(path.read_bytes())
        told = {key: dict(report[key]) for key in TOLD}
        told |= {"command": str(report["command"]), "original_bytes": int(float(report["source"]["bytes"]))}
        left = {str(name): str(reason) for name, reason in report["left_float"].items()}
        sites = {str(site["site"]): _told_site(site) for site in report["sites"]}
    except DAMAGE:
        return {"sites": {}}, "damaged"
    return {**told, "left_float": left, "sites": sites}, "read"


def _told_site(site: Any) -> dict[str, Any]:
    return {
        "block": str(site["block"]),
        "error": float(site["error"]),
        "tokens": [int(float(count)) for count in site["tokens"]],
        "notes": [str(note) for note in site["notes"]],
    }


def _unfinished(folder: Path) -> dict[str, Any]:
    journal = folder / FOLDER
    try:
        path = journal / "run.json"
        run = json.loads(path.read_bytes()) if path.exists() else None
        records = [json.loads(file.read_bytes()) for file in sorted(journal.glob("[0-9]*.json"))]
        solved = [{"block": record["block"], **site} for record in records for site in record["sites"]]
        sites = [{"site": str(site["site"]), **_told_site(site)} for site in solved]
        again = None if run is None else _resume(run, folder)
    except DAMAGE:
        raise ResumeError(
            f"{journal}: the account of an unfinished run is there, but damaged; begin anew with quantize --restart"
        ) from None
    run = run or {}
    return {
        "kind": "unfinished",
        "folder": str(folder),
        "running": _locked(journal / "lock"),
        **{key: run.get(key) for key in ("model", "recipe", "calibration", "compute", "versions")},
        "blocks_done": len(records),
        "sites_done": len(sites),
        "sites_planned": sum(spec is not None for spec in run.get("plan", {}).values()),
        "bytes": {"folder": _folder_bytes(folder)},
        "resume": again,
        "sites": sites,
    }


def _resume(run: Mapping[str, Any], folder: Path) -> str:
    """The command that goes on; a plan file, which a run keeps the content of but not the name, is left to fill in."""
    planned = any(spec != run["recipe"]["spec"] for spec in run["plan"].values())
    words = command(run["recipe"], run["model"]["name"], run["compute"])
    return f"{words}{' --plan PLAN.json' if planned else ''} --out {shlex.quote(str(folder))} --resume"


def _locked(path: Path) -> bool:
    """Whether a run holds the lock now."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _float(folder: Path, config: dict[str, Any], method: Any) -> dict[str, Any]:
    source = Source(folder, str(folder))
    dtypes: Counter[str] = Counter()
    for entry in source.entries.values():
        dtypes[entry.dtype] += math.prod(entry.shape)
    return {
        "kind": "float",
        "folder": str(folder),
        "architecture": _architecture(config),
        "quant_method": None if method is None else str(method),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes.most_common()),
        "bytes": {"weight_files": source.nbytes(), "folder": _folder_bytes(folder)},
    }


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
