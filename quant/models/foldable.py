"""Finds which rotations can be folded into a model's weights (`models/folding.py`), and proves each: no list of models.

The float model runs in float32 on one short batch, a block in memory at a time. What it does says what may be folded:

- a linear's outputs are replaced by the numbers of their channels, the same for all tokens. Attention weights sum to
  one, so where another linear then reads whole numbers, it reads those channels. Replaced by one random number per
  token, channels of one head read the same, of two heads not: the heads of values and queries, grouped or fused.
- a norm whose output linears read, as wide as the stream, is one if a rotation passes through it, at least one that
  leaves a vector of ones.

Then it is done, and must change nothing: 1e-4 of the largest value, of each pair's outputs, of each block's outputs
(turned, where the stream is) and of the logits. What does not hold is left, with its reason. The weights are read two
or three times for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quant.calibration.batch import moved
from quant.calibration.replay import Replay
from quant.models.folding import Change, Folded, Folding, exactly, rotation
from quant.models.heads import Call, Heads, Watch, heads
from quant.models.residual import TOLERANCE, Stream, off
from quant.models.skeleton import Skeleton
from quant.models.source import STORED
from quant.models.stream import first_tensor, outside_blocks
from quant.models.structure import is_linear

STREAM = "the stream"
LEAST = 16  # block of a rotation that may stand for one at run time: smaller ones spread little


@torch.no_grad()
def find(skeleton: Skeleton, chain: Sequence[str], batch: Mapping[str, Any], folding: Folding) -> Folded:
    """What can be folded into the float model of `skeleton`, a float32 one of its own for this."""
    batch = moved(dict(batch), skeleton.device)
    untied = skeleton.untie() if folding.untie else {}
    search = _Search(skeleton, chain, batch)
    expected, stream = search.first()
    width = expected[-2].shape[-1]
    turning = stream.changes(skeleton.model, width, skeleton.tied) if folding.stream else {}
    if why := search.unstored(turning):
        turning, stream.reason = {}, why
    if turning and (why := search.proof(expected, search.between, turning, stream.turn(width))):
        turning, stream.reason = {}, why
    if search.between and not turning and (why := search.proof(expected, search.between, {}, lambda x: x)):
        search.folded.left |= dict.fromkeys(search.folded.said, why)
        search.folded.said, search.between = {}, {}
    folded = search.folded
    folded.changes = _merged(search.between, turning)
    folded.dtypes = {name: d for name in folded.changes if (d := search.dtype(name)) is not None}
    if not search.between:
        folded.turned.clear()
    if turning:
        folded.untied = untied
        if rotation(width)[0] >= LEAST:
            folded.turned |= {name for name in stream.readers if f"{name}.weight" in turning}
        folded.said[STREAM] = (
            f"{width} channels, {len(stream.writers)} modules write to it, {len(stream.readers)} read it behind "
            f"{len(stream.norms)} norms"
        )
    elif folding.stream:
        folded.left[STREAM] = stream.reason
    return folded


class _Search:
    """The passes of the float model. `between`: changes of linears turned between each other; `folded`: what is said of
    them."""

    def __init__(self, skeleton: Skeleton, chain: Sequence[str], batch: dict[str, Any]) -> None:
        self.skeleton, self.chain, self.batch = skeleton, chain, batch
        self.between: dict[str, list[Change]] = {}
        self.folded = Folded()

    def first(self) -> tuple[list[Tensor], Stream]:
        """The outputs of all blocks and of the model, and what was seen of the stream; fills `between`."""
        stream, outputs, previous = Stream(), list[Tensor](), None
        outside, head = outside_blocks(self.skeleton, self.chain)
        self.skeleton.load(outside)
        with Replay(self.skeleton.model, self.chain) as replay, Watch(self.skeleton.model) as watch:
            for index, name in enumerate(self.chain):
                names, given = self.skeleton.names_under(name), previous
                self.skeleton.load(names)
                run = lambda i=index, x=given: replay.output(i, self.batch, x)  # noqa: E731
                previous, calls = watch.seen(run)
                outputs.append(first_tensor(previous).clone())
                inside = {n: c for n, c in calls.items() if not name or n.startswith(name + ".")}
                stream.look(calls if index == 0 else inside, outputs[-1].shape[-1], True)
                self._pairs(name, watch, run, inside, outputs[-1])
                self.skeleton.unload(names)
            self.skeleton.load(head)
            result, calls = watch.seen(lambda: replay.head(self.batch, previous))
            stream.look(calls, outputs[-1].shape[-1], False)
        self.skeleton.unload([*outside, *head])
        return [*outputs, first_tensor(result).clone()], stream

    def _pairs(
        self, block: str, watch: Watch, run: Callable[[], Any], calls: Mapping[str, Call], output: Tensor
    ) -> None:
        """What can be turned between linears of the block in memory."""
        found = False
        linears = [name for name, call in calls.items() if is_linear(call.module)]
        for number, writer in enumerate(linears):
            for reader, turned in heads(watch, run, writer, linears[number + 1 :]).items():
                found = True
                name = f"{writer} -> {reader}"
                why = turned if isinstance(turned, str) else self._pair(watch, run, writer, reader, turned, output)
                if why:
                    self.folded.left[name] = why
                elif not isinstance(turned, str):
                    self.folded.said[name] = f"heads of {turned.width}"
                    if rotation(turned.width)[0] >= LEAST:
                        self.folded.turned.add(reader)
        if not found:
            self.folded.left[block or "the model"] = "no linear was seen to read the very channels that another writes"

    def _pair(
        self, watch: Watch, run: Callable[[], Any], writer: str, reader: str, heads: Heads, output: Tensor
    ) -> str | None:
        """Turns a pair; puts the changes into `between`, or says why not. Leaves the weights as they were."""
        model, changes = self.skeleton.model, heads.changes(self.skeleton.model, writer, reader)
        if why := self.unstored(changes):
            return why
        before = watch.seen(run)[1][reader].wrote
        kept = {name: model.get_parameter(name).data for name in changes}
        for name, value in kept.items():
            model.get_parameter(name).data = exactly(changes[name], value)
        got, calls = watch.seen(run)
        for name, value in kept.items():
            model.get_parameter(name).data = value
        worst = max(off(calls[reader].wrote, before), off(first_tensor(got), output))
        if worst > TOLERANCE:
            return f"turned in heads of {heads.width}, outputs change by {worst:.1g} of the largest"
        self.between = _merged(self.between, changes)
        return None

    def proof(
        self, expected: Sequence[Tensor], between: dict[str, list[Change]], turning: dict[str, list[Change]], turn: Any
    ) -> str | None:
        """Runs the whole model with all changes; why it is not the same function. `turn`: the stream's rotation."""
        changes, skeleton = _merged(between, turning), self.skeleton
        outside, head = outside_blocks(skeleton, self.chain)
        skeleton.change = Folded(changes, packed=frozenset(changes))
        try:
            skeleton.load(outside)
            previous, why = None, None
            with Replay(skeleton.model, self.chain) as replay:
                for index, name in enumerate(self.chain):
                    names = skeleton.names_under(name)
                    skeleton.load(names)
                    previous = replay.output(index, self.batch, previous)
                    skeleton.unload(names)
                    why = why or _said(name, off(first_tensor(previous), turn(expected[index])))
                    if why:
                        break
                if not why:
                    skeleton.load(head)
                    result = first_tensor(replay.head(self.batch, previous))
                    why = _said("the head", off(result, expected[-1]))
        finally:
            skeleton.change = None
            skeleton.unload(skeleton.names_under(""))
        return why

    def unstored(self, changes: Mapping[str, Any]) -> str | None:
        """Why a changed parameter could not be written."""
        for name in changes:
            if self.dtype(name) is None:
                return f"{name} is stored together with others or in another form"
        return None

    def dtype(self, name: str) -> torch.dtype | None:
        """What a parameter is stored in; None if it is not one stored tensor of floats."""
        key = self.skeleton.alone(self.skeleton.copies.get(name, name))
        return None if key is None else STORED[self.skeleton.source.entries[key].dtype]


def _merged(first: Mapping[str, list[Change]], second: Mapping[str, list[Change]]) -> dict[str, list[Change]]:
    return {name: [*first.get(name, []), *second.get(name, [])] for name in {**first, **second}}


def _said(where: str, share: float) -> str | None:
    what = f"{where or 'the model'}: its output changes by {share:.1g} of the largest value"
    return None if share <= TOLERANCE else f"{what}; something else than linears behind norms reads or writes it"
