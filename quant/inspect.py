"""`quant-inspect FOLDER`: what is inside, and whether it is what was written.

A packed checkpoint is checked against its checksums. Specs come from config.json and bytes from the headers of the
files, so bits are measured, not believed. Errors, notes and provenance come from report.json, which no checksum covers
and anybody may have edited: where it does not hold what ours holds it counts as damaged and is left out. An unfinished
run is explained with the command that goes on, and a float model is called one.

Exit codes: 0 the folder is sound, or there is nothing to check; 2 no such folder, or no model in it; 3 a float model's
files or a pipeline's index cannot be read; 6 a packed checkpoint is damaged or another tool's; 7 an unfinished run
cannot be read.
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

from quant.checkpoint import words
from quant.checkpoint.journal import FOLDER, check_block
from quant.checkpoint.manifest import CHECKSUMS, METHOD, PackedSite, read_config, read_sites, stored_tensors, verify
from quant.checkpoint.pipelines import component
from quant.checkpoint.provenance import command as quantize_command
from quant.checkpoint.shards import Piece
from quant.display import show_any
from quant.errors import BitwrightError, CheckpointError, ResumeError, SettingsError
from quant.models.diffusion import components
from quant.models.source import COMPONENT, Source

MOST_SITES, MOST_NAMES = 100, 5
RUN = ("model", "recipe", "plan", "calibration", "compute", "versions")  # said in words, as `made`
NOT_SHOWN = (*RUN, "components", "made", "left_float", "sites", "ends", "command", "resume", "damage")
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

_EPILOG = """Example: `quant-inspect out/model-4bit --json | jq .bits`

Exit codes: 0 sound, 2 no such folder or no model in it, 3 float files unreadable, 6 damaged, 7 unfinished and damaged.
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
        if found.get("damage"):
            raise CheckpointError(found["damage"])
    except BitwrightError as error:
        typer.echo(f"error: {words.plain(error, 2000)}", err=True)
        raise typer.Exit(error.exit_code) from None


def main() -> None:
    """The console entry point."""
    show_any()
    app(prog_name="quant-inspect")


def look(folder: Path, check: bool = True, out: Path | None = None) -> dict[str, Any]:
    """Describes `folder` as plain data. `out`: of a component, the pipeline's folder.

    `kind` is "packed", "unfinished" or "float"; `damage` is what `check` found, or
    None, so that the rest can still be shown.

    Raises:
        SettingsError: there is no such folder, or no model in it.
        CheckpointError: config.json cannot be read, or its account of the packed sites cannot.
        ModelError: a float model's files or a pipeline's index cannot be read.
        ResumeError: an unfinished run's own account cannot be read.
    """
    home, folder = folder, component(folder)
    if folder != home and (ours := [name for name in components(home) if _made(home / name)]):
        whole = {name: look(home / name, check, home) for name in ours}
        first = whole.pop(COMPONENT, None) or whole.pop(ours[0])
        damage = [each["damage"] for each in (first, *whole.values()) if each.get("damage")]
        return {**first, "damage": damage[0] if damage else None, "components": whole}
    if not folder.is_dir():
        state = "a file" if folder.exists() else "not there"
        raise SettingsError(f"{folder}: {state}; give the folder of a checkpoint")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    common: dict[str, Any] = {"folder": str(folder), "folder_bytes": size}
    if (folder / FOLDER).is_dir():
        return {"kind": "unfinished", **common, **_unfinished(folder, out or home, check)}
    if not any((folder / name).is_file() for name in ("config.json", CHECKSUMS)):
        raise SettingsError(f"{folder}: no config.json; give the folder of a checkpoint")
    config = read_config(folder)
    common["architectures"] = config.get("architectures") or (
        [config["_class_name"]] if "_class_name" in config else None
    )
    if config.get("quantization_config") is not None:
        return {"kind": "packed", **common, **_packed(folder, config["quantization_config"], check)}
    return {"kind": "float", **common, **_float(folder)}


def _made(folder: Path) -> bool:
    """Whether a component of a pipeline is packed, or is being packed."""
    config = folder / "config.json"
    sealed = (folder / CHECKSUMS).is_file() or (config.is_file() and METHOD in config.read_text(errors="replace"))
    return sealed or (folder / FOLDER).is_dir()


def _packed(folder: Path, quantization: dict[str, Any], check: bool) -> dict[str, Any]:
    every = read_sites(quantization, str(folder))
    sites, ends = ({n: s for n, s in every.items() if bool(s.site.end) is outer} for outer in (False, True))
    sealed = "every file is what was written" if "checksums" in quantization else "no checksums; tensors as promised"
    state, damage = sealed if check else "not checked", None
    stored: dict[str, Piece] = {}
    try:
        stored = stored_tensors(folder)
        if check:
            verify(folder)
    except CheckpointError as error:
        state, damage = "DAMAGED", str(error)
    weights = sum(one.site.weights for one in sites.values())
    inner, names = ({name for site in some.values() for name in site.stored()} for some in (sites, every))
    packed = sum(stored[name].nbytes for name in inner) if stored.keys() >= names else None
    promised = sum(one.spec.nbytes(one.site.shape) for one in sites.values())
    report, told = _told(folder)
    solved = told.pop("sites", {})
    return {
        "written_by": f"bitwright {quantization.get('version')}",
        "weights": weights,
        "bits": {
            "measured": None if packed is None else 8 * packed / max(1, weights),
            "promised": 8 * promised / max(1, weights),
        },
        "packed_bytes": packed,
        "float_bytes": sum(piece.nbytes for name, piece in stored.items() if name not in names),
        "verification": state,
        "damage": damage,
        "report": report,
        **told,
        "sites": [_site(one, solved.get(name, {})) for name, one in sites.items()],
        **({"ends": [_site(one, solved.get(name, {})) for name, one in ends.items()]} if ends else {}),
    }


def _site(packed: PackedSite, told: Mapping[str, Any]) -> dict[str, Any]:
    site, spec = packed.site, packed.spec
    return {
        "site": site.name,
        "shape": list(site.shape),
        "experts": site.experts,
        "spec": spec.to_dict(),
        "bits_per_weight": spec.bits_per_weight(site.shape),
        "nbytes": spec.nbytes(site.shape),
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
        told |= {"command": str(report["command"]), "made": words.provenance_rows(told)}
        told["left_float"] = {str(name): str(reason) for name, reason in report["left_float"].items()}
        told["sites"] = {str(site["site"]): _told_site(site) for site in words.all_sites(report)}
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


def _unfinished(folder: Path, out: Path, check: bool) -> dict[str, Any]:
    """A journal's own account. Without run.json the run had done nothing yet."""
    journal = folder / FOLDER
    if not (journal / "run.json").exists():
        return {"blocks_done": 0, "next": "nothing is done yet; begin anew with quantize --restart"}
    try:
        run = json.loads((journal / "run.json").read_bytes())
        files = sorted(journal.glob("[0-9]*.json"))
        journalled = [json.loads(file.read_bytes()) for file in files]
        records = [record for record in journalled if "sites" in record]  # or of tuning, or of the ends
        for file in files if check else ():
            check_block(file.with_suffix(".safetensors"))
        command = quantize_command(run, "")
        return {
            **{key: run[key] for key in RUN},
            "blocks_done": len(records),
            "sites_done": sum(len(record.get("sites", record.get("ends", ()))) for record in journalled),
            "sites_planned": sum(spec is not None for spec in run["plan"].values()),
            "made": words.provenance_rows(run),
            "resume": f"{command} --out {shlex.quote(str(out))} --resume",
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
    pack = f"quantize --model {shlex.quote(str(folder))} --bits 4"
    counts = {"parameters": sum(dtypes.values()), "dtypes": dict(dtypes.most_common())}
    return {**counts, "weight_bytes": source.nbytes(), "next": f"float model, not packed; pack it with: {pack}"}


def _show(found: Mapping[str, Any]) -> None:
    """The JSON's plain values as lines, the run in words, the sites as a table, and a command to copy."""
    for name, one in found.get("components", {}).items():
        _show({"component": name, **one})
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column(overflow="fold")
    shown = [(key.replace("_", " "), _value(value)) for key, value in found.items() if key not in NOT_SHOWN]
    reasons = words.by_reason(found.get("left_float", {})).items()
    left = [("left float", f"{reason}: {', '.join(words.capped(names, MOST_NAMES))}") for reason, names in reasons]
    ends = [("embedding and head", words.ends_words(found["ends"]))] if "ends" in found else []
    for name, value in [*shown, *ends, *left, *found.get("made", [])]:
        facts.add_row(Text(name), Text(words.plain(value, 2000)))
    console.print(facts)
    if found.get("sites"):
        console.print(_site_table(words.all_sites(found)))
    for key, heading in (("command", "Made by"), ("resume", "Continue with")):
        if key in found:
            console.print(Text(f"{heading}:\n  {words.plain(found[key], 4000)}"), soft_wrap=True)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_value(part)} {name}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}" if isinstance(value, float) else str(value)


def _site_table(sites: Sequence[words.Site]) -> Table:
    shown = words.worst(sites, MOST_SITES)
    table = Table(pad_edge=False)
    for heading in ("site", "shape", "bits", "bytes", "error", "tokens", "spec", "notes"):
        number = heading in ("shape", "bits", "bytes", "error", "tokens")
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for site in shown:
        numbers = (words.shape_words(site), f"{site['bits_per_weight']:.5g}", f"{site['nbytes']:,}")
        quality = (words.percent(site["error"]), words.tokens_words(site["tokens"]))
        cells = (site["site"], *numbers, *quality, words.spec_words(site["spec"]), words.brief(site["notes"]))
        table.add_row(*(Text(words.plain(cell)) for cell in cells))
    if len(shown) < len(sites):
        table.caption = f"the {MOST_SITES} of most error, of {len(sites):,} sites; --json has them all"
    return table


if __name__ == "__main__":
    main()
