"""`quant-inspect FOLDER`: what is inside, and whether it is what was written.

A packed checkpoint is checked against its checksums. Specs come from config.json and bytes from the headers of the
files, so bits are measured, not believed. Errors, notes and provenance come from report.json, which no checksum covers
and anybody may have edited: where it does not hold what ours holds it counts as damaged and is left out. An unfinished
run is explained with the command that goes on, and a float model is called one.

Exit codes: 0 the folder is sound, or there is nothing to check; 2 no such folder; 3 a float model's files cannot be
read; 6 a packed checkpoint is damaged or another tool's; 7 an unfinished run cannot be read.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quant.checkpoint.journal import FOLDER
from quant.checkpoint.manifest import PackedSite, read_config, read_sites, stored_tensors, verify
from quant.checkpoint.provenance import command as quantize_command
from quant.checkpoint.shards import Piece
from quant.checkpoint.words import (
    Site,
    brief,
    by_reason,
    capped,
    percent,
    plain,
    provenance_rows,
    shape_words,
    spec_words,
    tokens_words,
    worst,
)
from quant.display import human
from quant.errors import BitwrightError, CheckpointError, ResumeError, SettingsError
from quant.models.source import Source

MOST_SITES, MOST_NAMES = 100, 5
RUN = ("model", "recipe", "plan", "calibration", "compute", "versions")
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

_EPILOG = """
**Examples**

`quant-inspect out/model-4bit` : bits, bytes, errors, provenance; every file is checked

`quant-inspect out/model-4bit --no-verify` : without waiting for checksums

`quant-inspect out/model-4bit --json | jq .bits` : for scripts

Exit codes: 0 sound, 2 no such folder, 3 float files unreadable, 6 damaged, 7 unfinished and damaged.
"""


@app.command(epilog=_EPILOG)
def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint, an unfinished run, or a model.")],
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Check every file's sha256.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON on standard output.")] = False,
) -> None:
    """Say what is inside a packed checkpoint, and check that it is what was written."""
    try:
        found = look(folder, check)
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            _show(found)
        if problem := found.get("verification", {}).get("error"):
            raise CheckpointError(problem)
    except BitwrightError as error:
        typer.echo(f"error: {plain(error, 2000)}", err=True)
        raise typer.Exit(error.exit_code) from None


def main() -> None:
    """The console entry point."""
    app(prog_name="quant-inspect")


def look(folder: Path, check: bool = True) -> dict[str, Any]:
    """Describes `folder` as plain data. `kind` is "packed", "unfinished" or "float"; damage that `check` finds is in
    `verification.error`, so that the rest can still be shown.

    Raises:
        SettingsError: there is no such folder.
        CheckpointError: config.json cannot be read, or its account of the packed sites cannot.
        ModelError: a float model's files cannot be read.
        ResumeError: an unfinished run's own account cannot be read.
    """
    if not folder.is_dir():
        state = "a file" if folder.exists() else "not there"
        raise SettingsError(f"{folder}: {state}; give the folder of a checkpoint")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if (folder / FOLDER).is_dir():
        return {"kind": "unfinished", "folder": str(folder), "folder_bytes": size, **_unfinished(folder)}
    config = read_config(folder)
    described = _packed(folder, config, check) if "quantization_config" in config else _float(folder)
    named = {"folder": str(folder), "folder_bytes": size, "architectures": config.get("architectures")}
    return {"kind": "packed" if "bits" in described else "float", **named, **described}


def _packed(folder: Path, config: dict[str, Any], check: bool) -> dict[str, Any]:
    quantization = config["quantization_config"]
    sites = read_sites(quantization, str(folder))
    problem: str | None = None
    stored: dict[str, Piece] = {}
    try:
        stored = stored_tensors(folder)
        if check:
            verify(folder)
    except CheckpointError as error:
        problem = str(error)
    state, told = _told(folder)
    weights = sum(math.prod(site.shape) for site in sites.values())
    names = [name for site in sites.values() for name in site.stored()]
    packed = sum(stored[name].nbytes for name in names) if stored.keys() >= set(names) else None
    everything = sum(piece.nbytes for piece in stored.values())
    promised = sum(site.spec.nbytes(site.shape) for site in sites.values())
    return {
        "written_by": quantization.get("version"),
        "bits": {
            "promised": 8 * promised / max(1, weights),
            "measured": None if packed is None else 8 * packed / max(1, weights),
            "weights": weights,
        },
        "bytes": {"packed": packed, "float": None if packed is None else everything - packed},
        "verification": {"checked": check, "sealed": "checksums" in quantization, "error": problem},
        "report": state,
        **{key: told.get(key) for key in (*RUN, "command", "left_float", "made")},
        "sites": [_site(site, told.get("sites", {}).get(site.name, {})) for site in sites.values()],
    }


def _site(site: PackedSite, told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "site": site.name,
        "shape": list(site.shape),
        "experts": site.experts,
        "spec": site.spec.to_dict(),
        "bits_per_weight": site.spec.bits_per_weight(site.shape),
        "nbytes": site.spec.nbytes(site.shape),
        "error": None,
        "tokens": [],
        "notes": [],
        **told,
    }


def _told(folder: Path) -> tuple[str, dict[str, Any]]:
    """Whether report.json was "read", is "missing" or "damaged", and what it says."""
    path = folder / "report.json"
    if not path.is_file():
        return "missing", {}
    try:
        report = json.loads(path.read_bytes())
        told: dict[str, Any] = {key: dict(report[key]) for key in RUN}
        told |= {"command": str(report["command"]), "made": provenance_rows(told)}
        told["left_float"] = {str(name): str(reason) for name, reason in report["left_float"].items()}
        told["sites"] = {str(site["site"]): _told_site(site) for site in report["sites"]}
    except DAMAGE:
        return "damaged", {}
    return "read", told


def _told_site(site: Mapping[str, Any]) -> dict[str, Any]:
    error = None if site["error"] is None else float(site["error"])
    return {
        "error": error if error is not None and math.isfinite(error) else None,
        "tokens": [int(count) for count in site["tokens"]],
        "notes": [str(note) for note in site["notes"]],
    }


def _unfinished(folder: Path) -> dict[str, Any]:
    """A journal's own account. Without run.json the run had done nothing yet."""
    journal = folder / FOLDER
    if not (journal / "run.json").exists():
        return {"blocks_done": 0, "sites_done": 0, "sites_planned": 0, "made": [], "resume": None}
    try:
        run = json.loads((journal / "run.json").read_bytes())
        records = [json.loads(file.read_bytes()) for file in sorted(journal.glob("[0-9]*.json"))]
        return {
            **{key: run[key] for key in RUN},
            "blocks_done": len(records),
            "sites_done": sum(len(record["sites"]) for record in records),
            "sites_planned": sum(spec is not None for spec in run["plan"].values()),
            "made": provenance_rows(run),
            "resume": f"{quantize_command(run)} --out {shlex.quote(str(folder))} --resume",
        }
    except DAMAGE:
        raise ResumeError(
            f"{journal}: the account of an unfinished run is there, but damaged; begin anew with quantize --restart"
        ) from None


def _float(folder: Path) -> dict[str, Any]:
    source = Source(folder, str(folder))
    dtypes: Counter[str] = Counter()
    for entry in source.entries.values():
        dtypes[entry.dtype] += math.prod(entry.shape)
    return {"parameters": sum(dtypes.values()), "dtypes": dict(dtypes.most_common()), "weight_bytes": source.nbytes()}


def _show(found: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    rows = {"packed": _packed_rows, "unfinished": _unfinished_rows, "float": _float_rows}[found["kind"]](found)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in [*rows, ("whole folder", _bytes(found["folder_bytes"])), *(found.get("made") or [])]:
        facts.add_row(Text(plain(name)), Text(plain(value, 2000)))
    console.print(facts)
    if found.get("sites"):
        console.print(_site_table(found["sites"]))
    if found.get("command"):
        console.print(Text(f"Made by:\n  {plain(found['command'], 4000)}"), soft_wrap=True)
    if found.get("resume"):
        console.print(Text(f"Continue with:\n  {plain(found['resume'], 4000)}"), soft_wrap=True)


def _packed_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    bits, size, checked = found["bits"], found["bytes"], found["verification"]
    measured = "unknown" if bits["measured"] is None else f"{bits['measured']:.5g}"
    if checked["error"]:
        state = "DAMAGED, see the error below"
    elif not checked["checked"]:
        state = "not checked (--no-verify)"
    elif checked["sealed"]:
        state = "every file is what was written"
    else:
        state = "none in this folder (save_pretrained wrote it); every tensor is what its spec promises"
    reasons = by_reason(found["left_float"] or {}).items()
    return [
        ("packed checkpoint", f"{found['folder']}, written by bitwright {found['written_by']}"),
        ("bits per weight", f"{measured} measured on disk, {bits['promised']:.5g} promised, over {bits['weights']:,}"),
        ("bytes packed", _bytes(size["packed"])),
        ("bytes left float", _bytes(size["float"])),
        ("checksums", state),
        ("report.json", found["report"] + ("" if found["report"] == "read" else ": errors and provenance not known")),
        *(("left float", f"{reason}: {', '.join(capped(names, MOST_NAMES))}") for reason, names in reasons),
    ]


def _unfinished_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    done = f"{found['sites_done']:,} of {found['sites_planned']:,} sites, blocks finished: {found['blocks_done']:,}"
    rows = [("unfinished run", found["folder"]), ("done", done)]
    return rows if found["resume"] else [*rows, ("next", "nothing is done yet: begin anew with quantize --restart")]


def _float_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("float model, not packed", found["folder"]),
        ("parameters", f"{found['parameters']:,}"),
        ("stored as", ", ".join(f"{name} ({count:,})" for name, count in found["dtypes"].items())),
        ("weight files", _bytes(found["weight_bytes"])),
        ("to pack it", f"quantize --model {shlex.quote(found['folder'])} --bits 4"),
    ]


def _site_table(sites: Sequence[Site]) -> Table:
    shown = worst(sites, MOST_SITES)
    table = Table(pad_edge=False)
    for heading in ("site", "shape", "bits", "bytes", "error", "tokens", "spec", "notes"):
        number = heading in ("shape", "bits", "bytes", "error", "tokens")
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for site in shown:
        bits, size = f"{site['bits_per_weight']:.5g}", f"{site['nbytes']:,}"
        numbers = (shape_words(site), bits, size, percent(site["error"]), tokens_words(site["tokens"]))
        cells = (site["site"], *numbers, spec_words(site["spec"]), brief(site["notes"]))
        table.add_row(*(Text(plain(cell)) for cell in cells))
    if len(shown) < len(sites):
        table.caption = f"the {MOST_SITES} of most error, of {len(sites):,} sites; --json has them all"
    return table


def _bytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size:,} ({human(size)})"


if __name__ == "__main__":
    main()
