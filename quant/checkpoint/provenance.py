"""Where a checkpoint comes from: the base model and its licence, the machine, and the command that makes it again.

The command is built from the recipe, not copied from the terminal: it is the same for a run that was resumed, from
Python, or into another folder, so a model card that shows it is the same to the byte. It starts from the shipped recipe
that is nearest and names what differs; where no shipped recipe is near, it gives `recipe.json` from beside the weights.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load

from quant.checkpoint.manifest import FORMAT_VERSION
from quant.models.source import Source
from quant.prepare import Prepared
from quant.recipe import load_recipe, shipped_recipes

DEFAULT = "gptq"  # what --recipe is when it is not given
FLAGS = {
    "spec.bits": "--bits",
    "spec.group_size": "--group-size",
    "calibration.text": "--calibration",
    "calibration.samples": "--samples",
    "calibration.sequence_length": "--sequence-length",
    "calibration.seed": "--seed",
}
FIXED = ("spec.layout", "solver.kind")  # no --set reaches these: another recipe is another starting point
CACHE = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]{40})")  # a hub download: owner--name and the commit
LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")


def provenance(prepared: Prepared) -> dict[str, Any]:
    """What the report says beside the run's identity and its results; plain data."""
    source, samples, settings, recipe = prepared.source, prepared.samples, prepared.settings, prepared.recipe
    plan = None if settings.plan is None else str(settings.plan)
    compute = {"device": settings.device, "dtype": settings.dtype, "threads": prepared.threads}
    return {
        "format_version": FORMAT_VERSION,
        "source": origin(source),
        "calibration_tokens": samples.tokens if recipe.calibration is not None else 0,
        "plan_file": plan,
        "command": command(recipe.to_dict(), source.name, compute, plan),
        "machine": machine(),
    }


def origin(source: Source) -> dict[str, Any]:
    """The base model: its size, and what its folder says about name, commit and licence (None: it says nothing)."""
    cached = CACHE.search(source.folder.as_posix())
    front = front_matter(source.folder)
    architectures = source.config.get("architectures")
    return {
        "bytes": source.nbytes(),
        "parameters": sum(math.prod(entry.shape) for entry in source.entries.values()),
        "architecture": str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        "base_model": cached[1].replace("--", "/", 1) if cached else None,
        "revision": cached[2] if cached else None,
        "license": _license(front.get("license")) or _license(source.config.get("license")),
        "license_name": _license(front.get("license_name")),
        "license_link": _link(front.get("license_link")),
    }


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML header of the folder's README.md; empty where there is none that can be read."""
    try:
        return metadata_load(folder / "README.md") or {}
    except Exception:  # whatever is wrong with somebody else's README: its licence is then unknown, and we say so
        return {}


def machine() -> dict[str, Any]:
    """This machine, without its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 1,
        "gpu": gpu,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def command(recipe: Mapping[str, Any], model: str, compute: Mapping[str, Any], plan: str | None = None) -> str:
    """The `quantize` command that makes the same bytes from the same model on the same kind of machine."""
    words = ["quantize", "--model", model]
    name, changes = _nearest(_flat(recipe))
    if name is None:
        words += ["--recipe", "recipe.json"]
    elif name != DEFAULT:
        words += ["--recipe", name]
    for path, value in changes.items():
        words += _option(path, value)
    words += ["--plan", plan] if plan is not None else []
    words += ["--device", str(compute["device"]), "--dtype", str(compute["dtype"])]
    return shlex.join(words + (["--threads", str(compute["threads"])] if compute["device"] == "cpu" else []))


def _nearest(wanted: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The shipped recipe with the fewest differences, and these; the bits are always named."""
    best: tuple[str | None, dict[str, Any]] = (None, {})
    for name in sorted(shipped_recipes(), key=lambda name: (name != DEFAULT, name)):
        base = _flat(load_recipe(name).to_dict())
        if set(base) != set(wanted) or any(base[path] != wanted[path] for path in FIXED):
            continue
        changes = {p: v for p, v in wanted.items() if p == "spec.bits" or v != base[p]}
        if best[0] is None or len(changes) < len(best[1]):
            best = (name, changes)
    return best


def _option(path: str, value: Any) -> list[str]:
    if path == "spec.symmetric":
        return ["--symmetric" if value else "--asymmetric"]
    if path in ("only", "skip") and value:
        return [word for pattern in value for word in (f"--{path}", pattern)]
    if path in FLAGS:
        return [FLAGS[path], str(value)]
    return ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    made: dict[str, Any] = {}
    for key, value in data.items():
        made |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return made


def _license(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and LICENSE.fullmatch(value) else None


def _link(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(r"https://[^\s<>\"'()]{1,300}", value) else None
