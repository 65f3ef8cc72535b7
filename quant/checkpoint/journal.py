"""What a run has finished, so that it can be killed at any instant and go on to the same bytes.

The output folder holds `.bitwright/` while a run is under way: `run.json` says what the run is (recipe, plan, model,
text, versions), `lock` keeps a second run out, and each finished block has two files: `00007.safetensors` with its packed
tensors and `00007.json` with its records. Both appear by rename, the record last: a block is finished when its record
is there. Resuming compares `run.json` key by key and refuses a run that is not the same one, by name of the difference.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors.torch import save

from quant.checkpoint.shards import Atomic, Piece, read_pieces, write_text
from quant.errors import ResumeError

FOLDER = ".bitwright"
DONE = ".bitwright-done"
OURS = (".safetensors", ".json", ".md", ".html", ".txt", ".model", ".jinja", ".part")  # what a restart may delete
Mode = Literal["new", "resume", "restart"]


class Journal:
    """A context that holds the lock of one output folder."""

    def __init__(self, out: Path, run: Mapping[str, Any], mode: Mode) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.run = json.loads(json.dumps(run))
        self.mode = mode
        self._lock: IO[str] | None = None

    def __enter__(self) -> Journal:
        self._check_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ResumeError(
                f"{self.out}: another run is writing here; wait for it, stop it, or choose another --out"
            ) from None
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _check_folder(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ResumeError(f"{self.out}: is a file; choose another --out")
        shutil.rmtree(self.out / DONE, ignore_errors=True)
        if not self.out.exists() or self.folder.exists() or not any(self.out.iterdir()):
            if self.mode == "resume" and not self.folder.exists():
                raise ResumeError(f"{self.out}: holds no unfinished run to resume; run without --resume")
            return
        if not complete(self.out):
            raise ResumeError(f"{self.out}: holds files that are not bitwright's; choose another --out")
        if self.mode == "new":
            raise ResumeError(
                f"{self.out}: already holds a checkpoint; choose another --out, or --restart to replace it"
            )
        if self.mode == "resume":
            raise ResumeError(f"{self.out}: holds no unfinished run to resume; run without --resume")

    def _open(self) -> None:
        path = self.folder / "run.json"
        if self.mode == "restart":
            for item in sorted(self.out.iterdir()):
                if item.is_file() and item.suffix in OURS:
                    item.unlink()
            for item in sorted(self.folder.iterdir()):
                if item.name != "lock":
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
        elif path.exists():
            if self.mode == "new":
                done = len(list(self.folder.glob("[0-9]*.json")))
                raise ResumeError(
                    f"{self.out}: holds an unfinished run ({done} blocks done); continue it with --resume, or begin anew "
                    "with --restart"
                )
            self._compare(json.loads(path.read_text()))
        shutil.rmtree(self.folder / "activations", ignore_errors=True)
        for stale in self.folder.glob("*.part"):
            stale.unlink()
        write_text(path, json.dumps(self.run, indent=2) + "\n")

    def _compare(self, before: dict[str, Any]) -> None:
        for key in sorted(set(before) | set(self.run)):
            if before.get(key) != self.run.get(key):
                was, now = _difference(before.get(key), self.run.get(key), key)
                raise ResumeError(
                    f"{self.out}: the unfinished run there is another one: {was} then, {now} now. Resume with what it was "
                    "begun with, or use --restart to begin anew"
                )

    def finished(self, index: int) -> bool:
        return (self.folder / f"{index:05d}.json").exists()

    def write(self, index: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Marks a block finished."""
        with Atomic(self.folder / f"{index:05d}.safetensors") as out:
            out.write(save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}))
        write_text(self.folder / f"{index:05d}.json", json.dumps(record) + "\n")

    def tensors(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def pieces(self, index: int) -> dict[str, Piece]:
        return read_pieces(self.tensors(index))

    def record(self, index: int) -> dict[str, Any]:
        return json.loads((self.folder / f"{index:05d}.json").read_text())

    def close(self) -> None:
        """The checkpoint is complete: the journal goes, by a rename first, so that no half of it is ever found."""
        self.folder.rename(self.out / DONE)
        shutil.rmtree(self.out / DONE)


def complete(out: Path) -> bool:
    """Whether `out` holds a finished checkpoint of ours and no run is under way."""
    try:
        config = json.loads((out / "config.json").read_text())
        return not (out / FOLDER).exists() and config["quantization_config"]["quant_method"] == "bitwright"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _difference(before: Any, now: Any, where: str) -> tuple[str, str]:
    """The first place where two nests differ, as `path = value` of each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}, key=str):  # pyright: ignore[reportUnknownArgumentType]
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{where}.{key}")
    return f"{where} = {json.dumps(before)}", f"{where} = {json.dumps(now)}"
