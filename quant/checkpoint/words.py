"""What the model card, report.html and `quant-inspect` say alike of the plain data of report.json; deterministic.

A site's `error` is None where it is not finite. Names and texts come from the model's folder: whoever shows them passes
them through `plain` and escapes them for the place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
Site = Mapping[str, Any]
METHODS = {"Feedback": "GPTQ (arXiv 2210.17323)", "Nearest": "round to nearest"}  # others: by their class
RECOVERIES = {
    "BlockTuning": "block tuning (SignRound, arXiv 2309.05516, on codes; Adam on scales)",
    "Assignments": "assignments of vectors learned among candidates (VQ4DiT, arXiv 2408.17131)",
}


def notes(report: Report) -> list[tuple[str, str]]:
    """(site, what did not go as asked): what the figures say themselves, then the solvers' notes."""
    found: list[tuple[str, str]] = []
    for site in all_sites(report):
        error, inputs, seen = site["error"], site["shape"][1], max(site["tokens"], default=0)
        if error is None:
            found.append((site["site"], "its error is not finite: the float weight's own output is zero here"))
        elif error > 0.5:
            found.append((site["site"], "more than half of the output's energy is lost"))
        if report["recipe"]["calibration"] and not site["experts"] and not site.get("end") and seen < inputs:
            found.append((site["site"], f"{seen} tokens for {inputs} inputs: give more samples"))
    return found + [(site["site"], brief(site["notes"])) for site in all_sites(report) if site["notes"]]


def all_sites(report: Report) -> list[Site]:
    """Those of the blocks, and the packed embedding and head."""
    return [*report["sites"], *report.get("ends", ())]


def ends_words(ends: Sequence[Site]) -> str:
    """What the embedding and the head take."""
    told = (f"{end['site']}: {end['bits_per_weight']:.5g} bits per weight, {end['nbytes']:,} bytes" for end in ends)
    return "; ".join(told)


def brief(texts: Sequence[str]) -> str:
    """A stack has a note per expert: the first of them."""
    return "; ".join(capped(texts, 1))


def capped(lines: Sequence[str], most: int) -> list[str]:
    rest = len(lines) - most
    return [*lines[:most], *([f"and {rest:,} more in report.json"] if rest > 0 else [])]


def worst(sites: Sequence[Site], most: int) -> Sequence[Site]:
    """All sites in the model's order, or those of most error if there are more than `most`."""
    if len(sites) <= most:
        return sites
    return sorted(sites, key=lambda site: float("-inf") if site["error"] is None else -site["error"])[:most]


def by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    """What stayed float: reason -> names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def kind(site: Site) -> str:
    """A site's name below its block, without numbers: what it has in common with its like in other blocks."""
    return re.sub(r"\.\d+(?=\.)", "", site["site"].removeprefix(site["block"] + "."))


def errors(sites: Sequence[Site]) -> list[float]:
    """Finite errors, sorted."""
    return sorted(site["error"] for site in sites if site["error"] is not None)


def provenance_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What decides the bytes, in words. `run`: `Prepared.identity()`, which report.json holds too."""
    recipe, text, compute = run["recipe"], run["calibration"], run["compute"]
    grids = any(spec is not None and core(spec)["layout"] == "uniform" for spec in run["plan"].values())
    unused = ("kind",) if grids else ("kind", "search")  # a search for grids
    settings = {key: value for key, value in recipe["solver"].items() if key not in unused} | {"match": recipe["match"]}
    rows = [
        ("base model", f"{run['model']['name']}, sha256 {run['model']['sha256']} (config, headers, samples)"),
        ("method", f"{METHODS.get(recipe['solver']['kind'], recipe['solver']['kind'])}; {_settings(settings)}"),
        ("calibration inputs", f"{text['text']}, sha256 {text['sha256'] or 'none'}"),
    ]
    if recovery := recipe.get("recovery"):
        trained = {key: value for key, value in recovery.items() if key != "kind"}
        rows.append(("recovery", f"{RECOVERIES.get(recovery['kind'], recovery['kind'])}; {_settings(trained)}"))
    if distillation := recipe.get("distillation"):
        rows.append(("recovery", f"end-to-end tuning; {_settings(distillation)}"))
    if windows := recipe["calibration"]:
        many = f"{windows['samples']:,} (a window of text: at most {windows['sequence_length']:,} tokens)"
        rows.append(("calibration samples", f"{many}, seed {windows['seed']}, {windows['batch_size']} at once"))
    if folding := run.get("folding"):
        pairs = [name for name in folding["folded"] if "->" in name]
        others = [name for name in folding["folded"] if name not in pairs]
        said = [f"between linears ({len(pairs)} pairs)"] if pairs else []
        rows.append(("rotations folded", " and ".join([*said, *others]) or "none"))
    where = f"{compute['device']} ({compute['machine']}) in {compute['dtype']}, {compute['threads']} threads"
    return [*rows, ("computed", where), ("versions", _settings(run["versions"]))]


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} ({_settings(v)})" if isinstance(v, dict) else f"{k} {v}" for k, v in values.items())


def asked_bits(recipe: Mapping[str, Any]) -> float | str:
    """Bits per weight that a recipe, as in report.json, asks for."""
    return recipe["average"] or code_bits(recipe["spec"]) or "mixed"


def code_bits(spec: Mapping[str, Any]) -> int | None:
    """Bits of each code, where the layout has such a thing."""
    return core(spec).get("bits")


def core(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """A spec without what is around its codes."""
    return core(spec["base"]) if "base" in spec else spec


def spec_words(spec: Mapping[str, Any]) -> str:
    """`3-bit, groups of 64, asymmetric`; for other layouts, their fields."""
    if spec["layout"] in ("rotated", "smoothed"):
        return f"{spec_words(spec['base'])}, {spec['layout']}"
    if spec["layout"] == "lowrank":
        anchor = ", first token in float" if spec.get("anchor") else ""
        return f"{spec_words(spec['base'])}, branch of rank {spec['rank']}{anchor}"
    if spec["layout"] == "trellis":
        return f"{spec['bits']}-bit trellis, window {spec['window']}, code {spec['code']}, {spec['length']} rows"
    if spec["layout"] != "uniform":
        return f"{spec['layout']} ({_settings({key: value for key, value in spec.items() if key != 'layout'})})"
    groups = "whole rows" if spec["group_size"] == -1 else f"groups of {spec['group_size']}"
    symmetry = "symmetric" if spec["symmetric"] else "asymmetric"
    scales = "" if spec["scale_dtype"] == "float16" else f", {spec['scale_dtype']} scales"
    inputs = ", 8-bit activations" if spec.get("activations") == 8 else ""
    return f"{spec['bits']}-bit, {groups}, {symmetry}{scales}{inputs}"


def specs_words(sites: Sequence[Site]) -> str:
    """The specs of many sites, commonest first."""
    counts = Counter(spec_words(site["spec"]) for site in sites)
    return "; ".join(f"{words} ({count:,} sites)" for words, count in counts.most_common())


def shape_words(site: Site) -> str:
    rows, columns = site["shape"]
    experts = site["experts"]
    return f"{experts} × {rows // experts:,} × {columns:,}" if experts else f"{rows:,} × {columns:,}"


def tokens_words(tokens: Sequence[int]) -> str:
    """One count, or the least and most of a stack's experts."""
    least, most = min(tokens, default=0), max(tokens, default=0)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def percent(error: float | None) -> str:
    """A relative error: `1.42 %`."""
    return "–" if error is None else f"{100 * error:.3g} %"


def plain(text: object, limit: int = 300) -> str:
    """Untrusted text on one line: without control characters, and not without end."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
