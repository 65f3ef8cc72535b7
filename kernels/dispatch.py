"""Which kernel multiplies: an ordered table, the first row that accepts the real arguments wins.

A row refuses with a reason in words, so `explain(x, packed)` can say why the fast ones were passed over. The
environment variable `BITWRIGHT_KERNEL` names the one row to use; if that row refuses, its reason is the error.

A weight whose spec says that activations have 8 bits is multiplied by the rows that round them (`triton-int8`,
`torch-int8`), and by no other. Naming `triton-int8` makes other weights on uniform grids round them too.

Under autocast `x` is cast as `torch.nn.functional.linear` would cast it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.kernels import codebook_launch, integer, integer_launch, launch, reference, trellis_launch
from quant.kernels.available import missing, transformed
from quant.kernels.codebook_order import ArrangedCodebook
from quant.kernels.layouts import PackedUniform
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.order import Arranged
from quant.kernels.reference import Weight
from quant.kernels.rotated import PackedRotated
from quant.kernels.smoothed import PackedSmoothed
from quant.kernels.trellis_order import ArrangedTrellis

VARIABLE = "BITWRIGHT_KERNEL"


class KernelError(RuntimeError):
    """No kernel, or not the forced one, takes these arguments."""


@dataclass(frozen=True)
class Kernel:
    """One row: `refuses(x, packed)` is None where it accepts, else the reason; `run(x, packed, bias)` multiplies."""

    name: str
    refuses: Callable[[Tensor, Weight], str | None]
    run: Callable[[Tensor, Any, Tensor | None], Tensor]


def _rounds(packed: Weight) -> bool:
    return isinstance(packed, PackedUniform | Arranged) and packed.spec.activations == 8


def _exact(refuses: Callable[[Tensor, Any], str | None]) -> Callable[[Tensor, Any], str | None]:
    """Why a row that takes inputs as they are refuses."""
    return lambda x, packed: ROUNDS if _rounds(packed) else refuses(x, packed)


def _torch_int8_refuses(x: Tensor, packed: Weight) -> str | None:
    return _anywhere(x, packed) if _rounds(packed) else "the weight takes its inputs as they are"


def _anywhere(x: Tensor, packed: Weight) -> str | None:
    if x.device != packed.device:
        return f"x is on {x.device}, the weight on {packed.device}"
    return None if x.is_floating_point() else f"x is {x.dtype}, not floating-point"


def _row(kind: type[Any], refuses: Callable[[Tensor, Any], str | None]) -> Callable[[Tensor, Weight], str | None]:
    """Why a row for weights of one kind refuses."""
    return lambda x, packed: refuses(x, packed) if isinstance(packed, kind) else _disorder(x, packed)


def _int8_refuses(x: Tensor, packed: Arranged) -> str | None:
    if not _rounds(packed) and os.environ.get(VARIABLE) != "triton-int8":
        return f"it rounds x to 8 bits, and runs only where {VARIABLE}=triton-int8 asks for it"
    return integer_launch.refuses(x, packed)


def _disorder(x: Tensor, packed: Weight) -> str:
    """Why a weight is not what a row multiplies by."""
    for kind, name in ORDERED.items():
        if isinstance(packed, kind):
            return f"the weight is {name}"
    reason = missing(x) if x.is_cuda else None
    return reason or 'the weight is not in kernel order; quant.load(device="cuda") and model.to("cuda") put it there'


ROUNDS = "the weight's inputs are rounded to 8 bits, which triton-int8 and torch-int8 do"
ORDERED = {Arranged: "a uniform grid", ArrangedTrellis: "a trellis", ArrangedCodebook: "a codebook"}

KERNELS: tuple[Kernel, ...] = (
    Kernel("triton", _row(Arranged, _exact(launch.refuses)), launch.matmul),
    Kernel("triton-trellis", _row(ArrangedTrellis, trellis_launch.refuses), trellis_launch.matmul),
    Kernel("triton-codebook", _row(ArrangedCodebook, codebook_launch.refuses), codebook_launch.matmul),
    Kernel("torch", _exact(_anywhere), reference.matmul),
    Kernel("triton-int8", _row(Arranged, _int8_refuses), integer_launch.matmul),
    Kernel("torch-int8", _torch_int8_refuses, integer.matmul),
)


def matmul(x: Tensor, packed: Weight, bias: Tensor | None = None) -> Tensor:
    """`x` `[..., in]` times the packed weight `[out, in]` transposed, plus `bias`. Raises `KernelError` if no row
    accepts. Of a rotated or smoothed weight the activations are rotated or multiplied first, and its base looks for a
    row.
    """
    if isinstance(packed, PackedSmoothed):
        return matmul(packed.inputs(_autocast(x)), packed.base, bias)
    if isinstance(packed, PackedLowRank):
        x = _autocast(x)
        return matmul(x, packed.base, bias).add(packed.branch(x))
    if isinstance(packed, PackedRotated):
        inside = None if packed.outputs().signs is not None else bias
        out = packed.outputs().undo(_turned(x, packed, inside))
        return out if bias is inside else out + bias.to(out.dtype)
    x = _autocast(x)
    run = select(x, packed).run
    if not transformed():
        return run(x, packed, bias)
    out = reference.straight_through(x, packed, lambda x: run(x, packed, None))
    return out if bias is None else out + bias.to(out.dtype)


def _turned(x: Tensor, packed: PackedRotated, bias: Tensor | None) -> Tensor:
    """`x` rotated, times the base: the trellis's kernel does both."""
    base, plain = packed.base, _wanted(x) == x.dtype and not transformed()
    if plain and isinstance(base, ArrangedTrellis) and select(x, base).run is trellis_launch.matmul:
        return trellis_launch.matmul(x, base, bias, packed.inputs())
    return matmul(packed.inputs().apply(x), base, bias)


def _autocast(x: Tensor) -> Tensor:
    """What autocast makes of the input of a product."""
    return x.to(_wanted(x))


def _wanted(x: Tensor) -> torch.dtype:
    """Any float but float64 is cast to autocast's dtype."""
    kind, casts = x.device.type, x.is_floating_point() and x.dtype != torch.float64
    casts = casts and _may_autocast(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else x.dtype


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 does not know the function that it asks
def _may_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _codes(packed: Weight) -> Weight:
    while isinstance(packed, PackedRotated | PackedLowRank | PackedSmoothed):
        packed = packed.base
    return packed


def select(x: Tensor, packed: Weight) -> Kernel:
    """The row that will run."""
    x, packed = _autocast(x), _codes(packed)
    for kernel in _candidates():
        if kernel.refuses(x, packed) is None:
            return kernel
    raise KernelError(f"no kernel takes these arguments:\n{explain(x, packed)}")


def explain(x: Tensor, packed: Weight) -> str:
    """One line per row of the table: which one runs, which also accept, and why the others refuse. Of a weight with a
    rotation or a branch around it, for its codes."""
    x, packed = _autocast(x), _codes(packed)
    forced, lines, chosen = os.environ.get(VARIABLE), list[str](), False
    for kernel in KERNELS:
        if forced and kernel.name != forced:
            lines.append(f"{kernel.name}: passed over, {VARIABLE}={forced}")
            continue
        reason = kernel.refuses(x, packed)
        lines.append(f"{kernel.name}: " + (f"refuses, {reason}" if reason else "also accepts" if chosen else "runs"))
        chosen = chosen or reason is None
    return "\n".join(lines)


def _candidates() -> tuple[Kernel, ...]:
    forced = os.environ.get(VARIABLE)
    named = tuple(kernel for kernel in KERNELS if not forced or kernel.name == forced)
    if not named:
        raise KernelError(f"{VARIABLE}={forced!r} names no kernel; there are: {', '.join(k.name for k in KERNELS)}")
    return named
