"""What `quantize` prints at its end: the dry run's prediction, or what was written. One JSON object for scripts."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quant.display import human
from quant.estimate import Estimate
from quant.pipeline import Result
from quant.prepare import Prepared


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
    table = Table("sites", "count", "rows x in", "bits", "group", "bits/weight", "bytes each", title=title)
    alike = Counter((_starred(s.name), s.shape, prepared.plan.specs[s.name]) for s in prepared.walk.sites)
    for (name, (rows, columns), spec), count in alike.items():
        data = spec.core.to_dict() if spec else {}
        cost = (
            (f"{spec.bits_per_weight((rows, columns)):.3f}", f"{spec.nbytes((rows, columns)):,}")
            if spec
            else ("", "float")
        )
        shown = (str(data.get(key, "")) for key in ("bits", "group_size"))
        table.add_row(escape(name), str(count), f"{rows} x {columns}", *shown, *cost)
    console.print(table)
    for (name, reason), count in Counter((_starred(n), why) for n, why in prepared.walk.left.items()).items():
        times = f" ({count})" if count > 1 else ""
        console.print(f"float: {escape(name)}{times}: {escape(reason)}", highlight=False)
    for word, told in prepared.folded.to_dict().items():
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
    facts.add_row("time", f"{predicted.seconds:.0f} s (rehearsed in {predicted.rehearsal_seconds:.0f} s)")
    console.print(facts)


def _starred(name: str) -> str:
    """A name without its block's number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


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
    noted = [site for site in report["sites"] if site["notes"]]
    if noted:
        console.print(f"[yellow]{len(noted)} sites have notes[/yellow]; see report.html")
    console.print(f"verified: logits after reloading within {report['verification']['worst_difference']:.1e}")
