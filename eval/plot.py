"""Size on disk against perplexity: which checkpoint to take for the bytes there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from quant.errors import ResourceError, SettingsError
from quant.eval.report import Report

_WIDE = 2.5  # largest over smallest value from which an axis is logarithmic


def plot(reports: Sequence[Report], original: Report | None, path: Path) -> None:
    """Draws one point per model; the original is a star and a dashed line.

    Raises:
        SettingsError: no report has a perplexity.
        ResourceError: the file cannot be written.
    """
    points = [(r.size.bytes / 1e6, r.perplexity.token, r.model) for r in reports if r.perplexity is not None]
    if not points:
        raise SettingsError("the plot shows perplexity, and no model here has one.")
    figure = blank(8, 5)
    axes = figure.add_subplot()
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], s=45, color="#1f77b4", zorder=3)
    if original is not None and original.perplexity is not None:
        x, y = original.size.bytes / 1e6, original.perplexity.token
        axes.axhline(y, color="#888888", linestyle="--", linewidth=1, zorder=1)
        axes.scatter([x], [y], s=220, marker="*", color="#d62728", zorder=3)
        points.append((x, y, f"{original.model} (original)"))
    _scale(axes.xaxis, axes.set_xscale, [x for x, _, _ in points])
    _scale(axes.yaxis, axes.set_yscale, [y for _, y, _ in points])
    axes.margins(0.12)
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    settings, shown = reports[0].settings, [*reports, *([original] if original else [])]
    windows = " / ".join(dict.fromkeys(str(report.settings.window) for report in shown))
    stride = "" if settings.stride is None else f", stride {settings.stride}"
    axes.set_xlabel("weights on disk, MB (10^6 bytes)")
    axes.set_ylabel(f"perplexity per token, {settings.window_rule} windows of {windows}{stride}")
    axes.set_title(f"{settings.text}: size against perplexity", loc="left")
    _label(figure, axes, points)
    save(figure, path)


def blank(wide: float, high: float) -> Figure:
    """A figure of so many inches."""
    figure = Figure(figsize=(wide, high), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Raises `ResourceError` where it cannot be written, `SettingsError` for a name of no picture."""
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: an ending matplotlib does not know
        kind = ResourceError if isinstance(error, OSError) else SettingsError
        raise kind(f"plot {path}: cannot be written ({error}).") from error


def _scale(axis: Any, set_scale: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers when the values are far apart."""
    if max(values) <= _WIDE * min(values):
        return
    set_scale("log")
    wide = max(values) > 30 * min(values)
    axis.set_major_locator(
        LogLocator(subs=(1,) if max(values) > 1000 * min(values) else (1, 2, 5) if wide else (1, 1.5, 2, 3, 5, 7))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(figure: Any, axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names each point at the first of several places where the name covers no other name and leaves no border."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = [_box(axes, x, y, 8) for x, y, _ in points]
    taken += [_box(axes, x, line.get_ydata()[0], 1, across=frame.width) for line in axes.lines for x, *_ in points[:1]]
    for x, y, name in sorted(points, key=lambda point: -point[1]):
        box = None
        for dx, dy, where in _places():
            style: Any = {"textcoords": "offset points", "ha": where, "va": "center", "fontsize": 8}
            line = {"arrowstyle": "-", "linewidth": 0.5, "color": "#888888"} if dy else None  # far from its point
            text = axes.annotate(name, (x, y), xytext=(dx, dy), arrowprops=line, **style)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # of the name without its line
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            axes.annotate(name, (x, y), xytext=(9, 0), textcoords="offset points", va="center", fontsize=8)  # no room
        taken.append(box)


def _places() -> list[tuple[int, int, str]]:
    """Offsets in points with their alignment, nearest first: right, left, then above and below further and further."""
    near = [(9, 0, "left"), (-9, 0, "right")]
    return near + [
        (dx, sign * step, where)
        for step in range(10, 80, 8)
        for sign in (1, -1)
        for dx, where in ((6, "left"), (-6, "right"))
    ]


def _box(axes: Any, x: float, y: float, high: float, across: float | None = None) -> Any:
    """Pixels that a label must not cover: a dot, or the original's line."""
    px, py = axes.transData.transform((x, y))
    wide = high if across is None else across
    return Bbox.from_extents(px - wide, py - high, px + wide, py + high)
