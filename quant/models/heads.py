"""Which channels one linear writes and another reads through a linear map that keeps them apart, and in which heads.

Two probes of a block in memory tell, whatever the attention around it looks like (`models/foldable.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from quant.models.folding import Change, Turn, rotation

SAME_HEAD = 1e-5  # of what two channels of one head read of numbers of size 1: sums of equal terms
WHOLE = 0.2  # from a whole number: weights that sum to one within roundoff, times the number of channels


@dataclass(frozen=True, eq=False)
class Call:
    """What a module without children read and wrote."""

    module: nn.Module
    read: Tensor
    wrote: Tensor


class Watch(ExitStack):
    """A context that notes the calls of modules without children, in order. `answers`: what linears write instead."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}
        self.answers: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                self.enter_context(module.register_forward_hook(partial(self._note, name)))

    def _note(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return None
        output = self.answers[name](output) if name in self.answers else output
        self.calls[name] = Call(module, args[0], output)
        return output

    def seen(self, run: Callable[[], Any]) -> tuple[Any, dict[str, Call]]:
        """What `run` gives, and the calls that it made."""
        self.calls = {}
        result = run()
        return result, self.calls


@dataclass(frozen=True, eq=False)
class Heads:
    """`width` channels each. `places` `[n]`: those of the writer's, head by head. `reads` `[in]`: which of them, as an
    index into `places`, each channel of the reader's is."""

    width: int
    places: Tensor
    reads: Tensor

    def changes(self, model: nn.Module, writer: str, reader: str) -> dict[str, list[Change]]:
        """Of the weights of both, and the writer's bias."""
        block, signs = rotation(self.width, len(self.places))
        module: Any = model.get_submodule(writer)
        outputs = Turn(1 - inputs_of(module), block, signs, self.places)
        changes: dict[str, list[Change]] = {
            f"{writer}.weight": [outputs],
            f"{reader}.weight": [Turn(inputs_of(model.get_submodule(reader)), block, signs[self.reads])],
        }
        return changes if module.bias is None else {**changes, f"{writer}.bias": [Turn(0, block, signs, self.places)]}


def inputs_of(linear: nn.Module) -> int:
    """The dimension of a linear's weight that runs along its inputs."""
    return 1 if isinstance(linear, nn.Linear) else 0


def heads(watch: Watch, run: Callable[[], Any], writer: str, readers: Sequence[str]) -> dict[str, Heads | str]:
    """Of all `readers` that read channels of `writer`: the heads, or why there are none to turn."""
    numbers = lambda y: _numbered(y.shape[-1], y.device).to(y.dtype).expand_as(y).clone()  # noqa: E731
    calls = _answered(watch, run, writer, numbers)
    maps = {name: found for name in readers if name in calls and (found := _channels(calls[name].read)) is not None}
    result: dict[str, Heads | str] = {}
    for reader, channels in maps.items():
        read = torch.unique(channels)

        def spread(y: Tensor, read: Tensor = read) -> Tensor:
            y, generator = y.clone(), torch.Generator().manual_seed(0)
            y[..., read.to(y.device)] = torch.rand(y.shape[:-1], generator=generator).to(y)[..., None]
            return y

        seen = _answered(watch, run, writer, spread)[reader].read
        result[reader] = _heads(channels, seen.flatten(0, -2).float().cpu())
    return result


def _answered(watch: Watch, run: Callable[[], Any], writer: str, answer: Callable[[Tensor], Tensor]) -> dict[str, Call]:
    watch.answers = {writer: answer}
    try:
        return watch.seen(run)[1]
    finally:
        watch.answers = {}


def _numbered(n: int, device: Any) -> Tensor:
    """1, -2, 3, ...: no activation function leaves both signs as they are."""
    c = torch.arange(n, device=device)
    return (c + 1) * (1 - 2 * (c % 2))


def _channels(read: Tensor) -> Tensor | None:
    """The channel whose number each input is, for all tokens; None if one is not."""
    rows = read.flatten(0, -2).float().cpu()
    whole = rows[0].round()
    if not bool(((rows - whole).abs() <= WHOLE).all()) or not bool(whole.all()):
        return None
    channels = whole.abs().long() - 1
    return channels if torch.equal(_numbered(int(channels.max()) + 1, "cpu")[channels], whole.long()) else None


def _heads(channels: Tensor, seen: Tensor) -> Heads | str:
    """`channels` `[in]`, `seen` `[tokens, in]`: what each input is of numbers that differ from token to token."""
    apart = (seen[:, 1:] - seen[:, :-1]).abs().amax(0) > SAME_HEAD
    apart |= channels[1:] != channels[:-1] + 1
    bounds = [0, *(apart.nonzero().flatten() + 1).tolist(), len(channels)]
    widths = {stop - start for start, stop in pairwise(bounds)}
    starts = torch.unique(channels[bounds[:-1]])
    width = min(widths)
    if len(widths) > 1 or bool((starts[1:] - starts[:-1] < width).any()):
        return f"heads of {', '.join(map(str, sorted(widths)))} channels; equal ones side by side are needed"
    if rotation(width)[0] == 1:
        return f"there is no Hadamard matrix for heads of {width} channels"
    places = (starts[:, None] + torch.arange(width)).flatten()
    return Heads(width, places, torch.searchsorted(places, channels))
