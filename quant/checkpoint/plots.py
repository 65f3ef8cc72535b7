"""The pictures of report.html: SVG images inside the page, in one grey that is readable on light and on dark.

matplotlib draws without pyplot, so nothing global is touched. Names come from the model: they reach it only as letters,
digits and a few signs, never as mathematics.
"""

from __future__ import annotations

import base64
import io
import re
import statistics
from collections.abc import Callable
from html import escape
from typing import Any

from quant.checkpoint.words import Report, kind
from quant.display import human

GREY, BLUE, ORANGE = "#808894", "#4c8dd6", "#e8833a"
MOST_KINDS = 20
STYLE: dict[Any, Any] = {
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), GREY
    ),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 9,
}


def over_depth(report: Report, key: str, label: str, log: bool) -> str:
    """`site[key]` over the blocks, a line for each kind of site; where a block has several of a kind, the line is their
    median and a band spans them."""

    def draw(axes: Any) -> None:
        rank = {block["name"]: number for number, block in enumerate(report["blocks"])}
        values: dict[str, dict[int, list[float]]] = {}
        for site in report["sites"]:
            if site[key]:  # None is not finite, and 0 is not on a logarithmic axis
                values.setdefault(kind(site), {}).setdefault(rank[site["block"]], []).append(site[key])
        for name, found in values.items():
            depths, middle = list(found), [statistics.median(group) for group in found.values()]
            (line,) = axes.plot(depths, middle, ".-", linewidth=1, label=_label(name))
            if any(len(group) > 1 for group in found.values()):
                low, high = [min(group) for group in found.values()], [max(group) for group in found.values()]
                axes.fill_between(depths, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        if values:
            axes.set(**({"yscale": "log"} if log else {"ylim": (0, None)}))
        _blocks(axes, label)

    return _picture(f"{label} over depth", draw)


def bytes_by_kind(report: Report) -> str:
    """Where the bytes are: packed, by kind of site, with their bits per weight; and what stayed float."""
    sizes: dict[str, int] = {}
    weights: dict[str, int] = {}
    for site in report["sites"]:
        sizes[kind(site)] = sizes.get(kind(site), 0) + site["nbytes"]
        weights[kind(site)] = weights.get(kind(site), 0) + site["shape"][0] * site["shape"][1]
    largest = sorted(sizes, key=lambda name: -sizes[name])[:MOST_KINDS]
    bars = [(_label(name), sizes[name], f", {8 * sizes[name] / weights[name]:.3g} bits") for name in largest]
    if len(sizes) > MOST_KINDS:
        bars.append(("other kinds", sum(sizes.values()) - sum(size for _, size, _ in bars), ""))
    bars.append(("left float", max(0, sum(report["files"].values()) - sum(sizes.values())), ""))

    def draw(axes: Any) -> None:
        drawn = axes.barh(range(len(bars)), [size for _, size, _ in bars], color=BLUE)
        axes.bar_label(drawn, [human(size) + bits for _, size, bits in bars], padding=3)
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.margins(x=0.25)

    return _picture("bytes by kind of site", draw, 0.8 + 0.25 * len(bars))


def time_by_block(report: Report) -> str:
    """Seconds per block: solving its sites, and loading it and collecting its statistics."""
    solving = {block["name"]: 0.0 for block in report["blocks"]}
    for site in report["sites"]:
        solving[site["block"]] += site["seconds"]
    rest = [max(0.0, block["seconds"] - solving[block["name"]]) for block in report["blocks"]]

    def draw(axes: Any) -> None:
        solved = list(solving.values())
        axes.bar(range(len(solved)), solved, color=BLUE, label="solving")
        axes.bar(range(len(solved)), rest, bottom=solved, color=ORANGE, label="loading and collecting statistics")
        _blocks(axes, "seconds")

    return _picture("seconds by block", draw)


def _blocks(axes: Any, label: str) -> None:
    axes.set_ylabel(label)
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _picture(title: str, draw: Callable[[Any], None], height: float = 3.4) -> str:
    import matplotlib  # takes a second to import, and most runs of python never draw
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles[:MOST_KINDS], labels[:MOST_KINDS], loc="outside lower center", ncols=4)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">'


def _label(name: str) -> str:
    shown = re.sub(r"[^\w.\[\]() -]", "?", name, flags=re.ASCII)
    return shown if len(shown) <= 40 else "..." + shown[-37:]
