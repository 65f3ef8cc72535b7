"""The pictures of report.html, as inline SVG that takes the page's colours.

matplotlib draws without pyplot, so nothing global is touched. Ink and grid are drawn in two colours that occur nowhere
else and become `currentColor` and `var(--line)`: the same picture is right on a light and on a dark page. Names come
from the model: they reach matplotlib only as a few plain characters, never as mathematics.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from quant.checkpoint.summary import Site, errors, kinds
from quant.display import human

INK, GRID = "#010101", "#020202"
COLOURS = ("#4c8dd6", "#e8833a", "#4caf6d", "#d9534f", "#a274c9", "#3fb3b3", "#c9a227", "#d977a8", "#9c755f", "#8a8f98")
MARKERS = "os^Dvp*Xh<"
MOST_KINDS = 20


def error_plot(report: Mapping[str, Any]) -> str:
    """Error over depth, one line per kind of site; a band where a block has several sites of a kind."""
    figure, axes = _figure()
    drawn = _over_depth(axes, report, errors)
    shown = [error for error in errors(report["sites"]) if error > 0]
    if shown:
        _logarithmic(axes, shown[0], shown[-1])
    axes.set_ylabel("relative output error")
    return _svg(figure, axes, drawn)


def bits_plot(report: Mapping[str, Any]) -> str:
    """Bits per weight over depth, all overhead included."""
    figure, axes = _figure()
    drawn = _over_depth(axes, report, lambda sites: sorted(site["bits_per_weight"] for site in sites))
    axes.set_ylim(0, 1.1 * max((site["bits_per_weight"] for site in report["sites"]), default=1))
    axes.set_ylabel("bits per weight")
    return _svg(figure, axes, drawn)


def bytes_plot(report: Mapping[str, Any]) -> str:
    """Where the bytes are: packed, by kind of site, and what stayed float."""
    parts = [(name, sum(site["nbytes"] for site in sites)) for name, sites in kinds(report["sites"]).items()]
    rest = sum(report["files"].values()) - sum(size for _, size in parts)
    if len(parts) > MOST_KINDS:
        parts.sort(key=lambda part: -part[1])
        parts = [*parts[: MOST_KINDS - 1], ("other kinds", sum(size for _, size in parts[MOST_KINDS - 1 :]))]
    parts.append(("everything left float", max(0, rest)))
    figure, axes = _figure(0.9 + 0.28 * len(parts))
    names, sizes = [_label(name) for name, _ in parts], [size for _, size in parts]
    bars = axes.barh(range(len(parts)), sizes, color=[COLOURS[0]] * (len(parts) - 1) + [COLOURS[-1]])
    axes.bar_label(bars, [human(size) for size in sizes], padding=3, color=INK, fontsize=9)
    axes.set_yticks(range(len(parts)), names)
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    return _svg(figure, axes, [])


def time_plot(report: Mapping[str, Any]) -> str:
    """Seconds per block: solving its sites, and loading it and collecting its statistics."""
    figure, axes = _figure()
    names = [block["name"] for block in report["blocks"]]
    solving = dict.fromkeys(names, 0.0)
    for site in report["sites"]:
        solving[site["block"]] += site["seconds"]
    rest = [max(0.0, block["seconds"] - solving[block["name"]]) for block in report["blocks"]]
    depth, solved = range(len(names)), [solving[name] for name in names]
    width = 0.8 if len(names) < 200 else 1.0
    bars = [
        axes.bar(depth, solved, width, color=COLOURS[0]),
        axes.bar(depth, rest, width, bottom=solved, color=COLOURS[1]),
    ]
    axes.set_xlim(-0.6, max(0.6, len(names) - 0.4))
    axes.set_xlabel("block")
    axes.set_ylabel("seconds")
    return _svg(figure, axes, [(bars[0], "solving"), (bars[1], "loading and collecting statistics")])


def _over_depth(axes: Any, report: Mapping[str, Any], values: Any) -> list[tuple[Any, str]]:
    """Draws the median of `values(sites of a kind in a block)` over the blocks; returns what the legend shows."""
    rank = {block["name"]: number for number, block in enumerate(report["blocks"])}
    drawn: list[tuple[Any, str]] = []
    for number, (name, sites) in enumerate(kinds(report["sites"]).items()):
        there: dict[int, list[Site]] = {}
        for site in sites:
            there.setdefault(rank[site["block"]], []).append(site)
        found = {depth: [v for v in values(group) if v > 0] for depth, group in sorted(there.items())}
        found = {depth: group for depth, group in found.items() if group}
        if not found:
            continue
        style = {"color": COLOURS[number % 10], "marker": MARKERS[number // 10 % 10]}
        depths, middle = list(found), [statistics.median(group) for group in found.values()]
        (line,) = axes.plot(depths, middle, linewidth=1.2, markersize=4 if len(depths) < 60 else 2, **style)
        if any(len(group) > 1 for group in found.values()):
            low, high = [group[0] for group in found.values()], [group[-1] for group in found.values()]
            axes.fill_between(depths, low, high, color=style["color"], alpha=0.18, linewidth=0)
        drawn.append((line, _label(name)))
    axes.set_xlabel("block")
    return drawn


def _logarithmic(axes: Any, low: float, high: float) -> None:
    """A logarithmic axis in per cent with at least one labelled tick, however close `low` and `high` are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(low / 1.8, high * 1.8)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 1000 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:,.6g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _figure(height: float = 3.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # takes a second to import, and most runs of python never draw

    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK, which="both", labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    axes.grid(visible=True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, axes: Any, drawn: Sequence[tuple[Any, str]]) -> str:
    from matplotlib.ticker import MaxNLocator

    if axes.get_xlabel() == "block":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if drawn:
        shown = drawn[:MOST_KINDS]
        handles, labels = [handle for handle, _ in shown], [label for _, label in shown]
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', text, count=1)
    return re.sub(r"\n\s*", "\n", text).replace(INK, "currentColor").replace(GRID, "var(--line)")


def _label(name: str) -> str:
    """A name in letters, digits and a few signs: no mathematics, no glyph the font lacks, no leading underscore."""
    shown = "".join(c if c.isascii() and (c.isalnum() or c in "._-[]() ") else "?" for c in name).lstrip("_") or "?"
    return shown if len(shown) <= 40 else "..." + shown[-37:]
