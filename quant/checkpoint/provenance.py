"""Where a checkpoint comes from: the base model and its licence, the machine, and the command that makes it again.

The command is built from the recipe, not copied from the terminal: it is the same for a run that was resumed, from
Python, or into another folder, so a model card that shows it is the same to the byte. It starts from the shipped recipe
that is nearest and names what differs; where none is near, it gives `recipe.json` from beside the weights.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from quant.checkpoint.manifest import FORMAT_VERSION
from quant.checkpoint.words import code_bits
from quant.kernels.spec import Uniform
from quant.machine import machine
from quant.models.source import Source
from quant.prepare import Prepared
from quant.recipe import load_recipe, shipped_recipes

FIXED = ("spec.layout", "solver.kind")  # no --set reaches these: another one is another starting point


def provenance(prepared: Prepared) -> dict[str, Any]:
    """What report.json says beside the run's identity and its results; plain data."""
    return {
        "format_version": FORMAT_VERSION,
        "source": origin(prepared.source),
        "command": command(prepared.identity()),
        "machine": asdict(machine()),
    }


def origin(source: Source) -> dict[str, Any]:
    """The base model: size, architecture, hub name and commit (None for a local folder), licence (None: not stated)."""
    on_hub = source.folder.parent.name == "snapshots" and not Path(source.name).exists()  # else a folder was given
    try:
        stated = (metadata_load(source.folder / "README.md") or {}).get("license")
    except Exception:  # somebody else's README, wrong in whatever way: the licence is then unknown, and we say so
        stated = None
    return {
        "bytes": source.nbytes(),
        "parameters": sum(math.prod(entry.shape) for entry in source.entries.values()),
        "component": source.inside,
        "library": "diffusers" if source.is_diffusion else "transformers",
        "architecture": str(source.config.get("_class_name") or (source.config.get("architectures") or ["unknown"])[0]),
        "base_model": source.name if on_hub else None,
        "revision": source.folder.name if on_hub else None,
        "license": stated if isinstance(stated, str) else None,
    }


def command(run: Mapping[str, Any], plan: str = "plan.json") -> str:
    """The `quantize` command that makes the same bytes on the same kind of machine. `run`: `Prepared.identity()`;
    `plan`: where its plan lies; "" if that need not be said."""
    recipe, compute = run["recipe"], run["compute"]
    if "begun" in run.get("calibration", {}):  # the model was asked, and is again
        recipe = {**recipe, "calibration": {**recipe["calibration"], "bos": None}}
    ends = recipe.get("embeddings")
    name, changes = _nearest(_flat({**recipe, "embeddings": None}))
    words = ["quantize", "--model", run["model"]["name"], "--recipe", name]
    words += ["--components", run["model"]["component"]] if "component" in run["model"] else []
    place = next((path for path in changes if re.fullmatch(r"spec(\.base)*\.bits", path)), "")
    bits = changes.get(place) or code_bits(recipe["spec"])
    if bits and not bits % 1:  # said even where it is the recipe's own; a fraction would be an average there
        words += ["--bits", str(int(bits))]
        changes.pop(place, None)
    if ends:
        words += ["--embedding-bits", str(ends["bits"])]
        grid = asdict(Uniform()) | {"bits": ends["bits"]}
        changes |= {f"embeddings.{key}": ends[key] for key in grid if ends[key] != grid[key]}
    for path, value in changes.items():
        words += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    if plan and any(spec not in (recipe["spec"], ends or recipe["spec"]) for spec in run["plan"].values()):
        words += ["--plan", plan]
    words += ["--device", compute["device"], "--dtype", compute["dtype"]]
    return shlex.join(words + (["--threads", str(compute["threads"])] if compute["device"] == "cpu" else []))


def _nearest(wanted: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The shipped recipe with the fewest differences, and these."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in shipped_recipes():
        base = _flat(load_recipe(name).to_dict())
        if set(base) == set(wanted) and all(base[path] == wanted[path] for path in FIXED):
            found.append((name, {path: value for path, value in wanted.items() if value != base[path]}))
    return min(found, key=lambda item: len(item[1]), default=("recipe.json", {}))


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    made: dict[str, Any] = {}
    for key, value in data.items():
        made |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return made
