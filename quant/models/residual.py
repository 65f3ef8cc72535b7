"""What reads and writes the stream that all blocks add to, and the norms that it passes on the way to its readers.

A rotation passes an RMS norm without its gains; one that leaves a vector of ones passes a LayerNorm too. Gains go into
the linears that read the norm; a bias stays, divided by them, as it is added to what was turned: where that makes it
much larger than what it is added to, its rounding would outweigh the rest (`models/foldable.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quant.models.folding import Change, Constant, Turn, rotation
from quant.models.heads import Call, inputs_of
from quant.models.structure import is_linear

TOLERANCE = 1e-4  # of the largest value: what a change may change
LARGEST_BIAS = 4.0  # root mean square; what it is added to has 1. A small OPT is then 1.5 % off in bfloat16


@dataclass(frozen=True, eq=False)
class Norm:
    """`leaf`: the parameter of the `gains` `[n]`, and `unit`, its value for a gain of 1. `biased`: it adds a bias.
    `centred`: it subtracts the mean."""

    leaf: str
    gains: Tensor
    unit: float
    biased: bool
    centred: bool


def norm_of(module: nn.Module, parameters: dict[str, nn.Parameter], x: Tensor) -> Norm | str:
    """What a module is that reads `x`; or why a rotation cannot pass through it."""
    bias = parameters.pop("bias", None)
    if len(parameters) != 1:
        return "no norm of gains and a bias"
    leaf, weight = next(iter(parameters.items()))
    values = {parameter: parameter.data for parameter in (weight, bias) if parameter is not None}

    def at(value: float, given: Tensor) -> Tensor:
        for parameter, data in values.items():
            parameter.data = torch.full_like(data, value if parameter is weight else 0.0)
        try:
            return module(given)
        finally:
            for parameter, data in values.items():
                parameter.data = data

    unit = 0.0 if bool(at(0.0, x).any()) else 1.0  # some norms multiply by 1 + weight
    plain, gains = at(unit, x), weight.data.float() + (1.0 - unit)
    if (
        weight.shape != x.shape[-1:]
        or off(module(x), plain * gains + (0.0 if bias is None else values[bias])) > TOLERANCE
    ):
        return "no norm of gains and a bias"
    if bias is not None and not float((values[bias].float() / gains).square().mean().sqrt()) <= LARGEST_BIAS:
        return "its gains are too small to divide its bias by"
    for centred in (False, True):
        turn = Turn(-1, *rotation(x.shape[-1]), even=centred)
        if off(at(unit, turn(x)), turn(plain)) <= TOLERANCE:
            return Norm(leaf, gains, unit, bias is not None, centred)
    return "a rotation cannot pass through it"


@dataclass
class Stream:
    """What reads and writes the stream. `norms`: by name; `readers`: of linears, with the norm that they read.
    `called`: all modules. `reason`: why it cannot be turned."""

    norms: dict[str, Norm] = field(default_factory=dict[str, Norm])
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
            found = norm_of(call.module, parameters, call.read) if parameters and readers else None
            if isinstance(found, str):
                self.reason = self.reason or f"{name} ({type(call.module).__name__}): {found}"
            elif found is not None:
                self.norms[name] = found
                self.readers |= dict.fromkeys(readers, name)
        for name, call in calls.items() if writing else ():
            writes = name in linears or isinstance(call.module, nn.Embedding)
            if writes and call.wrote.shape[-1] == width and name not in self.readers:
                self.writers[name] = call.module

    def turn(self, width: int, dim: int = -1, gain: Tensor | None = None) -> Turn:
        """The stream's rotation of a dimension."""
        return Turn(dim, *rotation(width), gain=gain, even=any(norm.centred for norm in self.norms.values()))

    def changes(self, model: nn.Module, width: int, tied: Mapping[str, str]) -> dict[str, list[Change]]:
        """Of each parameter; none, with a reason, where they cannot be made."""
        writers = {f"{name}.weight": module for name, module in self.writers.items()}
        kept = dict(self.norms)
        changes: dict[str, list[Change]] = {}
        for name, norm in self.readers.items():
            weight, gains = f"{name}.weight", self.norms[norm].gains
            if tied.get(weight, weight) not in {tied.get(one, one) for one in writers}:
                changes[weight] = [self.turn(width, inputs_of(model.get_submodule(name)), gains)]
                continue
            kept.pop(norm, None)
            if not bool(((gains - gains[0]).abs() <= 1e-6 * gains[0].abs()).all()):
                self.reason = (
                    f"{name} is tied to the embedding, and the norm before it has gains that only an untied one could "
                    "take over; folding.untie=true stores it on its own"
                )
        for weight, module in writers.items():
            dim = 1 if isinstance(module, nn.Embedding) else 1 - inputs_of(module)
            changes[tied.get(weight, weight)] = [self.turn(width, dim)]
            if getattr(module, "bias", None) is not None:
                changes[f"{weight.removesuffix('weight')}bias"] = [self.turn(width, 0)]
        for name, norm in self.norms.items():
            if name in kept:
                changes[f"{name}.{norm.leaf}"] = [Constant(norm.unit)]
            if norm.biased:
                changes[f"{name}.bias"] = [self.turn(width, 0, 1 / norm.gains if name in kept else None)]
        idle = [
            n
            for n, m in model.named_modules()
            if (is_linear(m) or isinstance(m, nn.Embedding)) and n not in self.called
        ]
        if idle:
            self.reason = self.reason or f"{idle[0]} was not called by the tokens that it would be proven on"
        if not self.norms:
            self.reason = self.reason or "no norm as wide as it was seen that linears read"
        if rotation(width)[0] == 1:
            self.reason = self.reason or f"there is no Hadamard matrix for its {width} channels"
        return {} if self.reason else changes


def off(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    share = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return float(share.nan_to_num(nan=float("inf")))
