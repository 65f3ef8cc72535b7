"""The figures as a table, one row per model, and the continuations side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text as Styled

from quant.eval.columns import Column, some, tables
from quant.eval.generate import Generation
from quant.eval.perplexity import Progress as Tell
from quant.eval.report import Report


def _figure(value: float | None) -> str:
    """Five significant digits up to 99,999, then powers of ten."""
    if value is None:
        return ""
    return f"{value:.3g}" if value >= 1e5 else f"{value:.4f}" if value < 10 else f"{value:.5g}"


_COLUMNS = (
    Column("MB", lambda r: some(r.size.bytes, ",.2f", 1e6), "weight files, 10^6 bytes"),
    Column("bits", lambda r: some(r.size.linear_bits, ".3f"), "per weight of the quantized linears, measured"),
    Column("all", lambda r: some(r.size.total_bits, ".3f"), "bits per parameter of the whole checkpoint"),
    Column("perplexity", lambda r: _figure(r.perplexity and r.perplexity.token), "per token"),
    Column("x", lambda r: some(r.ratio, ".4f"), "perplexity over the original's"),
    Column("bits/byte", lambda r: some(r.perplexity and r.perplexity.bits_per_byte, ".4f"), "compares tokenizers"),
    Column("KL", lambda r: some(r.divergence and r.divergence.kl, ".5f"), "nats per token to the original"),
    Column("KL 99%", lambda r: some(r.divergence and r.divergence.kl_p99, ".4f"), "its 99th percentile"),
    Column("top-1", lambda r: some(r.divergence and r.divergence.top1, ".2%"), "same first choice"),
    Column("token cos", lambda r: some(r.hidden and r.hidden.token, ".5f"), "hidden states against the original's"),
    Column("line cos", lambda r: some(r.hidden and r.hidden.sentence, ".5f"), "averaged over each line"),
    Column("lowest", lambda r: some(r.hidden and r.hidden.sentence_min, ".5f"), "the worst line"),
    Column("prefix", lambda r: some(r.common_prefix, ".1f"), "tokens that greedy continuations share"),
    Column("repeat", lambda r: some(r.repetition, ".0%"), "repeated 4-grams in them"),
    Column("prefill/s", lambda r: some(r.speed.prefill, ",.0f"), "tokens per second, one window"),
    Column("decode/s", lambda r: some(r.speed.decode, ",.1f"), "tokens per second, greedy, batch 1"),
    Column("RAM MB", lambda r: some(r.memory.model + r.memory.running, ",.0f", 1e6), "tensors and rise while running"),
)


def table(reports: Sequence[Report], width: int) -> Group:
    """One row per report. A column that no report fills is left out; what does not fit continues in a table below."""
    return tables(_title(reports), reports, _COLUMNS, width)


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


@contextmanager
def bars(quiet: bool) -> Generator[Callable[[str], Tell]]:
    """Gives what begins a named bar on stderr, which is told (done, in all); none is shown where nobody looks."""
    console = console_for(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet or not console.is_terminal
    ) as shown:

        def begin(name: str) -> Tell:
            task = shown.add_task(name, total=None)
            return lambda done, total: shown.update(task, completed=done, total=total)

        yield begin


def _title(reports: Sequence[Report]) -> str:
    settings, machine = reports[-1].settings, reports[-1].settings.machine
    read = " / ".join(dict.fromkeys(map(_read, reports)))  # several where models take other lengths, tokens or dtypes
    return (
        f"{settings.text} (sha256 {settings.text_sha256[:12]}), {settings.window_rule}, {read} on {settings.device}, "
        f"{machine.gpu if 'cuda' in settings.device else machine.cpu}, {machine.threads} threads"
    )


def _read(report: Report) -> str:
    settings, scored = report.settings, report.perplexity
    strides = "" if settings.stride is None else f", stride {settings.stride}"
    counts = "" if scored is None else f", {scored.windows} windows, {scored.tokens:,} tokens predicted"
    behind = " behind the first token of a text" if settings.bos else ""
    return f"window {settings.window}{behind}{strides}{counts}, {settings.dtype}"


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
