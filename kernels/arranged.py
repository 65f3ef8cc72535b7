"""Any packed weight in kernel order: which tensors hold it, and the weight they make.

The codes are arranged as `order.py`, `trellis_order.py` and `codebook_order.py` tell; what a layout puts around them
stays as it is stored. Only the signs of a rotation do not: where a side is rotated they are int8 +-1 `[n]`, so that a
product neither unpacks them nor asks the GPU whether there are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.kernels import codebook_order, order, trellis_order
from quant.kernels.counters import stock
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.order import Arranged
from quant.kernels.packed import Packed, PackedAround
from quant.kernels.promise import Around
from quant.kernels.reference import Weight
from quant.kernels.rotated import PackedRotated
from quant.kernels.scales import scale_table
from quant.kernels.smoothed import PackedSmoothed
from quant.kernels.spec import Codebook, LowRank, Rotated, Smoothed, Spec, Trellis, Uniform
from quant.kernels.trellis_order import ArrangedTrellis

ORDERS: dict[type[Spec], Any] = {Uniform: order, Trellis: trellis_order, Codebook: codebook_order}
"""The module that tells the kernel order of codes; what has none stays as the checkpoint has it."""


def has_order(spec: Spec) -> bool:
    return type(spec.core) in ORDERS


def kernel_order(packed: Packed, begin: int, end: int) -> dict[str, Tensor]:
    """The tensors that hold rows `begin` to `end` in kernel order, under the names of the spec's tensors."""
    if not isinstance(packed, PackedAround):
        return ORDERS[type(packed.spec)].arrange(packed, begin, end).tensors()
    if isinstance(packed, PackedLowRank):
        own = {"lora_a": packed.lora_a, "lora_b": packed.lora_b[begin:end]}
    elif isinstance(packed, PackedSmoothed):
        own = {"smooth": packed.smooth}
    else:
        assert isinstance(packed, PackedRotated)
        own = packed.spread(begin, end)
    return {**kernel_order(packed.base, begin, end), **own}


def ready(device: torch.device) -> None:
    """Makes what launches on a GPU share for as long as the process lives: once the graphs of
    `torch.compile(mode="reduce-overhead")` are made, nothing may be allocated that outlasts them."""
    if device.type == "cuda":
        stock(device)
        scale_table(device)


def weight_of(spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Weight:
    """The weight that `kernel_order`'s tensors hold."""
    if isinstance(spec, Uniform):
        return Arranged(spec, shape, tensors["weight"], tensors["scales"], tensors.get("zeros"))
    if isinstance(spec, Trellis):
        return ArrangedTrellis(spec, shape, **{name: tensors[name] for name in spec.tensors(shape)})
    if isinstance(spec, Codebook):
        return codebook_order.weight_of(spec, shape, tensors)
    return _around(weight_of, spec, shape, tensors)


def checkpoint_order(spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Packed:
    """The inverse of `kernel_order`, bit for bit."""
    if not isinstance(spec, Around):
        return ORDERS[type(spec)].plain(weight_of(spec, shape, tensors))
    around = _around(checkpoint_order, spec, shape, tensors)
    return around.gathered() if isinstance(around, PackedRotated) else around


def _around(inside: Any, spec: Spec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Packed:
    """A wrapper around what `inside` makes of its base."""
    assert isinstance(spec, LowRank | Rotated | Smoothed)
    base = inside(spec.base, shape, tensors)
    if isinstance(spec, LowRank):
        return PackedLowRank(spec, shape, base, tensors["lora_a"], tensors["lora_b"])
    if isinstance(spec, Smoothed):
        return PackedSmoothed(spec, shape, base, tensors["smooth"])
    return PackedRotated(
        spec, shape, base, tensors["rotation"], tensors["input_signs"], tensors.get("output_signs"), in_order=True
    )


def is_arranged(tensors: Mapping[str, Tensor]) -> bool:
    """Whether they are in kernel order."""
    return tensors["weight"].dtype == torch.int32
