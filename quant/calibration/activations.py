"""The tensors between two blocks, one nest per batch: in memory up to a limit, past it on disk."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from quant.errors import ResourceError
from quant.models.source import first_line

RESUME = "free some space, then run the same command with --resume: finished blocks are kept. Or choose another --out"
_TENSOR = object()  # where a nest had a tensor
_SCRATCH = "bitwright-scratch-"


@contextmanager
def scratch() -> Generator[Path]:
    """A folder in TMPDIR for what one process spills. Those of processes that were killed, whose locks are free, go."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(OSError), (left / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as folder, (Path(folder) / "new").open("w") as lock:
        with suppress(OSError):  # a file system without locks: then nobody takes one to remove this either
            fcntl.flock(lock, fcntl.LOCK_EX)
        (Path(folder) / "new").rename(Path(folder) / "lock")  # it is never seen without its lock
        yield Path(folder)


class Activations:
    """A list of block outputs that keeps at most `limit` bytes in memory and spills the rest to files in `folder`.

    What is read back from a file is bit for bit what was put in.
    """

    def __init__(self, count: int, folder: Path, limit: int, device: str = "cpu", remedy: str = RESUME) -> None:
        """`remedy`: what to do where they do not fit on the disk."""
        self.remedy = remedy
        self.folder = folder
        self.device = device
        self.limit = limit
        self.held = 0
        self.spilled = 0
        self._items: list[tuple[list[torch.Tensor] | Path, Any, list[Any]] | None] = [None] * count

    def __setitem__(self, index: int, tree: Any) -> None:
        self._drop(index)
        leaves, structure = pytree.tree_flatten(tree)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        others = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        size = sum(tensor.nbytes for tensor in tensors)
        if self.held + size <= self.limit:
            self.held += size
            self._items[index] = (tensors, structure, others)
            return
        path = self.folder / f"{index:06d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = partial(torch.Tensor.to, device="cpu", copy=True, memory_format=torch.contiguous_format)
            save_file({str(place): own(tensor) for place, tensor in enumerate(tensors)}, path)  # which share no memory
        except (OSError, SafetensorError) as error:
            raise ResourceError(
                f"{path}: activations do not fit ({first_line(error)}); they take {size:,} bytes a batch: {self.remedy}"
            ) from None
        self.spilled += size
        self._items[index] = (path, structure, others)

    def __getitem__(self, index: int) -> Any:
        item = self._items[index]
        if item is None:
            return None
        held, structure, others = item
        if isinstance(held, Path):
            stored = load_file(held, device=self.device)
            tensors = [stored[str(place)] for place in range(len(stored))]
        else:
            tensors = held
        remaining = iter(tensors)
        leaves = [next(remaining) if other is _TENSOR else other for other in others]
        return pytree.tree_unflatten(leaves, structure)

    def __len__(self) -> int:
        return len(self._items)

    def clear(self) -> None:
        for index in range(len(self)):
            self._drop(index)

    def _drop(self, index: int) -> None:
        item = self._items[index]
        if item is None:
            return
        if isinstance(item[0], Path):
            item[0].unlink(missing_ok=True)
        else:
            self.held -= sum(tensor.nbytes for tensor in item[0])
        self._items[index] = None
