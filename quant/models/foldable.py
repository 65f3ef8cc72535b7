"""Finds which rotations can be folded into a model's weights (`models/folding.py`), and proves each: no list of models.

The float model runs in float32 on one short batch, a block in memory at a time. What it does says what may be folded:

- a linear's outputs are replaced by the numbers of their channels, the same for all tokens. Attention weights sum to
  one, so where another linear then reads whole numbers, it reads those channels. Replaced by one random number per
  token, channels of one head read the same, of two heads not: the heads of values and queries, grouped or fused.
- a norm whose output linears read, as wide as the stream, is an RMS norm if a rotation passes through it.

Then it is done, and must change nothing: 1e-4 of the largest value, of each pair's outputs, of each block's outputs
(turned, where the stream is) and of the logits. What does not hold is left, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.batch import moved
from quant.calibration.replay import Replay
from quant.models.candidates import is_linear
from quant.models.folding import Change, Constant, Folded, Folding, Turn, exactly, rotation
from quant.models.heads import Call, Heads, Watch, heads, inputs_of
from quant.models.skeleton import Skeleton
from quant.models.source import STORED
from quant.models.stream import first_tensor, outside_blocks

TOLERANCE = 1e-4
STREAM = "the stream"


@dataclass
class Stream:
    """What reads and writes the stream. `gains`: of each norm's parameter, with the value that stands for a gain of 1;
    `readers`: of linears, with the norm that they read. `called`: all modules. `reason`: why it cannot be turned."""

    gains: dict[str, tuple[Tensor, float]] = field(default_factory=dict[str, tuple[Tensor, float]])
    readers: dict[str, str] = field(default_factory=dict[str, str])
    writers: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    called: set[str] = field(default_factory=set[str])
    reason: str = ""

    def look(self, calls: Mapping[str, Call], width: int, writing: bool) -> None:
        """`writing`: whether linears among the calls that read no norm may write to the stream."""
        linears = {name: call for name, call in calls.items() if is_linear(call.module)}
        self.called |= calls.keys()
        for name, call in calls.items():
            parameters = dict(call.module.named_parameters())
            if name in linears or call.wrote.shape[-1] != width or any(p.dim() != 1 for p in parameters.values()):
                continue
            place = call.wrote.untyped_storage().data_ptr()
            readers = [n for n, one in linears.items() if one.read.untyped_storage().data_ptr() == place]
            found = gain(call.module, parameters, call.read) if parameters and readers else None
            if isinstance(found, str):
                self.reason = self.reason or f"{name} ({type(call.module).__name__}): {found}"
            elif found is not None:
                norm = f"{name}.{next(iter(parameters))}"
                self.gains[norm] = found
                self.readers |= dict.fromkeys(readers, norm)
        for name, call in calls.items() if writing else ():
            writes = name in linears or isinstance(call.module, nn.Embedding)
            if writes and call.wrote.shape[-1] == width and name not in self.readers:
                self.writers[name] = call.module

    def changes(self, model: nn.Module, width: int, tied: Mapping[str, str]) -> dict[str, list[Change]]:
        """Of each parameter; none, with a reason, where they cannot be made."""
        block, signs = rotation(width)
        writers = {f"{name}.weight": module for name, module in self.writers.items()}
        kept = {norm: unit for norm, (_, unit) in self.gains.items()}
        changes: dict[str, list[Change]] = {}
        for name, norm in self.readers.items():
            weight, gains = f"{name}.weight", self.gains[norm][0]
            if tied.get(weight, weight) not in {tied.get(one, one) for one in writers}:
                changes[weight] = [Turn(inputs_of(model.get_submodule(name)), block, signs, gain=gains)]
                continue
            kept.pop(norm, None)
            if not bool(((gains - gains[0]).abs() <= 1e-6 * gains[0].abs()).all()):
                self.reason = (
                    f"{name} is tied to the embedding, and the norm before it has gains that only an untied one could "
                    "take over; folding.untie=true stores it on its own"
                )
        for weight, module in writers.items():
            dim = 1 if isinstance(module, nn.Embedding) else 1 - inputs_of(module)
            changes[tied.get(weight, weight)] = [Turn(dim, block, signs)]
            if getattr(module, "bias", None) is not None:
                changes[f"{weight.removesuffix('weight')}bias"] = [Turn(0, block, signs)]
        changes |= {norm: [Constant(unit)] for norm, unit in kept.items()}
        idle = [
            n
            for n, m in model.named_modules()
            if (is_linear(m) or isinstance(m, nn.Embedding)) and n not in self.called
        ]
        if idle:
            self.reason = self.reason or f"{idle[0]} was not called by the tokens that it would be proven on"
        if not self.gains:
            self.reason = self.reason or "no norm as wide as it was seen that linears read"
        if block == 1:
            self.reason = self.reason or f"there is no Hadamard matrix for its {width} channels"
        return {} if self.reason else changes


def gain(module: nn.Module, parameters: Mapping[str, nn.Parameter], x: Tensor) -> tuple[Tensor, float] | str:
    """The gains of an RMS norm `[n]`, and its parameter's value for a gain of 1; or why it is none."""
    if len(parameters) != 1:
        return "a norm with more than gains; a rotation cannot pass it"
    weight = next(iter(parameters.values()))
    width, kept = x.shape[-1], weight.data
    block, signs = rotation(width)

    def at(value: float, given: Tensor) -> Tensor:
        weight.data = torch.full_like(kept, value)
        try:
            return module(given)
        finally:
            weight.data = kept

    unit = 0.0 if bool(at(0.0, x).any()) else 1.0  # some norms multiply by 1 + weight
    plain, gains = at(unit, x), kept.float() + (1.0 - unit)
    turn = Turn(-1, block, signs)
    if weight.shape != (width,) or _off(module(x), plain * gains) > TOLERANCE:
        return "its parameter is no gain"
    if _off(at(unit, turn(x)), turn(plain)) > TOLERANCE:
        return "no RMS norm: what it does to a rotated input is not the rotation of what it does (it subtracts a mean?)"
    return gains, unit


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
    if turning and (why := search.proof(expected, width, search.between, turning)):
        turning, stream.reason = {}, why
    if search.between and not turning and (why := search.proof(expected, width, search.between, {})):
        search.folded.left |= dict.fromkeys(search.folded.said, why)
        search.folded.said, search.between = {}, {}
    folded = search.folded
    folded.changes = _merged(search.between, turning)
    folded.dtypes = {name: d for name in folded.changes if (d := search.dtype(name)) is not None}
    if not search.between:
        folded.turned.clear()
    if turning:
        folded.untied = untied
        folded.turned |= {name for name in stream.readers if f"{name}.weight" in turning}
        folded.said[STREAM] = (
            f"{width} channels, {len(stream.writers)} modules write to it, {len(stream.readers)} read it behind "
            f"{len(stream.gains)} norms"
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
        off = max(_off(calls[reader].wrote, before), _off(first_tensor(got), output))
        if off > TOLERANCE:
            return f"turned in heads of {heads.width}, outputs change by {off:.1g} of the largest"
        self.between = _merged(self.between, changes)
        return None

    def proof(
        self, expected: Sequence[Tensor], width: int, between: dict[str, list[Change]], turning: dict[str, list[Change]]
    ) -> str | None:
        """Runs the whole model with all changes; why it is not the same function."""
        changes, skeleton = _merged(between, turning), self.skeleton
        turn = Turn(-1, *rotation(width)) if turning else lambda x: x
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
                    why = why or _said(name, _off(first_tensor(previous), turn(expected[index])))
                    if why:
                        break
                if not why:
                    skeleton.load(head)
                    result = first_tensor(replay.head(self.batch, previous))
                    why = _said("the head", _off(result, expected[-1]))
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
        skeleton = self.skeleton
        name = skeleton.copies.get(name, name)
        keys = [key for key, targets in skeleton.targets.items() if name in targets]
        plain = len(keys) == 1 and keys[0] not in skeleton.converted and len(skeleton.targets[keys[0]]) == 1
        return STORED.get(skeleton.source.entries[keys[0]].dtype) if plain else None


def _merged(first: Mapping[str, list[Change]], second: Mapping[str, list[Change]]) -> dict[str, list[Change]]:
    return {name: [*first.get(name, []), *second.get(name, [])] for name in {**first, **second}}


def _off(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    off = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return float(off.nan_to_num(nan=float("inf")))


def _said(where: str, off: float) -> str | None:
    what = f"{where or 'the model'}: its output changes by {off:.1g} of the largest value"
    return None if off <= TOLERANCE else f"{what}; something else than linears behind norms reads or writes it"
