"""report.html: what was asked, what came out, and what to look at first, on one page that needs no network.

The order is that of a tired engineer's questions: how big, how good, did anything go wrong, where is the error, where
are the bytes, what stayed float, and how to make it again. It reads the same for one site and for seventy thousand:
kinds of sites come first, single sites after, and beyond `MOST_ROWS` only the worst ones (report.json has them all).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from quant.checkpoint import plots
from quant.checkpoint.page import Cell, card, code, details, document, figure, table, text
from quant.checkpoint.summary import (
    Group,
    Site,
    errors,
    grouped,
    kinds,
    left_float,
    method_words,
    notes,
    percent,
    plain,
    plural,
    spec_words,
    specs_words,
    tokens_words,
    windows_words,
)
from quant.display import human

MOST_ROWS = 2000
OPEN_ROWS = 120  # a longer table of sites starts folded
MOST_NAMES = 400

MEASURED = "Lost share of each output's energy on the site's calibration inputs: tr(D H DT) / tr(W H WT), D = W - Q."
DATA_FREE = "Lost share of the energy of each site's weight, tr(D DT) / tr(W WT), D = W - Q; no text was read."
BAND = "By block; the median where a block has several sites of a kind, and the band spans them."

Report = Mapping[str, Any]


def render(report: Report) -> str:
    """The page for the content of report.json."""
    name = plain(report["model"]["name"], 100)
    parts = [
        f"<h1>{text(name)}</h1>",
        f'<p class="soft">{text(specs_words(report["sites"]))}. {text(method_words(report["recipe"]))}.</p>',
        _headline(report),
        _notes(notes(report)),
        _pictures(report),
        "<h2>Kinds of sites</h2>",
        _kinds(report["sites"]),
        _sites(report["sites"]),
        _left(left_float(report)),
        _provenance(report),
    ]
    return document(f"{name}: {report['bits']['measured']:.3f} bits per weight", "\n".join(parts))


def _headline(report: Report) -> str:
    bits, source, sites = report["bits"], report["source"], report["sites"]
    after = sum(report["files"].values())
    asked = report["recipe"]["spec"].get("bits")
    check, found = report["verification"], errors(sites)
    resumed = f", {plural(report['resumed_blocks'], 'block')} from an earlier run" if report["resumed_blocks"] else ""
    gpu = f", {human(report['peak_gpu_bytes'])} on the GPU" if report["peak_gpu_bytes"] else ""
    cards = [
        card(
            f"{bits['measured']:.5g} bits",
            "per quantized weight, on disk",
            f"{f'{asked}-bit codes asked, ' if asked else ''}{bits['promised']:.5g} promised with all overhead",
        ),
        card(
            human(after),
            "weight files",
            f"from {human(source['bytes'])}: {source['bytes'] / max(1, after):.2f} times smaller",
        ),
        card(
            percent(statistics.median(found)) if found else "none",
            "relative output error, median site",
            f"worst {percent(found[-1])}" if found else "",
        ),
        card(
            plural(len(sites), "site"),
            f"{bits['weights']:,} weights quantized",
            f"{_share(bits['weights'], source['parameters'])} of the model's",
        ),
        card(_time(report["seconds"]), "wall time of this run", f"{plural(len(report['blocks']), 'block')}{resumed}"),
        card(human(report["peak_rss_bytes"]), "peak memory", f"{report['machine']['cores']} cores{gpu}"),
        card(
            f"{check['worst_difference']:.2g}",
            "largest difference after reloading",
            f"of logits up to {check['largest_logit']:.3g}, {check['tokens']} tokens",
        ),
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _notes(groups: Sequence[Group]) -> str:
    if not groups:
        return '<p class="soft">Nothing to note: every site was solved as asked.</p>'
    items = "".join(_group(group) for group in groups)
    return f'<h2>Look at this first</h2><div class="notes">{items}</div>'


def _group(group: Group) -> str:
    """One line, and the names to unfold when they are many."""
    alike = f" <b>({group.count:,} alike)</b>" if group.count > 1 else ""
    shown = ", ".join(code(name) for name in group.names[:MOST_NAMES])
    shown += f" and {len(group.names) - MOST_NAMES:,} more" if len(group.names) > MOST_NAMES else ""
    if len(group.names) <= 3:
        return f"<p>{text(group.text)}{alike}: {shown}</p>"
    return f"<p>{text(group.text)}{alike}</p>{details(f'{len(group.names):,} names', f'<p>{shown}</p>')}"


def _pictures(report: Report) -> str:
    meaning = DATA_FREE if report["recipe"]["calibration"] is None else MEASURED
    pictures = ["<h2>Error over depth</h2>", figure(plots.error_plot(report), f"{meaning} {BAND}")]
    if len({spec_words(site["spec"]) for site in report["sites"]}) > 1:
        caption = "Bits per weight of each site, scales and zeros included, by block."
        pictures += ["<h2>Bits over depth</h2>", figure(plots.bits_plot(report), caption)]
    pictures += [
        "<h2>Where the bytes are</h2>",
        figure(plots.bytes_plot(report), "Bytes on disk by kind of site, all overhead included."),
        "<h2>Time per block</h2>",
        figure(plots.time_plot(report), "Without the pass that gives the next block its inputs."),
    ]
    return "\n".join(pictures)


def _kinds(sites: Sequence[Site]) -> str:
    headings = ["kind", ">sites", "spec", ">bits", ">bytes", ">least error", ">median", ">most", "tokens", ">seconds"]
    return table(headings, (_kind_row(name, group) for name, group in kinds(sites).items()))


def _kind_row(name: str, group: Sequence[Site]) -> list[Cell]:
    weights = sum(site["shape"][0] * site["shape"][1] for site in group)
    size, seconds = sum(site["nbytes"] for site in group), sum(site["seconds"] for site in group)
    found = errors(group) or [math.nan]
    spread = (found[0], statistics.median(found), found[-1])
    return [
        Cell(name, name=True),
        Cell(f"{len(group):,}", len(group)),
        Cell(specs_words(group)),
        Cell(f"{8 * size / weights:.5g}", 8 * size / weights),
        Cell(f"{size:,}", size),
        *(Cell(percent(error), error) for error in spread),
        Cell(tokens_words([count for site in group for count in site["tokens"]])),
        Cell(f"{seconds:,.1f}", seconds),
    ]


def _sites(sites: Sequence[Site]) -> str:
    shown = sites
    label = f"All {len(sites):,} sites"
    if len(sites) > MOST_ROWS:
        worst = [site["error"] if math.isfinite(site["error"]) else math.inf for site in sites]
        shown = [sites[i] for i in sorted(range(len(sites)), key=lambda i: -worst[i])[:MOST_ROWS]]
        label = f"The {MOST_ROWS:,} sites of most error, of {len(sites):,}"
    headings = ["site", ">shape", "spec", ">bits", ">error", ">tokens", ">seconds", "notes"]
    found = errors(shown) or [1.0]
    low, high = math.log(max(found[0], 1e-12)), math.log(max(found[-1], 1e-12))
    rows = (_site_row(site, low, high) for site in shown)
    return f"<h2>Sites</h2>{details(label, table(headings, rows), opened=len(shown) <= OPEN_ROWS)}"


def _site_row(site: Site, low: float, high: float) -> list[Cell]:
    rows, columns = site["shape"]
    experts, error, tokens = site["experts"], site["error"], site["tokens"]
    shape = f"{experts} × {rows // experts:,} × {columns:,}" if experts else f"{rows:,} × {columns:,}"
    bar = (math.log(error) - low) / (high - low) if math.isfinite(error) and error > 0 and high > low else 0.0
    return [
        Cell(site["site"], name=True),
        Cell(shape, rows * columns),
        Cell(spec_words(site["spec"])),
        Cell(f"{site['bits_per_weight']:.5g}", site["bits_per_weight"]),
        Cell(percent(error), error, bar=min(1.0, max(0.02, 0.05 + 0.95 * bar))),
        Cell(tokens_words(tokens), min(tokens, default=0)),
        Cell(f"{site['seconds']:.2f}", site["seconds"]),
        Cell(_alike(site["notes"])),
    ]


def _alike(notes: Iterable[str]) -> str:
    """A stack's notes without those that differ from an earlier one in numbers only."""
    groups = grouped(("", note) for note in notes)
    return "; ".join(
        f"{group.text}{f' (and {group.count - 1:,} alike)' if group.count > 1 else ''}" for group in groups
    )


def _left(groups: Sequence[Group]) -> str:
    if not groups:
        return "<h2>Left float</h2><p>No weight matrix was left float.</p>"
    return "<h2>Left float</h2>" + "".join(_group(group) for group in groups)


def _provenance(report: Report) -> str:
    calibration, source, machine = report["calibration"], report["source"], report["machine"]
    compute = report["compute"]
    rows = [
        ("base model", f"{report['model']['name']} ({source['architecture']}), sha256 {report['model']['sha256']}"),
        ("calibration text", f"{calibration['text']}, sha256 {calibration['sha256'] or 'none'}"),
    ]
    if report["recipe"]["calibration"]:
        rows.append(("calibration windows", windows_words(report["recipe"], report["calibration_tokens"])))
    rows += [
        ("computed", f"on {compute['device']} in {compute['dtype']}, {compute['threads']} threads"),
        ("machine", ", ".join(str(machine[key]) for key in ("cpu", "gpu", "platform") if machine[key])),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("files", ", ".join(f"{name} {size:,} bytes" for name, size in report["files"].items())),
    ]
    cells = "".join(f"<tr><td>{text(name)}</td><td>{code(value)}</td></tr>" for name, value in rows)
    recipe = f"<pre>{escape(json.dumps(report['recipe'], indent=2))}</pre>"
    return (
        f"<h2>Make it again</h2><pre>{escape(plain(report['command'], 4000))}</pre>"
        f'<div class="wide"><table><tbody>{cells}</tbody></table></div>{details("The recipe", recipe)}'
    )


def _share(part: float, whole: float) -> str:
    return f"{part / max(1, whole):.1%}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
