"""A whole forward pass with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from quant.calibration.batch import Batch, moved
from quant.calibration.replay import Replay
from quant.errors import ModelError
from quant.memory import give_back
from quant.models.skeleton import Skeleton
from quant.models.structure import end_of, name_of


def outside_blocks(skeleton: Skeleton, chain: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the state outside all blocks: what is needed from the start, and an untied head, needed at the end."""
    inside = set(skeleton.names_under(*chain))
    outside = [name for name in skeleton.names if name not in inside]
    prefix = name_of(skeleton.model, end_of(skeleton.model, "head"))
    tied = set(skeleton.tied) | set(skeleton.tied.values())
    head = [name for name in outside if prefix and name.startswith(prefix + ".") and name not in tied]
    return [name for name in outside if name not in head], head


@torch.no_grad()
def stream_all(skeleton: Skeleton, chain: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The model's logits (or hidden states) on some batches, each block loaded once for all of them."""
    outputs: list[Any] = [None] * len(batches)
    with streamed(skeleton, chain, batches, outputs) as replay:
        return [first_tensor(replay.head(batch, x)) for batch, x in zip(batches, outputs, strict=True)]


@contextmanager
def streamed(
    skeleton: Skeleton, chain: Sequence[str], batches: Sequence[Mapping[str, Any]], outputs: Any
) -> Generator[Replay]:
    """A context in which all blocks have run and the head is loaded. `outputs[n]`: of the last block on batch n."""
    outside, head = outside_blocks(skeleton, chain)
    skeleton.load(outside)
    with Replay(skeleton.model, chain) as replay:
        for index, name in enumerate(chain):
            names = skeleton.names_under(name)
            skeleton.load(names)
            for number, batch in enumerate(batches):
                outputs[number] = replay.output(index, batch, outputs[number])
            skeleton.unload(names)
            give_back()
        skeleton.load(head)
        yield replay
    skeleton.unload([*outside, *head])


class Forward:
    """A context in which the float model can be called on many batches again and again: in memory if its weights take
    at most `limit` bytes, else streamed block by block each time."""

    def __init__(self, skeleton: Skeleton, chain: Sequence[str], limit: int) -> None:
        self.skeleton, self.chain = skeleton, chain
        self.whole = skeleton.source.nbytes() <= limit

    def __enter__(self) -> Forward:
        if self.whole:
            self.skeleton.load(self.skeleton.names_under(""))
        return self

    def __exit__(self, *_: object) -> None:
        if self.whole:
            self.skeleton.unload(self.skeleton.names_under(""))

    @torch.no_grad()
    def __call__(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        batches = [moved(batch, self.skeleton.device) for batch in batches]
        if self.whole:
            return [first_tensor(self.skeleton.model(**batch)) for batch in batches]
        return stream_all(self.skeleton, self.chain, batches)


def first_tensor(output: Any) -> torch.Tensor:
    """What a pass is run for: the first floating tensor of its output (logits, hidden states)."""
    for x in pytree.tree_leaves(output):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x
    raise ValueError("its output holds no floating-point tensor")


def finite(output: Any, name: str) -> Any:
    """The output of a block or model. Raises `ModelError` if its main tensor holds a NaN or an infinity."""
    if not bool(torch.isfinite(first_tensor(output)).all()):
        raise ModelError(
            f"{name}: its output is not finite; the model overflows in this dtype (try --dtype float32) or its "
            "weights are damaged"
        )
    return output
