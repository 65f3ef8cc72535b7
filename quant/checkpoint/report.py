"""report.html: what was asked, what came out, and what to look at first, on one page that needs no network.

The order is that of a tired engineer's questions: how big, how good, did anything go wrong, where is the error, where
are the bytes, what stayed float, and how to make it again. There is no script in it, and a policy that allows none.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from quant.checkpoint import plots, words
from quant.checkpoint.words import Report, Site
from quant.display import human

MOST_ROWS = 2000  # of the table of sites
MOST_NAMES = 200  # of a list
MEASURED = "Lost share of each output's energy on the calibration inputs: tr(D H DT) / tr(W H WT), D = W - Q."
DATA_FREE = "Lost share of the energy of each site's weight, tr(D DT) / tr(W WT), D = W - Q; no text was read."
AIMED = " This recipe aims at the float path's outputs instead, and leaves these on purpose."
UNTUNED = " Before tuning: what tuning has changed is judged at the output, not site by site."
COLUMNS = ("site", ">shape", "spec", ">bits per weight", ">bytes", ">error", ">tokens", ">seconds", "notes")
STYLE = "\n" + Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


def render(report: Report) -> str:
    """The page for the content of report.json."""
    name = _text(report["model"]["name"])
    recipe = report["recipe"]
    meaning = DATA_FREE if recipe["calibration"] is None else MEASURED
    meaning += AIMED if recipe["match"] == "float" else ""
    meaning += UNTUNED if recipe["recovery"] or recipe["distillation"] else ""
    error_plot = plots.over_depth(report, "error", "relative output error", log=True)
    bits_plot = plots.over_depth(report, "bits_per_weight", "bits per weight", log=False)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: {report["bits"]["measured"]:.3f} bits per weight</title>
<style>{STYLE}</style></head>
<body>
<h1>{name}</h1>
<p class="soft">{_text(words.specs_words(report["sites"]))}</p>
{_headline(report)}
<h2>Look at this first</h2>
{_list([f"{text}: {site}" for site, text in words.notes(report)], "notes") or "<p>Every site was solved as asked.</p>"}
<h2>Error over depth</h2>
<figure>{error_plot}<figcaption>{meaning}</figcaption></figure>
<h2>Bits over depth</h2>
<figure>{bits_plot}<figcaption>Of each site, scales and zeros included.</figcaption></figure>
<h2>Where the bytes are</h2>
<figure>{plots.bytes_by_kind(report)}</figure>
<h2>Time per block</h2>
<figure>{plots.time_by_block(report)}</figure>
<h2>Sites</h2>
{_sites(words.all_sites(report))}
<h2>Left float</h2>
{_list([f"{reason}: {', '.join(names)}" for reason, names in words.by_reason(report["left_float"]).items()])}
<h2>Make it again</h2>
<pre>{_text(report["command"])}</pre>
{_table(("", ""), _made(report))}
<details><summary>The recipe</summary><pre>{escape(json.dumps(report["recipe"], indent=2))}</pre></details>
</body></html>
"""


def _headline(report: Report) -> str:
    bits, source, found, check = report["bits"], report["source"], words.errors(report["sites"]), report["verification"]
    after = sum(report["files"].values())
    gpu = f", {human(report['peak_gpu_bytes'])} on the GPU" if report["peak_gpu_bytes"] else ""
    resumed = f", {report['resumed_blocks']} from an earlier run" if report["resumed_blocks"] else ""
    asked = words.asked_bits(report["recipe"])
    smaller = f"{source['bytes'] / max(1, after):.2f} times smaller than {human(source['bytes'])}"
    cards = [
        (f"{bits['measured']:.5g} bits", f"per weight on disk; asked {asked}, promised {bits['promised']:.5g} in all"),
        (human(after), f"weight files, {smaller}"),
        (words.percent(statistics.median(found) if found else None), "relative output error, median site"),
        (words.percent(found[-1] if found else None), "relative output error, worst site"),
        (f"{len(report['sites']):,} sites", f"{bits['weights']:,} of {source['parameters']:,} weights quantized"),
        (f"{report['seconds']:,.4g} s", f"wall time of this run, blocks: {len(report['blocks'])}{resumed}"),
        (human(report["peak_rss_bytes"]), f"peak memory{gpu}"),
        (f"{check['worst_difference']:.2g}", f"off after reloading, of logits up to {check['largest_logit']:.3g}"),
    ]
    shown = (f'<div class="card"><b>{_text(value)}</b>{_text(label)}</div>' for value, label in cards)
    return f'<div class="cards">{"".join(shown)}</div>'


def _sites(sites: Sequence[Site]) -> str:
    shown = words.worst(sites, MOST_ROWS)
    label = f"All {len(sites):,}" if len(shown) == len(sites) else f"The {MOST_ROWS:,} of most error, of {len(sites):,}"
    rows = (
        (
            site["site"],
            words.shape_words(site),
            words.spec_words(site["spec"]),
            f"{site['bits_per_weight']:.5g}",
            f"{site['nbytes']:,}",
            words.percent(site["error"]),
            words.tokens_words(site["tokens"]),
            f"{site['seconds']:.2f}",
            words.brief(site["notes"]),
        )
        for site in shown
    )
    return f"<details open><summary>{label}</summary>{_table(COLUMNS, rows)}</details>"


def _made(report: Report) -> list[tuple[str, str]]:
    host = report["machine"]
    return [
        *words.provenance_rows(report),
        ("machine", f"{host['cpu']}, {host['cores']} cores, GPU {host['gpu'] or 'none'}, {host['platform']}"),
        ("files", ", ".join(f"{name} {size:,} bytes" for name, size in report["files"].items())),
    ]


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A heading that starts with `>` stands over a column of numbers."""
    kinds = [' class="n"' if heading.startswith(">") else "" for heading in headings]
    head = "".join(f"<th{k}>{_text(heading.lstrip('>'))}</th>" for k, heading in zip(kinds, headings, strict=True))
    lines = ("".join(f"<td{k}>{_text(cell)}</td>" for k, cell in zip(kinds, row, strict=True)) for row in rows)
    body = "".join(f"\n<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _list(lines: Sequence[str], name: str = "") -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in words.capped(lines, MOST_NAMES))
    return f'<ul class="{name}">{items}</ul>' if items else ""


def _text(value: object) -> str:
    """Untrusted text, escaped and shortened."""
    return escape(words.plain(value, 4000))
