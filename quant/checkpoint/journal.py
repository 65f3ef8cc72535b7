"""What a run has finished, so that it can be killed at any instant and go on to the same bytes.

The output folder holds `.bitwright/` while a run is under way: `run.json` says what the run is (recipe, plan, model,
text, versions), `lock` keeps a second run out, and each finished block has two files: `00007.safetensors` with its
packed tensors and `00007.json` with its records and their sha256. Both appear by rename, the record last: a block is
finished when its record is there. `rows.safetensors` is what of the plan `run.json` has no room for (`recall.py`).
Resuming compares `run.json` key by key and refuses another run, by name of the difference. `files.json` lists what the
run writes beside the journal: what a restart may delete, and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from quant.checkpoint.manifest import CHECKSUMS, JOURNAL, METHOD, PEOPLE, listed_files, plain_name, verify, weight_files
from quant.checkpoint.same import compare
from quant.checkpoint.shards import STEMS, Atomic, Piece, disk_error, index_name, read_pieces, sha256, write_text
from quant.errors import CheckpointError, ResourceError, ResumeError

FOLDER = JOURNAL
DONE = ".bitwright-done"
FILES, TOLD = "files.json", "told.json"  # the second: what a plan file said, until `run.json` has the plan
SAME = ("model", "recipe", "plan", "calibration")  # what makes a finished checkpoint the one that is asked for
Mode = Literal["new", "resume", "restart"]


class Journal:
    """A context that holds the lock of one output folder."""

    def __init__(self, out: Path, run: Mapping[str, Any], mode: Mode) -> None:
        self.out, self.folder, self.mode = out, out / FOLDER, mode
        self.run = json.loads(json.dumps(run))
        self._lock: IO[str] | None = None

    def __enter__(self) -> Journal:
        try:
            self._check_folder()
            shutil.rmtree(self.out / DONE, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_create(self.out, error) from None
        self._lock = self._locked()
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def check(self) -> None:
        """What entering would refuse, but for the comparison with an unfinished run; nothing is written."""
        try:
            self._check_folder()
            there = next(place for place in (self.out, *self.out.absolute().parents) if place.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise PermissionError(errno.EACCES, f"{there} is no folder that may be written in")
        except OSError as error:
            raise _cannot_create(self.out, error) from None
        if (self.folder / "lock").exists():
            self._locked().close()
        if self.mode == "new" and (self.folder / "run.json").exists():
            self._refuse_unfinished()

    def _locked(self) -> IO[str]:
        try:
            lock = (self.folder / "lock").open("a")
        except OSError as error:
            raise disk_error(self.out, error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ResumeError(
                f"{self.out}: another run is writing here; wait for it, stop it, or choose another --out"
            ) from None
        return lock

    def _check_folder(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ResumeError(f"{self.out}: is a file; choose another --out")
        if self.folder.is_symlink():
            raise ResumeError(f"{self.folder}: is a link to another place; remove it, or choose another --out")
        if not self.out.exists() or self.folder.exists() or not any(p.name != DONE for p in self.out.iterdir()):
            if self.mode == "resume" and not self.folder.exists():
                raise ResumeError(f"{self.out}: holds no unfinished run to resume; run without --resume")
            return
        if not complete(self.out):
            raise ResumeError(f"{self.out}: holds files that are not bitwright's; choose another --out")
        if self.mode != "restart":
            raise ResumeError(
                f"{self.out}: already holds a checkpoint; choose another --out, or --restart to replace it "
                '(in Python mode="restart")'
            )

    def _refuse_unfinished(self) -> None:
        done = sum("block" in read_json(file) for file in self.folder.glob("[0-9]*.json"))  # not of tuning or the ends
        raise ResumeError(
            f"{self.out}: holds an unfinished run (blocks done: {done}); continue it with --resume, or begin anew with "
            '--restart (in Python mode="resume" and mode="restart")'
        )

    def _open(self) -> None:
        path = self.folder / "run.json"
        if self.mode == "restart":
            self._clear()
        elif path.exists():
            if self.mode == "new":
                self._refuse_unfinished()
            compare(read_json(path), self.run, f"{self.out}: the unfinished run there is another one")
        shutil.rmtree(self.folder / "activations", ignore_errors=True)
        for stale in self.folder.glob("*.part"):
            stale.unlink()
        write_text(path, json.dumps(self.run, indent=2) + "\n")

    def _clear(self) -> None:
        """Deletes what earlier runs wrote here, and no file of anybody else's. What lists them goes last: a restart may
        be killed too."""
        listed = self.folder / FILES
        names = set(_written_files(self.out))
        with suppress(ResumeError, CheckpointError, KeyError, TypeError):
            names.update(plain_name(name, listed, inner=True) for name in read_json(listed)["files"])
        for name in sorted(names, key=lambda name: (name in (CHECKSUMS, "config.json"), name)):
            for file in (self.out / name, self.out / f"{name}.part"):
                if file.parent.resolve().is_relative_to(self.out.resolve()):
                    file.unlink(missing_ok=True)
        for item in sorted(self.folder.iterdir(), key=lambda item: (item.name == FILES, item.name == "run.json")):
            if item.name not in ("lock", TOLD):
                shutil.rmtree(item) if item.is_dir() else item.unlink()

    def claim(self, names: Iterable[str]) -> None:
        """Notes the files that will be written beside the journal, before the first of them is."""
        write_text(self.folder / FILES, json.dumps({"files": sorted(names)}) + "\n")

    def finished(self, index: int) -> bool:
        return (self.folder / f"{index:05d}.json").exists()

    def write(self, index: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Marks a block finished."""
        data = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        with Atomic(self.tensors(index)) as out:
            out.write(data)
        record = {**record, "sha256": hashlib.sha256(data).hexdigest()}
        write_text(self.folder / f"{index:05d}.json", json.dumps(record) + "\n")

    def tensors(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def load(self, index: int) -> dict[str, torch.Tensor]:
        """A finished block's tensors. Raises `ResumeError` where they are not what was written."""
        check_block(self.tensors(index))
        try:
            return load_file(self.tensors(index))
        except (OSError, SafetensorError) as error:
            raise unreadable(self.tensors(index), error) from None

    def pieces(self, index: int) -> dict[str, Piece]:
        return read_pieces(self.tensors(index))

    def record(self, index: int) -> dict[str, Any]:
        record = read_json(self.folder / f"{index:05d}.json")
        return {key: value for key, value in record.items() if key != "sha256"}

    def close(self) -> None:
        """The checkpoint is complete: the journal goes, by a rename first, so that no half of it is ever found."""
        self.folder.rename(self.out / DONE)
        shutil.rmtree(self.out / DONE, ignore_errors=True)


def check_block(tensors: Path) -> None:
    """Raises `ResumeError` where a finished block's file is not what its record says."""
    record = read_json(tensors.with_suffix(".json"))
    try:
        found = sha256(tensors)
    except OSError as error:
        raise unreadable(tensors, error) from None
    if found != record.get("sha256"):
        raise unreadable(tensors, "it was altered since it was written")


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    return data  # pyright: ignore[reportUnknownVariableType]


def unreadable(path: Path, reason: object) -> ResumeError:
    return ResumeError(f"{path}: cannot be read ({reason}); begin anew with --restart")


def _cannot_create(out: Path, error: OSError) -> ResourceError:
    return ResourceError(f"{out}: no folder can be made or read here ({error.strerror or error}); choose another --out")


def check_place(out: Path, parts: Iterable[str], mode: Mode) -> None:
    """Raises before any work what would be raised after the model was prepared, if `out` cannot be written in this
    mode. `parts`: folders in it that may hold a component of a pipeline."""
    places = [out, *(out / part for part in parts)]
    try:
        ours = [place for place in places if (place / FOLDER).exists() or complete(place)]
    except OSError:  # a name too long: of a model that does not exist, perhaps, which is said first
        return
    for place in ours or [out]:
        if mode != "resume" or not complete(place):
            Journal(place, {}, mode).check()


def check_same(out: Path, known: Mapping[str, Any]) -> None:
    """Raises `ResumeError` where the run in `out` is another one by what is known of a run before its plan is made."""
    before, unfinished = begun(out), (out / FOLDER).exists()
    keys = [key for key in known if key in before and (unfinished or key in SAME)]
    now = json.loads(json.dumps({key: known[key] for key in keys}))
    which = "unfinished run" if unfinished else "finished checkpoint"
    compare({key: before[key] for key in keys}, now, f"{out}: the {which} there is another one")


def begun(out: Path) -> dict[str, Any]:
    """What the run in `out`, finished or not, says that it is; nothing where none does."""
    if (out / FOLDER).exists():
        path = out / FOLDER / "run.json"
        return read_json(path) if path.exists() else {}
    path = out / "report.json"
    return read_json(path) if path.exists() and complete(out) else {}


def complete(out: Path) -> bool:
    """Whether `out` holds a finished checkpoint of ours and no run is under way."""
    return not (out / FOLDER).exists() and _ours(out)


def _ours(out: Path) -> bool:
    try:
        return json.loads((out / "config.json").read_bytes())["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def finished_report(out: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The report of the sound, finished checkpoint in `out`, if it is what `run` would make.

    Raises:
        ResumeError: it is another run's, or its report does not say.
        CheckpointError: it is damaged.
    """
    shutil.rmtree(out / DONE, ignore_errors=True)
    verify(out)
    try:
        report: dict[str, Any] = json.loads((out / "report.json").read_bytes())
        before = {key: report[key] for key in SAME}
        _ = report["files"], report["bits"]["measured"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ResumeError(
            f"{out}: holds a finished checkpoint whose report.json does not say what it was made from; choose another "
            "--out, or --restart to replace it"
        ) from None
    now = json.loads(json.dumps({key: run[key] for key in SAME}))
    compare(before, now, f"{out}: the finished checkpoint there is another one")
    return report


def _written_files(out: Path) -> list[str]:
    """The files of the checkpoint of ours in `out`, which may be half deleted."""
    with suppress(CheckpointError):
        return [*PEOPLE, "config.json", *listed_files(out)]
    if not _ours(out):
        return []
    weights: list[str] = []
    with suppress(CheckpointError):
        weights = weight_files(out)
    return ["config.json", "generation_config.json", *map(index_name, STEMS), *weights]
