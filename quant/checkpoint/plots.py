"""The pictures of report.html: SVG images inside the page, in one grey that is readable on light and on dark.

matplotlib draws without pyplot, so nothing global is touched. Names come from the model: they reach it only as letters,
digits and a few signs, never as mathematics.
"""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Callable
from html import escape
from typing import Any

from quant.checkpoint.words import Report, all_sites, kind
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
    """`site[key]` of every site over the blocks, a line for each kind of site."""

    def draw(axes: Any) -> None:
        rank = {block["name"]: number for number, block in enumerate(report["blocks"])}
        points: dict[str, list[tuple[int, float]]] = {}
        for site in report["sites"]:
            if site[key]:  # None is not finite, and 0 is not on a logarithmic axis
                points.setdefault(kind(site), []).append((rank[site["block"]], site[key]))
        for name, found in points.items():
            axes.plot([depth for depth, _ in found], [value for _, value in found], ".-", label=_label(name))
        if points:
            axes.set(**({"yscale": "log"} if log else {"ylim": (0, None)}))
        _blocks(axes, label)

    return _picture(f"{label} over depth", draw)


def bytes_by_kind(report: Report) -> str:
    """Where the bytes are: packed, by kind of site, and what stayed float."""
    sizes: Counter[str] = Counter()
    for site in all_sites(report):
        sizes[_label(kind(site))] += site["nbytes"]
    bars = sizes.most_common(MOST_KINDS)
    bars.append(("other kinds", sizes.total() - sum(size for _, size in bars)))
    bars.append(("left float", max(0, sum(report["files"].values()) - sizes.total())))
    bars = [bar for bar in bars if bar[1]]

    def draw(axes: Any) -> None:
        drawn = axes.barh([name for name, _ in bars], [size for _, size in bars], color=BLUE)
        axes.bar_label(drawn, [human(size) for _, size in bars], padding=3)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.margins(x=0.15)

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
        data = base64.b64encode(rendered(figure)).decode()
    return f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">'


def rendered(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    return buffer.getvalue()


def _label(name: str) -> str:
    shown = re.sub(r"[^\w.\[\]() -]", "?", name, flags=re.ASCII)
    return shown if len(shown) <= 40 else "..." + shown[-37:]
