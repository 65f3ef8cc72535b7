"""What `quantize` prints at its end: the dry run's prediction, or what was written. One JSON object for scripts."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quant.checkpoint.words import all_sites, code_bits, ends_words, spec_words
from quant.display import human
from quant.estimate import Estimate
from quant.kernels.spec import Spec, spec_from_dict
from quant.pipeline import Result
from quant.prepare import Prepared

MOST_SPECS = 12  # in words, below the table


def show_estimates(parts: Sequence[Prepared], predicted: Sequence[Estimate], as_json: bool, quiet: bool) -> None:
    """As JSON: one object, or for several components one of each by name."""
    if as_json:
        said = {
            part.source.inside: {
                **guess.to_dict(),
                "plan": part.plan.to_dict(),
                "left_float": part.walk.left,
                **({"folding": part.folded.to_dict()} if part.recipe.folding is not None else {}),
            }
            for part, guess in zip(parts, predicted, strict=True)
        }
        print(json.dumps(said if len(said) > 1 else next(iter(said.values()))))
        return
    for part, guess in zip(parts, predicted, strict=True):
        _show_estimate(part, guess, Console(quiet=quiet))


def _show_estimate(prepared: Prepared, predicted: Estimate, console: Console) -> None:
    title = f"plan for {escape(prepared.source.name)} {prepared.source.inside}".rstrip()
    table = Table(title=title)
    for heading in ("sites", "count", "rows x in", "code", "bits", "bytes each"):
        number = heading not in ("sites", "code")
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number)
    alike = Counter((_starred(s.name), s.shape, prepared.plan.specs[s.name]) for s in prepared.walk.sites)
    front, places = _shared([name for name, _, _ in alike]), list(dict.fromkeys(name for name, _, _ in alike))
    size = lambda spec, shape: math.inf if spec is None else spec.nbytes(shape)  # noqa: E731
    rows = sorted(alike.items(), key=lambda row: (places.index(row[0][0]), size(row[0][2], row[0][1])))
    ends = [((s.name, s.shape, prepared.plan.specs[s.name]), 1) for s in prepared.walk.ends]
    for (name, shape, spec), count in [*rows, *ends]:
        cells = ("float", "", "")
        if spec is not None:
            bits = code_bits(spec.to_dict())
            code = f"{bits}-bit {spec.core.layout}" if bits else spec.core.layout
            cells = (code, f"{spec.bits_per_weight(shape):.3f}", f"{spec.nbytes(shape):,}")
        short = f"*{name.removeprefix(front)}" if front and name in places else name
        table.add_row(escape(short), str(count), f"{shape[0]} x {shape[1]}", *cells)
    console.print(table)
    specs = Counter(prepared.plan.specs[s.name] for s in prepared.walk.sites)
    for spec, count in specs.items() if len(specs) < MOST_SPECS else ():
        if spec is not None:
            console.print(f"{spec_words(spec.to_dict())}: {count} sites", highlight=False)
    _show_modulations([prepared.plan.specs[site.name] for site in prepared.walk.sites if site.modulation], console)
    for word, told in {"float": prepared.walk.left, **prepared.folded.to_dict()}.items():
        for (name, how), count in Counter((_starred(n), how) for n, how in told.items()).items():
            times = f" ({count})" if count > 1 else ""
            console.print(f"{word}: {escape(name)}{times}: {escape(how)}", highlight=False)
    facts = Table(show_header=False, title="prediction")
    facts.add_row(
        "quantized weights", f"{predicted.weights:,} in {predicted.sites} sites at {predicted.promised_bits:.4f} bits"
    )
    facts.add_row("weight files", f"{predicted.weight_bytes:,} bytes, exactly (now {predicted.float_bytes:,})")
    facts.add_row("peak memory", human(predicted.peak_rss_bytes))
    if predicted.peak_gpu_bytes:
        facts.add_row("peak GPU memory", human(predicted.peak_gpu_bytes))
    if predicted.spilled_bytes:
        facts.add_row("activations on disk", human(predicted.spilled_bytes))
    took = f"rehearsed in {predicted.rehearsal_seconds:.0f} s"
    again = (
        f", {predicted.again_seconds:.0f} s more where moving codes helps nothing" if predicted.again_seconds else ""
    )
    facts.add_row("time", f"about {predicted.seconds:.{0 if predicted.seconds >= 10 else 1}f} s{again} ({took})")
    console.print(facts)


def _show_modulations(specs: Sequence[Spec | None], console: Console) -> None:
    """Why a diffusion transformer has more bits than were asked for."""
    bits = [code for spec in specs if spec is not None and (code := code_bits(spec.to_dict()))]
    if bits:
        console.print(f"modulations have {min(bits)} bits or more (modulation_bits of the recipe)", highlight=False)


def _starred(name: str) -> str:
    """A name without its block's number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _shared(names: Sequence[str]) -> str:
    """What all names begin with, whole parts; a pattern with `*` in its place finds the same sites (--skip, --only,
    --plan)."""
    parts = [list(alike) for alike in zip(*(name.split(".")[:-1] for name in names), strict=False)]
    return ".".join(alike[0] for alike in takewhile(lambda alike: len(set(alike)) == 1, parts))


def show_results(parts: Sequence[Prepared], result: Result, console: Console, as_json: bool) -> None:
    """As JSON: the report; for several components the first one's, with the others' by name."""
    others = {part.source.inside: one for part, one in zip(parts[1:], result.others, strict=True)}
    if as_json:
        more = {"components": {name: one.report for name, one in others.items()}} if others else {}
        print(json.dumps({"out": str(result.out), **result.report, **more}))
        return
    for part, one in zip(parts, (result, *result.others), strict=True):
        _show_result(one, part.source.inside if others else "", part.source.nbytes(), console)
    original, made = shlex.quote(result.report["model"]["name"]), shlex.quote(str(result.out))
    console.print(f"next: quant-eval {escape(made)} --against {escape(original)}", soft_wrap=True)


def _show_result(result: Result, part: str, float_bytes: int, console: Console) -> None:
    report, written = result.report, result.written
    total = sum(written.files.values())
    console.print(
        f"[bold]{escape(str(result.out / part))}[/bold]: {written.measured_bits:.3f} bits per quantized weight on "
        f"disk, {human(total)} of weights (from {human(float_bytes)}), {report['seconds']:.0f} s, "
        f"peak memory {human(report['peak_rss_bytes'])}"
    )
    if "ends" in report:
        console.print(f"packed too, counted separately: {escape(ends_words(report['ends']))}", highlight=False)
    _show_modulations(
        [spec_from_dict(s["spec"]) for s in report["sites"] if s["site"] in report["modulations"]], console
    )
    noted = [site for site in all_sites(report) if site["notes"]]
    if noted:
        console.print(f"[yellow]{len(noted)} sites have notes[/yellow]; see report.html")
    worst, largest = (report["verification"][key] for key in ("worst_difference", "largest_logit"))
    console.print(f"verified: outputs after reloading within {worst:.1e} (the largest is {largest:.3g})")
