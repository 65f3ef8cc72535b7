"""The figures of diffusion transformers as a table, one row per model, what they depend on above it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text as Styled

from quant.eval.picture import Hung, Picture


@dataclass(frozen=True)
class _Column:
    """A heading, how a picture fills it ("" for nothing to say), and what it means."""

    heading: str
    cell: Callable[[Picture], str]
    meaning: str


def _some(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit, form)


_COLUMNS = (
    _Column("MB", lambda p: _some(p.size.bytes, ",.2f", 1e6), "weight files, 10^6 bytes"),
    _Column("bits", lambda p: _some(p.size.linear_bits, ".3f"), "per weight of the quantized linears, measured"),
    _Column("PSNR", lambda p: _some(p.psnr, ".2f"), "dB to the original's image of the same seed, mean"),
    _Column("pooled", lambda p: _some(p.psnr_pooled, ".2f"), "dB of the mean squared error"),
    _Column("worst", lambda p: _some(p.psnr_worst, ".2f"), "dB of the worst image"),
    _Column("SSIM", lambda p: _some(p.ssim, ".4f"), "to the original's image, mean"),
    _Column("cos", lambda p: _some(p.cosine, ".5f"), "of the final latents"),
    _Column("Fréchet", lambda p: _some(p.frechet, ".3f"), "distance of the judge's features"),
    _Column("prec.", lambda p: _some(p.precision, ".3f"), "share of samples among the others'"),
    _Column("recall", lambda p: _some(p.recall, ".3f"), "share of the others' among the samples"),
    _Column("right", lambda p: _some(p.accuracy, ".1%"), "judged as the class asked for"),
    _Column("CLIP", lambda p: _some(p.clip, ".2f"), "100 cos(image, prompt)"),
    _Column("s/image", lambda p: _some(p.seconds, ".3g"), "drawn a batch at a time"),
    _Column("RAM MB", lambda p: _some(p.memory.rise, ",.0f", 1e6), "rise while drawing"),
)


def picture_table(hung: Hung, width: int) -> Group:
    """One row per model, the original first. A column that nobody fills is left out; what does not fit continues in a
    table below."""
    shown = [*([hung.original] if hung.original else []), *hung.pictures]
    named = [_Column(name, _distance(name), "to the original's image, mean") for name in _names(shown)]
    columns = [each for each in (*_COLUMNS, *named) if any(each.cell(picture) for picture in shown)]
    name = min(32, max(len("model"), *(len(picture.model) for picture in shown)))
    parts: list[list[_Column]] = [[]]
    left = room = width - name - 2
    for column in columns:
        need = 3 + max(len(column.heading), *(len(column.cell(picture)) for picture in shown))
        if need > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= need
    legend = "; ".join(f"{column.heading}: {column.meaning}" for column in columns)
    return Group(Styled(title(hung)), *(_grid(shown, part, name) for part in parts), Styled(legend, style="dim"))


def _grid(shown: Sequence[Picture], columns: Sequence[_Column], name: int) -> Table:
    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("model", overflow="fold", min_width=name, max_width=name)
    for column in columns:
        grid.add_column(column.heading, justify="right", no_wrap=True)
    for picture in shown:
        grid.add_row(picture.model, *(column.cell(picture) or "-" for column in columns))
    return grid


def title(hung: Hung) -> str:
    """What every figure of the table depends on."""
    first = hung.pictures[0]
    settings = first.settings
    against = f"against {first.against}" if first.against else "no original"
    judged = f", judge {settings.judge}, features against {settings.real}" if settings.judge else ""
    host = settings.machine.gpu if "cuda" in settings.device else settings.machine.cpu
    return (
        f"{settings.images} images, {settings.said}, {against}{judged}; {settings.dtype} on {settings.device}, {host}, "
        f"{settings.machine.threads} threads"
    )


def markdown(hung: Hung) -> str:
    """The table for a report, the settings below it."""
    shown = [*([hung.original] if hung.original else []), *hung.pictures]
    columns = [each for each in _COLUMNS if any(each.cell(picture) for picture in shown)]
    lines = ["| model | " + " | ".join(column.heading for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {picture.model} | " + " | ".join(column.cell(picture) or "-" for column in columns) + " |"
        for picture in shown
    ]
    return "\n".join([*lines, "", f"{title(hung)}.", ""])


def _names(shown: Sequence[Picture]) -> list[str]:
    return list(dict.fromkeys(name for picture in shown for name in picture.distances))


def _distance(name: str) -> Callable[[Picture], str]:
    return lambda picture: _some(picture.distances.get(name), ".4f")
