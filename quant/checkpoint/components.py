"""The rest of a diffusers pipeline: what lies beside the transformer is copied as it is.

A packed transformer goes into its place in the pipeline's folder, so that `DiffusionPipeline.from_pretrained` loads the
whole. A transformer that stands alone keeps the scheduler that lies with it. Only safetensors, configs and tokenizer
files are copied, never a pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from filecmp import cmp
from pathlib import Path
from typing import Any

from quant.checkpoint.journal import FOLDER, TOLD, Journal, Mode, check_place, complete
from quant.checkpoint.shards import disk_error, write_text
from quant.errors import ResumeError
from quant.models.diffusion import components
from quant.models.source import PIPELINE, Source

KINDS = (".json", ".txt", ".model", ".jinja", ".safetensors")
ALONE = ("scheduler",)  # what may lie in a transformer's own folder


def check_home(out: Path, source: Source, parts: Sequence[str], mode: Mode) -> None:
    """Raises `ResumeError`, before any work, if `out` cannot be written in this mode, or holds files that are not ours
    where a component is to be. `parts`: those that are quantized."""
    ours = [part for part in parts if (out / part / FOLDER).exists() or complete(out / part)]
    if source.inside and not ours and _holds_any(out):
        raise ResumeError(f"{out}: holds files that are not bitwright's; choose another --out")
    full = [part for part in parts if source.inside and part not in ours and _holds_any(out / part)]
    for part in full:
        copies = _copies(source, out, part)
        if not copies or mode != "restart":
            what = "the float component; pack it with --restart, or" if copies else "files that are not bitwright's;"
            raise ResumeError(f"{out / part}: holds {what} choose another --out")
    if source.inside not in full:
        check_place(out / source.inside, (), mode)


def clear_others(out: Path, source: Source, parts: Sequence[str], mode: Mode, told: Mapping[str, Any]) -> None:
    """A restart clears the other components too, when it begins with the first of `parts`: those that are not among
    them become float, and those that are may then be resumed, by what the plan file has `told`.

    Raises:
        ResumeError: another mode, and a packed component would become float; or another run is writing there.
    """
    others = {*components(source.home)} - {source.inside} if source.inside else set[str]()
    for place in [p for p in out.glob("*") if p.name in others and ((p / FOLDER).exists() or complete(p))]:
        if mode == "restart" and source.inside == parts[0]:
            with Journal(place, {}, mode) as journal:
                (journal.folder / "run.json").unlink()
                if place.name not in parts:
                    journal.close()
        elif place.name not in parts:
            raise ResumeError(f"{place}: would become float; name it in --components too, or begin anew with --restart")
    for part in parts if source.inside == parts[0] and mode != "resume" else ():
        for copy in _copies(source, out, part):
            copy.unlink()
        (out / part / FOLDER / TOLD).unlink(missing_ok=True)
        if told and part != source.inside:
            (out / part / FOLDER).mkdir(parents=True, exist_ok=True)
            write_text(out / part / FOLDER / TOLD, json.dumps(told))


def _holds_any(place: Path) -> bool:
    return place.is_dir() and any(place.iterdir())


def _copies(source: Source, out: Path, part: str) -> list[Path]:
    """The files of a component's folder in `out`, if all are copies of the float ones (`copy_beside`), and no
    originals."""
    found = {path: source.home / path.relative_to(out) for path in (out / part).rglob("*") if path.is_file()}
    same = all(old.is_file() and not new.samefile(old) and cmp(new, old, False) for new, old in found.items())
    return [*found] if same and source.inside else []


def beside(source: Source, parts: Sequence[str]) -> Iterator[Path]:
    """The files to copy, below `source.home`."""
    if not source.is_diffusion and not source.inside:
        return
    names = components(source.home) if source.inside else ALONE
    if source.inside:
        yield source.home / PIPELINE
    for name in sorted(set(names) - set(parts)):
        folder = source.home / name
        found = sorted(folder.rglob("*")) if folder.is_dir() and name not in ("", ".", "..") else []
        yield from (path for path in found if path.suffix in KINDS and path.is_file())


def copy_beside(source: Source, out: Path, parts: Sequence[str]) -> None:
    """Copies them below `out`, each whole or not at all.

    Raises:
        ResourceError: the disk is full.
    """
    for path in beside(source, parts):
        target = out / path.relative_to(source.home)
        part = target.with_name(target.name + ".part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part)
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise disk_error(target, error) from None


def copy_card(source: Source, out: Path, parts: Sequence[str]) -> None:
    """The model card and the report to the pipeline's folder too, where people look for them: those of the first of the
    components, and where the others' are."""
    if not source.inside or source.inside != parts[0]:
        return
    for name in ("README.md", "report.html"):
        shutil.copyfile(out / source.inside / name, out / name)
    if len(parts) > 1:
        also = "".join(f"- `{part}`: [its card]({part}/README.md)\n" for part in parts[1:])
        with (out / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n## Other packed components\n\n{also}")
