"""The figures as a table, one row per model, and the continuations side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text as Styled

from quant.eval.generate import Generation
from quant.eval.report import Report


@dataclass(frozen=True)
class _Column:
    """A heading, how a report fills it ("" for nothing to say), and what it means."""

    heading: str
    cell: Callable[[Report], str]
    meaning: str


def _some(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit, form)


def _figure(value: float | None) -> str:
    """Five significant digits up to 99,999, then powers of ten."""
    if value is None:
        return ""
    return f"{value:.3g}" if value >= 1e5 else f"{value:.4f}" if value < 10 else f"{value:.5g}"


_COLUMNS = (
    _Column("MB", lambda r: _some(r.size.bytes, ",.2f", 1e6), "weight files, 10^6 bytes"),
    _Column("bits", lambda r: _some(r.size.linear_bits, ".3f"), "per weight of the quantized linears, measured"),
    _Column("all", lambda r: _some(r.size.total_bits, ".3f"), "bits per parameter of the whole checkpoint"),
    _Column("perplexity", lambda r: _figure(r.perplexity and r.perplexity.token), "per token"),
    _Column("x", lambda r: _some(r.ratio, ".4f"), "perplexity over the original's"),
    _Column("bits/byte", lambda r: _some(r.perplexity and r.perplexity.bits_per_byte, ".4f"), "compares tokenizers"),
    _Column("KL", lambda r: _some(r.divergence and r.divergence.kl, ".5f"), "nats per token to the original"),
    _Column("KL 99%", lambda r: _some(r.divergence and r.divergence.kl_p99, ".4f"), "its 99th percentile"),
    _Column("top-1", lambda r: _some(r.divergence and r.divergence.top1, ".2%"), "same first choice"),
    _Column("token cos", lambda r: _some(r.hidden and r.hidden.token, ".5f"), "hidden states against the original's"),
    _Column("line cos", lambda r: _some(r.hidden and r.hidden.sentence, ".5f"), "averaged over each line"),
    _Column("lowest", lambda r: _some(r.hidden and r.hidden.sentence_min, ".5f"), "the worst line"),
    _Column("prefix", lambda r: _some(r.common_prefix, ".1f"), "tokens that greedy continuations share"),
    _Column("repeat", lambda r: _some(r.repetition, ".0%"), "repeated 4-grams in them"),
    _Column("prefill/s", lambda r: _some(r.speed.prefill, ",.0f"), "tokens per second, one window"),
    _Column("decode/s", lambda r: _some(r.speed.decode, ",.1f"), "tokens per second, greedy, batch 1"),
    _Column(
        "RAM MB", lambda r: _some(r.memory.model + r.memory.running, ",.0f", 1e6), "tensors and rise while running"
    ),
)


def table(reports: Sequence[Report], width: int) -> Group:
    """One row per report. A column that no report fills is left out; what does not fit continues in a table below."""
    columns = [column for column in _COLUMNS if any(column.cell(report) for report in reports)]
    name = min(32, max(len("model"), *(len(report.model) for report in reports)))
    parts: list[list[_Column]] = [[]]
    left = room = width - name - 2
    for column in columns:
        need = 3 + max(len(column.heading), *(len(column.cell(report)) for report in reports))
        if need > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= need
    legend = "; ".join(f"{column.heading}: {column.meaning}" for column in columns)
    grids = [_grid(reports, part, name) for part in parts]
    return Group(Styled(_title(reports[-1])), *grids, Styled(legend, style="dim"))


def _grid(reports: Sequence[Report], columns: Sequence[_Column], name: int) -> Table:
    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("model", overflow="fold", min_width=name, max_width=name)
    for column in columns:
        grid.add_column(column.heading, justify="right", no_wrap=True)
    for report in reports:
        grid.add_row(report.model, *(column.cell(report) or "-" for column in columns))
    return grid


def continuations(reports: Sequence[Report]) -> list[Panel]:
    """A panel per prompt: the original's continuation first, then each model's, differing text in bold."""
    panels: list[Panel] = []
    for index in range(max((len(report.generations) for report in reports), default=0)):
        shown = [(report, report.generations[index]) for report in reports if index < len(report.generations)]
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(style="cyan", max_width=28, overflow="fold")
        grid.add_column(ratio=1)
        first = shown[0][1]
        if first.original_text is not None:
            grid.add_row(shown[0][0].against or "original", Styled(_flat(first.original_text)))
        for report, generation in shown:
            grid.add_row(_label(report, generation), _marked(generation))
        panels.append(Panel(grid, title=Styled(_flat(first.prompt)[-90:]), title_align="left"))
    return panels


def console_for(stderr: bool = False) -> Console:
    """A console that does not squeeze the table into 80 columns when its output goes to a file."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=180)


def _title(report: Report) -> str:
    settings, machine, scored = report.settings, report.settings.machine, report.perplexity
    strides = "" if settings.stride is None else f", stride {settings.stride}"
    counts = "" if scored is None else f", {scored.windows} windows, {scored.tokens:,} tokens predicted"
    return (
        f"{settings.text} (sha256 {settings.text_sha256[:12]}), {settings.window_rule}, window {settings.window}"
        f"{strides}{counts}, {settings.dtype} on {settings.device}, "
        f"{machine.gpu if 'cuda' in settings.device else machine.cpu}, {machine.threads} threads"
    )


def _label(report: Report, generation: Generation) -> str:
    same = "" if generation.common_prefix is None else f"\n{generation.common_prefix} of {generation.tokens} the same"
    return f"{report.model}{same}"


def _marked(generation: Generation) -> Styled:
    text = _flat(generation.text)
    if generation.original_text is None:
        return Styled(text)
    original = _flat(generation.original_text)
    shared = next(
        (i for i, (a, b) in enumerate(zip(text, original, strict=False)) if a != b), min(len(text), len(original))
    )
    return Styled(text[:shared]) + Styled(text[shared:], style="bold yellow")


def _flat(text: str) -> str:
    return " ".join(text.split())
