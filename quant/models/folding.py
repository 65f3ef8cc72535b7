"""Rotations folded into the weights around them: incoherence that costs nothing at run time.

`Rotated` turns the inputs of a linear while the model runs. Two kinds of input can be turned beforehand, by changing
stored weights alone, and the model stays the same function up to rounding:

    between linears   what one linear writes and another reads through a linear map that keeps channels apart: values
                      through attention. v' = A v and o' = o A^T, head by head      (SpinQuant's R2, arXiv 2405.16406)
    the stream        what every block adds to. Gains of RMS norms move into the linears that read them, embeddings and
                      all that writes to the stream are turned on their output side, all readers and the head on their
                      input side                                                   (QuaRot, arXiv 2404.00456, section 4)

`A = H diag(signs)` as in `kernels/hadamard.py`, in the largest blocks there are; where norms subtract the mean,
`A = H^T diag(signs) H` with a first sign of 1 in each block: `H` takes a vector of ones to its first entry, so that `A`
leaves it as it is. A norm's bias stays, divided by the gains and turned. What can be folded is found and proven
by `models/foldable.py`. A `Folded` is a function of a parameter's name and its values, so one block of the model is in
memory at a time, and what is written is what was computed with. A parameter that stays float is rounded to the dtype
that it is stored in: the folded float model is a checkpoint of the same dtypes and, but for an untied head, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant.errors import SettingsError
from quant.kernels.hadamard import block_for, hadamard, random_signs
from quant.models.source import Source

LARGEST = 2048  # block of a folded rotation: its size costs nothing


@dataclass(frozen=True)
class Folding:
    """What a recipe asks for. Linears are turned between each other wherever that is proven. `stream`: the stream too.
    `untie`: a head tied to the embedding, which stands in the way, is stored on its own. `online`: whether inputs that
    come turned may be rotated once more at run time, where a spec rotates and loses less that way."""

    stream: bool = True
    untie: bool = False
    online: bool = True

    def __post_init__(self) -> None:
        if self.untie and not self.stream:
            raise SettingsError("folding.untie makes room for the rotation of the stream; set folding.stream too")


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation of one dimension of a parameter, or of its entries at `places` `[n]`, by blocks of `block`: `signs`
    int8 `[n]`. `gain` float32 `[n]`: what they are multiplied by before it. `even`: it leaves a vector of ones."""

    dim: int
    block: int
    signs: Tensor
    places: Tensor | None = None
    gain: Tensor | None = None
    even: bool = False

    def __call__(self, value: Tensor) -> Tensor:
        last = value.movedim(self.dim, -1)
        part = last if self.places is None else last[..., self.places.to(value.device)]
        part = part if self.gain is None else part * self.gain.to(part)
        part, signs = part.contiguous(), self.signs.to(value.device)
        if self.even:
            signs = signs.clone()
            signs[:: self.block] = 1
            part = hadamard(hadamard(part, self.block) * signs, self.block, inverse=True)
        else:
            part = hadamard(part, self.block, signs)
        if self.places is not None:
            last = last.clone()
            last[..., self.places.to(value.device)] = part
            part = last
        return part.movedim(-1, self.dim).contiguous()


@dataclass(frozen=True)
class Constant:
    """A parameter of one value: the gains of a norm that others have taken over."""

    value: float

    def __call__(self, value: Tensor) -> Tensor:
        return torch.full_like(value, self.value)


Change = Turn | Constant


@dataclass
class Folded:
    """`changes`: of each parameter, by its own name (tied ones: the first). `turned`: modules of linears whose inputs
    come rotated. `said`: what is folded; `left`: what is not, with the reason. `dtypes`: that each changed parameter is
    stored in. `packed`: those of them that need no rounding to it, being quantized. `untied`: parameters
    with a tensor of their own from now on, with the name of the tensor that they were tied to."""

    changes: dict[str, list[Change]] = field(default_factory=dict[str, list[Change]])
    turned: set[str] = field(default_factory=set[str])
    said: dict[str, str] = field(default_factory=dict[str, str])
    left: dict[str, str] = field(default_factory=dict[str, str])
    dtypes: dict[str, torch.dtype] = field(default_factory=dict[str, torch.dtype])
    packed: frozenset[str] = frozenset()
    untied: dict[str, str] = field(default_factory=dict[str, str])

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """The values to compute with, for those of the float model; same shape and dtype."""
        if name not in self.changes:
            return value
        found = exactly(self.changes[name], value)
        return (found if name in self.packed else found.to(self.dtypes[name])).to(value.dtype)

    def stored(self, source: Source, key: str, name: str) -> Tensor:
        """The tensor to store for a parameter that stays float, of which the float model stores `key`."""
        return exactly(self.changes.get(name, []), source.tensor(key)).to(self.dtypes[name])

    def to_dict(self) -> dict[str, Any]:
        return {"folded": self.said, "not folded": self.left}


def exactly(changes: list[Change], value: Tensor) -> Tensor:
    """A parameter with its changes applied, in float32 or better."""
    value = value if value.dtype == torch.float64 else value.float()
    for change in changes:
        value = change(value)
    return value


def rotation(width: int, n: int | None = None) -> tuple[int, Tensor]:
    """Block, and signs for `n` channels in heads of `width`; other signs than those of a rotation at run time, which
    may come on top."""
    n = n or width
    return block_for(width, LARGEST), random_signs(n, n + 1)


def stored_anew(
    folded: Folded, targets: dict[str, tuple[str, ...]], tied: dict[str, str]
) -> dict[str, tuple[str, str]]:
    """The float tensors to store anew, packed ones left out: by the name to store each under, the key of the float
    model's tensor that it is made of, and the parameter's name."""
    keys = {tied.get(names[0], names[0]): key for key, names in targets.items() if len(names) == 1}
    found = {key: (key, tied.get(names[0], names[0])) for key, names in targets.items() if len(names) == 1}
    found |= {name: (keys[one], name) for name, one in folded.untied.items() if name not in keys}
    return {key: (old, n) for key, (old, n) in found.items() if n in folded.changes and n not in folded.packed}
