"""`quant-inspect FOLDER`: what is inside, and whether it is what was written.

A packed checkpoint is checked against its checksums; its bits are counted on disk and set against the promise. An
unfinished run is explained with the command that goes on, and a float model is called one.

Exit codes: 0 the folder is sound, or there is nothing to check; 2 no such folder; 3 a float model's files cannot be
read; 6 a packed checkpoint is damaged; 7 an unfinished run cannot be read.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quant.checkpoint.look import explain_kernels, look
from quant.checkpoint.summary import (
    Group,
    Site,
    grouped,
    kinds,
    percent,
    plain,
    plural,
    spec_words,
    specs_words,
    tokens_words,
)
from quant.display import human
from quant.errors import BitwrightError, CheckpointError

MOST_SITES = 64  # a longer list is shown by kind, unless --sites asks for it

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

_EPILOG = """
**Examples**

`quant-inspect out/model-4bit` : bits, bytes, errors, provenance; every file is checked

`quant-inspect out/model-4bit --no-verify --sites` : every site, and no waiting for checksums

`quant-inspect out/model-4bit --json | jq .bits` : for scripts

`quant-inspect out/model-4bit --kernels` : which kernel multiplies here, and why not another

Exit codes: 0 sound, 2 no such folder, 3 float files unreadable, 6 damaged, 7 unfinished and damaged.
"""


@app.command(epilog=_EPILOG)
def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint, an unfinished run, or a model.")],
    sites: Annotated[
        bool | None,
        typer.Option("--sites/--no-sites", help="Every site, or none.", show_default="all up to 64, else by kind"),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check every file's sha256.")] = True,
    kernels: Annotated[bool, typer.Option("--kernels", help="Which kernel runs each kind of packed weight.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON on standard output.")] = False,
) -> None:
    """Say what is inside a packed checkpoint, and check that it is what was written."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    try:
        found = look(folder, verify)
        if kernels and found["kind"] == "packed" and not found["verification"]["error"]:
            found["kernels"] = explain_kernels(folder)
        if as_json:
            typer.echo(json.dumps(_finite(found), indent=2))
        else:
            {"packed": _show_packed, "unfinished": _show_unfinished, "float": _show_float}[found["kind"]](
                console, found, sites
            )
        if problem := found.get("verification", {}).get("error"):
            raise CheckpointError(problem)
    except BitwrightError as error:
        typer.echo(f"error: {plain(error, 2000)}", err=True)
        raise typer.Exit(error.exit_code) from None


def main() -> None:
    """The console entry point."""
    app(prog_name="quant-inspect")


def _show_packed(console: Console, found: Mapping[str, Any], sites: bool | None) -> None:
    bits, size, entries = found["bits"], found["bytes"], found["sites"]
    measured = "unknown" if bits["measured"] is None else f"{bits['measured']:.5g}"
    original = found["original_bytes"]
    smaller = f", {original / max(1, size['weight_files']):.2f} times smaller than the original" if original else ""
    rows = [
        ("packed checkpoint", found["folder"]),
        ("of", f"{(found['model'] or {}).get('name', 'an unnamed model')} ({found['architecture']})"),
        ("packed as", specs_words(entries) if entries else "nothing"),
        ("bits per weight", f"{measured} measured on disk, {bits['promised']:.5g} promised, over {bits['weights']:,}"),
        ("bytes packed", _bytes(size["packed"])),
        ("bytes left float", _bytes(size["float"])),
        ("weight files", _bytes(size["weight_files"]) + smaller),
        ("whole folder", _bytes(size["folder"])),
        ("format", f"version {found['format_version']}, written by bitwright {found['written_by']}"),
        ("checksums", _checked(found["verification"])),
    ]
    console.print(_facts(rows))
    if sites is not False and entries:
        console.print(_site_table(entries) if sites or len(entries) <= MOST_SITES else _kind_table(entries))
    if found["report"] != "read":
        console.print(f"report.json is {found['report']}: errors, notes and provenance are not known")
    notes = grouped((site["site"], note) for site in entries for note in site["notes"])
    _list(console, "notes", notes, "yellow")
    _list(console, "left float", grouped((found["left_float"] or {}).items()))
    console.print(_provenance(found))
    for line in found.get("kernels", []):
        console.print(Text(line))


def _show_unfinished(console: Console, found: Mapping[str, Any], sites: bool | None) -> None:
    entries = found["sites"]
    done = f"{found['sites_done']:,} of {plural(found['sites_planned'], 'site')}, "
    done += f"in {plural(found['blocks_done'], 'finished block')}"
    state = "a run is working here now" if found["running"] else "no run is working here"
    rows = [("unfinished run", found["folder"]), ("state", state), ("done", done)]
    rows += [("whole folder", _bytes(found["bytes"]["folder"]))]
    console.print(_facts(rows))
    if sites and entries:
        table = Table("site", "error", "tokens", "notes")
        for site in entries:
            table.add_row(*map(Text, (plain(site["site"]), percent(site["error"]), *_told(site))))
        console.print(table)
    _list(console, "notes", grouped((site["site"], note) for site in entries for note in site["notes"]), "yellow")
    console.print(_provenance(found))
    if found["resume"] is None:
        console.print("It had done nothing yet: begin anew with quantize --restart.")
    else:
        console.print(Text(f"Continue with:\n  {plain(found['resume'], 4000)}"), soft_wrap=True)


def _show_float(console: Console, found: Mapping[str, Any], _: bool | None) -> None:
    method = found["quant_method"]
    what = "float model, not packed" if method is None else f"packed by another tool ({method}), not by bitwright"
    dtypes = ", ".join(f"{name} ({count:,})" for name, count in found["dtypes"].items())
    rows = [
        (what, found["folder"]),
        ("architecture", str(found["architecture"])),
        ("parameters", f"{found['parameters']:,}"),
        ("stored as", dtypes),
        ("weight files", _bytes(found["bytes"]["weight_files"])),
    ]
    console.print(_facts(rows))
    if method is None:
        console.print(Text(f"Pack it with: quantize --model {plain(found['folder'])} --bits 4"), soft_wrap=True)


def _facts(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(plain(name)), Text(plain(value, 2000)))
    return table


def _site_table(entries: Sequence[Site]) -> Table:
    table = _table("site", ">shape", "spec", ">bits", ">error", ">tokens", "notes")
    for site in entries:
        rows, columns, experts = *site["shape"], site["experts"]
        shape = f"{experts} x {rows // experts} x {columns}" if experts else f"{rows} x {columns}"
        error = "" if site["error"] is None else percent(site["error"])
        cells = (site["site"], shape, spec_words(site["spec"]), f"{site['bits_per_weight']:.5g}", error, *_told(site))
        table.add_row(*(Text(plain(cell)) for cell in cells))
    return table


def _kind_table(entries: Sequence[Site]) -> Table:
    table = _table("kind", ">sites", "spec", ">bits", ">bytes", ">least error", ">median", ">most")
    for name, group in kinds(entries).items():
        size = sum(site["nbytes"] for site in group)
        bits = 8 * size / sum(math.prod(site["shape"]) for site in group)
        known = sorted(site["error"] for site in group if site["error"] is not None)
        spread = [percent(e) for e in (known[0], statistics.median(known), known[-1])] if known else [""] * 3
        cells = (name, f"{len(group):,}", specs_words(group), f"{bits:.5g}", f"{size:,}", *spread)
        table.add_row(*(Text(plain(cell)) for cell in cells))
    table.caption = f"{len(entries):,} sites; --sites lists them"
    return table


def _table(*headings: str) -> Table:
    table = Table(pad_edge=False)
    for heading in headings:
        right = heading.startswith(">")
        table.add_column(heading.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _told(site: Site) -> tuple[str, str]:
    notes = [str(group.text) for group in grouped(("", note) for note in site["notes"])]
    return tokens_words(site["tokens"]), "; ".join(notes)


def _list(console: Console, heading: str, groups: Sequence[Group], style: str = "") -> None:
    for number, group in enumerate(groups):
        label = f"{heading}: " if number == 0 else " " * (len(heading) + 2)
        console.print(Text(label, style=style or "cyan") + Text(plain(group, 1000)), soft_wrap=True)


def _provenance(found: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, str]] = []
    if found.get("model"):
        rows.append(("base model", f"{found['model'].get('name')}, sha256 {found['model'].get('sha256')}"))
    if found.get("calibration"):
        text = found["calibration"]
        rows.append(("calibration", f"{text.get('text')}, sha256 {text.get('sha256') or 'none'}"))
    rows += [(name, _flat(found[name])) for name in ("recipe", "compute", "versions") if found.get(name)]
    if found.get("command"):
        rows.append(("made by", str(found["command"])))
    return _facts(rows)


def _flat(data: Mapping[str, Any]) -> str:
    parts = (f"{key} ({_flat(value)})" if isinstance(value, dict) else f"{key} {value}" for key, value in data.items())
    return ", ".join(parts)


def _checked(verification: Mapping[str, Any]) -> str:
    if verification["error"]:
        return "DAMAGED, see the error below"
    if not verification["checked"]:
        return "not checked (--no-verify)"
    if not verification["sealed"]:
        return "none in this folder (save_pretrained wrote it); every tensor is what its spec promises"
    return "every file is what was written"


def _bytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size:,} ({human(size)})"


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
