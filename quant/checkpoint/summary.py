"""A report said in words and groups: what the model card, report.html and `quant-inspect` have in common.

A model has seven kinds of site or seventy thousand experts; nobody reads a list of either. So sites are grouped by kind
(the last part of the name, longer where that is ambiguous), and notes by what they say with the numbers left out.
Everything here takes the plain data of report.json, does not trust it, and is deterministic.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quant.recipe import SOLVERS

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
Site = Mapping[str, Any]


@dataclass
class Group:
    """Texts that differ only in their numbers. `text`: the first of them; `names`: whose they are, each once."""

    text: str
    count: int = 0
    names: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        names = ", ".join(self.names[:3]) + (f" and {len(self.names) - 3:,} more" if len(self.names) > 3 else "")
        return f"{self.text}{f' (and {self.count - 1:,} alike)' if self.count > 1 else ''}: {names}"


def grouped(pairs: Iterable[tuple[str, str]]) -> list[Group]:
    """(name, text) pairs as groups, in the order of their first text."""
    groups: dict[str, Group] = {}
    for name, text in pairs:
        group = groups.setdefault(NUMBER.sub("#", text), Group(text))
        group.count += 1
        if not group.names or group.names[-1] != name:
            group.names.append(name)
    return list(groups.values())


def notes(report: Mapping[str, Any]) -> list[Group]:
    """What did not go as asked, solvers' notes and what the figures themselves say."""
    found: list[tuple[str, str]] = []
    for site in report["sites"]:
        error, inputs = site["error"], site["shape"][1]
        if not math.isfinite(error):
            found.append((site["site"], "its error is not finite: the float weight's own output is zero here"))
        elif error > 0.5:
            found.append((site["site"], "more than half of the output's energy is lost"))
        if report["recipe"]["calibration"] and not site["experts"] and max(site["tokens"], default=0) < inputs:
            found.append(
                (site["site"], f"{max(site['tokens'], default=0)} tokens for {inputs} inputs: give more samples")
            )
    found += [(site["site"], note) for site in report["sites"] for note in site["notes"]]
    return grouped(found)


def left_float(report: Mapping[str, Any]) -> list[Group]:
    """Weight matrices that stay float, by reason."""
    return grouped((str(name), str(reason)) for name, reason in report["left_float"].items())


def kinds(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Sites by kind, in the order of their first one. A kind is named by the fewest last parts that tell it apart."""
    paths = [_path(site) for site in sites]
    distinct = set(paths)
    tails = Counter(path[-n:] for path in distinct for n in range(1, len(path) + 1))
    found: dict[str, list[Site]] = {}
    for site, path in zip(sites, paths, strict=True):
        length = next((n for n in range(1, len(path)) if tails[path[-n:]] == 1), len(path))
        found.setdefault(".".join(path[-length:]), []).append(site)
    return found


def _path(site: Site) -> tuple[str, ...]:
    """The parts of a site's name below its block, without numbers."""
    name, block = str(site["site"]), str(site.get("block", ""))
    inside = name.removeprefix(block + ".") if block else name
    return tuple(part for part in inside.split(".") if not part.isdigit()) or ("linear",)


def spec_words(spec: Mapping[str, Any]) -> str:
    """`3-bit, groups of 64, asymmetric`; for layouts not known here, their fields."""
    if spec.get("layout") != "uniform":
        fields = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "layout")
        return f"{spec.get('layout')} ({fields})" if fields else str(spec.get("layout"))
    size = spec.get("group_size")
    groups = "whole rows" if size == -1 else f"groups of {size}"
    symmetry = "symmetric" if spec.get("symmetric") else "asymmetric"
    scales = "" if spec.get("scale_dtype") == "float16" else f", {spec.get('scale_dtype')} scales"
    return f"{spec.get('bits')}-bit, {groups}, {symmetry}{scales}"


def specs_words(sites: Sequence[Site]) -> str:
    """The specs of many sites, commonest first."""
    counts = Counter(spec_words(site["spec"]) for site in sites)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{words} ({count:,} sites)" for words, count in counts.most_common())


def method_words(recipe: Mapping[str, Any]) -> str:
    """What the solver says of itself in the first sentence of its module, and its settings."""
    solver = dict(recipe["solver"])
    kind = solver.pop("kind")
    module = next((sys.modules[s.__module__] for s in SOLVERS if s.__name__ == kind), None)
    idea = ((module.__doc__ if module else None) or kind).partition("\n\n")[0].partition(". ")[0].rstrip(".")
    settings = ", ".join(f"{name} {value}" for name, value in solver.items() if not isinstance(value, dict))
    return f"{' '.join(idea.split())} ({kind}{': ' if settings else ''}{settings})"


def windows_words(recipe: Mapping[str, Any], tokens: int) -> str:
    """How the calibration windows were cut."""
    rule = recipe["calibration"]
    length = tokens // max(1, rule["samples"])
    return (
        f"{rule['samples']:,} windows of {length:,} tokens ({tokens:,} in all), starting where torch.randint with seed "
        f"{rule['seed']} says; {rule['batch_size']} at once"
    )


def tokens_words(tokens: Sequence[int]) -> str:
    """One count, or least, most and median for the experts of a stack."""
    if len(set(tokens)) <= 1:
        return f"{tokens[0]:,}" if tokens else ""
    return f"{min(tokens):,} to {max(tokens):,}, median {statistics.median(tokens):,.0f}"


def errors(sites: Iterable[Site]) -> list[float]:
    """Finite errors, sorted."""
    return sorted(site["error"] for site in sites if isinstance(site["error"], float) and math.isfinite(site["error"]))


def percent(error: float) -> str:
    """A relative error: `1.42 %`."""
    return f"{100 * error:.3g} %" if math.isfinite(error) else "not finite"


def plural(count: int, noun: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def plain(text: object, limit: int = 300) -> str:
    """Untrusted text on one line: without control characters, and not without end."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
