"""Plans: the spec of each site, from a recipe and from a file; plain JSON that can be read, edited and given back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.errors import SettingsError
from quant.kernels.spec import LowRank, Rotated, Spec, SpecError, Trellis, spec_from_dict
from quant.models.walk import Site, Walk
from quant.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """The spec of every site, by name in call order; None keeps a site float."""

    specs: dict[str, Spec | None]

    def to_dict(self) -> dict[str, Any]:
        return {name: None if spec is None else spec.to_dict() for name, spec in self.specs.items()}


def make_plan(recipe: Recipe, found: Walk, file: Path | None = None) -> Plan:
    """The recipe's spec for each site, with those that a plan file names replaced.

    Raises:
        SettingsError: the file cannot be read, names a site that is not there, or holds an impossible spec.
    """
    sites = {site.name: site for site in found.sites}
    specs: dict[str, Spec | None] = {}
    if file is None:
        return Plan({name: fitted(recipe.spec, site) for name, site in sites.items()})
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"--plan {file}: cannot be read ({error})") from None
    if not isinstance(given, dict):
        raise SettingsError(f"--plan {file}: expected a JSON object, found {given!r}")
    for name, spec in given.items():  # pyright: ignore[reportUnknownVariableType]
        if name not in sites:
            raise SettingsError(f"--plan {file}: {name} is not a site of this model; --dry-run lists the sites")
        try:
            specs[name] = None if spec is None else fitted(spec_from_dict(spec), sites[name])
        except SpecError as error:
            raise SettingsError(f"--plan {file}: {name}: {error}") from None
    return Plan({name: specs[name] if name in specs else fitted(recipe.spec, site) for name, site in sites.items()})


def fitted(spec: Spec, site: Site) -> Spec:
    """The spec as a site needs it: in a stack of experts, sequences of a trellis end where an expert ends, and all
    experts share one rotation.

    Raises:
        SettingsError: an expert's rows cannot be cut into sequences, or a stack is to have a low-rank branch.
    """
    core = spec.core
    if site.experts and isinstance(spec, LowRank):
        raise SettingsError(
            f"{site.name}: a stack of experts has no low-rank branch, which would need factors for each expert; give "
            "this site its base spec with --plan, or leave it float with --skip"
        )
    if not site.experts or not isinstance(core, Trellis):
        return spec
    length = math.gcd(site.out, core.length)
    if length % 32:
        raise SettingsError(
            f"{site.name}: experts of {site.out} rows cannot be cut into equal sequences of whole 32 rows; give this "
            "site a uniform spec with --plan, or leave it float with --skip"
        )
    core = replace(core, length=length)
    return replace(spec, base=core, measured=False, outputs=False) if isinstance(spec, Rotated) else core
