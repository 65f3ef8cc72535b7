"""Plans: the spec of each site, from a recipe and from a file; plain JSON that can be read, edited and given back. In a
file a pattern (`*.down_proj`) may stand for many sites."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from quant.errors import SettingsError
from quant.kernels.spec import (
    Binary,
    Codebook,
    LowRank,
    Rotated,
    Smoothed,
    Spec,
    SpecError,
    Trellis,
    Uniform,
    spec_from_dict,
)
from quant.models.walk import Site, Walk
from quant.pairs import UNIT
from quant.place import Settings
from quant.recipe import Recipe, respec
from quant.solvers.metric import scaled


@dataclass(frozen=True)
class Plan:
    """The spec of every site, by name in call order; None keeps a site float. Of sites where it was measured, `rows`
    int8 `[rows]`: how much an error in each counts, `2^(r / 4)`; and `pairs` int8 `[rows, width]`, not of experts: how
    those of one sequence correlate, in 127ths (`pairs.py`)."""

    specs: dict[str, Spec | None]
    rows: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    pairs: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def counts(self, name: str) -> Tensor | None:
        """How much an error in each row of a site counts, float32 `[rows]`; None where all count the same."""
        return (self.rows[name].float() / 4).exp2() if name in self.rows else None

    def metrics(self, site: Site) -> Sequence[Tensor] | None:
        """How much errors in the rows of a site count (`solvers/metric.py`), of each expert."""
        rows = self.counts(site.name)
        if rows is None or site.name not in self.pairs:
            return None if rows is None else rows[:, None].split(site.out)
        return [scaled(self.pairs[site.name].float() / UNIT, rows.sqrt())]

    def metric(self, site: Site) -> Tensor | None:
        """That of all experts, one after another."""
        known = self.metrics(site)
        return None if known is None else torch.cat([*known])

    def counted(self) -> dict[str, Tensor]:
        """All of it, by names of their own."""
        parts = {"rows": self.rows, "pairs": self.pairs}
        return {f"{kind}.{name}": one for kind, known in parts.items() for name, one in known.items()}

    def fingerprint(self) -> str:
        """Of what counts."""
        digest = hashlib.sha256()
        for name, one in sorted(self.counted().items()):
            digest.update(f"{name} {tuple(one.shape)} ".encode())
            digest.update(one.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {name: None if spec is None else spec.to_dict() for name, spec in self.specs.items()}


def make_plan(
    recipe: Recipe, walk: Walk, settings: Settings, bits: Mapping[str, int] | None = None,
    anchors: Set[str] = frozenset(),
) -> Plan:  # fmt: skip
    """The spec of each site: a plan file's, or the recipe's where the file does not name it. `bits`: of those sites,
    where they were chosen by measurement; `anchors`: the sites whose first token stays in float.

    Raises:
        SettingsError: the file cannot be read, names a site that is not there, or holds an impossible spec.
    """
    told = given(settings, walk)
    free = {site.name: site for site in walk.sites if site.name not in told}
    if bits is not None:
        own = {name: of_width(recipe.spec, bits[name], site) for name, site in free.items()}
    elif recipe.average is not None and free:
        own = spread(recipe, [*free.values()], left(recipe, walk, told) / sum(s.weights for s in free.values()))
    else:
        own = {name: raised(recipe, recipe.spec, site) for name, site in free.items()}
    own = {name: with_anchor(spec) if name in anchors else spec for name, spec in own.items()}
    own |= {site.name: recipe.embeddings for site in walk.ends}
    return Plan({site.name: told[site.name] if site.name in told else own[site.name] for site in walk.all})


def left(recipe: Recipe, walk: Walk, told: Mapping[str, Spec | None]) -> float:
    """Bits that an average leaves to the sites that a plan file does not name."""
    assert recipe.average is not None
    packed = [site for site in walk.sites if told.get(site.name, recipe.spec) is not None]
    taken = sum(8 * spec.nbytes(site.shape) for site in packed if (spec := told.get(site.name)) is not None)
    return recipe.average * sum(site.weights for site in packed) - taken


def given(settings: Settings, walk: Walk) -> dict[str, Spec | None]:
    """The specs that a plan file has for the sites of a model. Raises `SettingsError` as `make_plan`."""
    sites = {site.name: site for site in walk.all}
    kinds = [[site.name for site in some] for some in (walk.sites, walk.ends)]
    specs, file = dict[str, Spec | None](), settings.plan
    for pattern, spec in sorted(settings.told.items(), key=lambda item: item[0] in sites):  # names in full say it last
        linears, ends = ([name for name in names if fnmatchcase(name, pattern)] for names in kinds)
        found = [pattern] if pattern in sites else linears or ends  # `*` is no word about ends
        if not found:
            raise SettingsError(
                f"--plan {file}: {pattern} is no site of this model and no pattern of one; --dry-run shows patterns, "
                "--dry-run --json all names, of an embedding and a head where --embedding-bits is given"
            )
        name = pattern
        try:
            for name in found:
                specs[name] = None if spec is None else fitted(spec_from_dict(spec), sites[name])
        except SpecError as error:
            raise SettingsError(f"--plan {file}: {name}: {error}") from None
    return specs


def spread(recipe: Recipe, sites: Sequence[Site], average: float) -> dict[str, Spec]:
    """Every site at the recipe's bits or one bit more (trellis codes, whose overhead may need it, also one bit fewer
    or that many), so that all together have at most `average` bits per weight, overhead included. The extra bits are
    spread evenly over the depth of the model: a site gets one as soon as the sites up to it have room for it.

    Raises:
        SettingsError: the average is below what the recipe's own bits take.
    """
    low = recipe.spec
    bits: int = low.core.to_dict()["bits"]
    pairs = {s.name: (s, raised(recipe, low, s), raised(recipe, respec(low, bits=bits + 1), s)) for s in sites}
    weights = sum(site.weights for site, _, _ in pairs.values())
    least = sum(8 * spec.nbytes(site.shape) for site, spec, _ in pairs.values())
    if least > average * weights and bits > 1 and isinstance(low.core, Trellis):
        return spread(replace(recipe, spec=respec(low, bits=bits - 1)), sites, average)
    if least > average * weights:
        asked = recipe.average or average
        raise too_few(asked, average, not math.isclose(asked, average), bits, least / weights)
    chosen, room = dict[str, Spec](), 0.0  # bits that the sites so far left over
    for name, (site, small, large) in pairs.items():
        extra = 8 * (large.nbytes(site.shape) - small.nbytes(site.shape))
        room += (average - least / weights) * site.weights
        chosen[name], room = (large, room - extra) if extra <= room else (small, room)
    return chosen


def too_few(asked: float, average: float, told: bool, bits: int, least: float) -> SettingsError:
    """On `asked` bits on average, of which a plan file, where one is `told`, leaves `average`; codes take `least`."""
    rest = f", of which the plan file leaves {average:.4f} to all others" if told else ""
    return SettingsError(
        f"{asked:g} bits on average{rest}: {bits}-bit codes take {least:.4f} with their overhead; give more"
    )


def raised(recipe: Recipe, spec: Spec, site: Site) -> Spec:
    """A spec as a site needs it, with at least `modulation_bits` for adaLN modulations: an error there moves all tokens
    of a sample the same way (SVDQuant keeps them at 4). Their inputs are not rounded: with a row per sample there is no
    time to be won."""
    spec = _unrounded(spec) if site.modulation else spec
    core, least = spec.core, recipe.modulation_bits
    if site.modulation and (core.to_dict().get("bits") or 0) < least:
        spec = respec(spec, bits=least) if isinstance(core, Uniform | Trellis) else Uniform(bits=least)
    return fitted(spec, site)


def with_anchor(spec: Spec) -> Spec:
    """The spec with a first token in float (`solvers/anchor.py`): one more component of its branch."""
    if isinstance(spec, Smoothed):
        return replace(spec, base=with_anchor(spec.base))
    if isinstance(spec, LowRank):
        return spec if spec.anchor else replace(spec, rank=spec.rank + 1, anchor=True)
    return LowRank(spec, rank=1, rounds=0, anchor=True)


def of_width(spec: Spec, bits: int, site: Site) -> Spec:
    """The spec with codes of so many bits, a uniform grid where its own have no such width."""
    try:
        return fitted(respec(spec, bits=bits), site)
    except SettingsError:
        return fitted(Uniform(bits=bits), site)


def fitted(spec: Spec, site: Site) -> Spec:
    """The spec as a site needs it: what a codebook or signs leave to its shape; and in a stack of experts, sequences
    of a trellis and rows of a codebook end where an expert ends, all experts share one rotation, none is smoothed and
    inputs are not rounded. Inputs that come rotated are not rotated again.

    Raises:
        SettingsError: nothing fits the bits asked, an expert's rows cannot be cut into sequences, or a stack is to have
            a low-rank branch.
    """
    if site.end and (not isinstance(spec, Uniform) or spec.activations < 16):
        raise SettingsError(f"{site.name}: the {site.end} of a model takes a uniform grid, and inputs as they are")
    if site.turned:
        spec = unrotated(spec)
    if site.experts:
        spec = _unrounded(spec.base if isinstance(spec, Smoothed) else spec)
    core = spec.core
    if site.experts and isinstance(spec, LowRank):
        raise SettingsError(
            f"{site.name}: a stack of experts has no low-rank branch, which would need factors for each expert; give "
            "this site its base spec with --plan, or leave it float with --skip"
        )
    if isinstance(core, Codebook | Binary):
        core = replace(core, rows=site.out) if site.experts else core
        try:
            spec = respec(spec, **asdict(core.chosen((site.out, site.inputs))))
        except SpecError as error:
            raise SettingsError(f"{site.name}: {error}; give it more, or leave the site float with --skip") from None
    if site.experts and isinstance(core, Trellis):
        length = math.gcd(site.out, core.length)
        if length % 32:
            raise SettingsError(
                f"{site.name}: experts of {site.out} rows cannot be cut into equal sequences of whole 32 rows; give "
                "this site a uniform spec with --plan, or leave it float with --skip"
            )
        spec = respec(spec, length=length)
    return replace(spec, measured=False, outputs=False) if site.experts and isinstance(spec, Rotated) else spec


def _unrounded(spec: Spec) -> Spec:
    """The spec with whole inputs."""
    return respec(spec, activations=16) if getattr(spec.core, "activations", 16) < 16 else spec


def unrotated(spec: Spec) -> Spec:
    """The spec without its rotation, inside the same wrappers around it."""
    if isinstance(spec, Rotated):
        return spec.base
    return replace(spec, base=unrotated(spec.base)) if isinstance(spec, LowRank | Smoothed) else spec
