"""A model of any size that weighs nothing: each weight is one row, repeated, and each product answers with noise.

The noise is seeded by the matrix's name and the bytes of its input. So every result still depends on every input, the
same input gives the same result bit for bit, and what a pass would do with real weights can be proven without any.
Everything runs on the CPU, where no sum depends on the order of threads.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from quant.calibration.replay import instead
from quant.models.structure import owner_of


@contextmanager
def weightless(model: nn.Module) -> Generator[dict[str, str]]:
    """On the CPU, in eval mode, each parameter one row of seeded numbers, repeated. Yields each one's first name."""
    made: dict[int, nn.Parameter] = {}
    first_name: dict[str, str] = {}
    names: dict[int, str] = {}

    def put(name: str, value: nn.Parameter) -> None:
        owner, leaf = owner_of(model, name)
        owner._parameters[leaf] = value

    with ExitStack() as back:
        for name, old in dict(model.named_parameters(remove_duplicate=False)).items():
            first_name[name] = names.setdefault(id(old), name)
            if id(old) not in made:
                made[id(old)] = nn.Parameter(_row(first_name[name], old).expand(old.shape), requires_grad=False)
            back.callback(put, name, old)
            put(name, made[id(old)])
        for part in model.modules():
            for key, x in part._buffers.items():
                if x is not None:
                    back.callback(part._buffers.__setitem__, key, x)
                    part._buffers[key] = (
                        torch.zeros_like(x, device="cpu") if x.device.type == "meta" else x.cpu().clone()
                    )
            if part.training:
                back.enter_context(instead(part, "training", False))
        yield first_name


def _row(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Numbers from 0.5 to 1.5: a norm or a learned gate of zeros would hide what flows through it."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.rand(parameter.shape[-1:], generator=generator) + 0.5).to(parameter.dtype)


def noise(name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A normal tensor of the shape of `x @ weight` that only `name` and the bytes of `x` decide."""
    if weight.dim() == 2 or x.dim() == 1:
        shape = (*weight.shape[:-2], *x.shape[:-1], weight.shape[-1])
    else:
        shape = (*torch.broadcast_shapes(x.shape[:-2], weight.shape[:-2]), x.shape[-2], weight.shape[-1])
    generator = torch.Generator().manual_seed(zlib.crc32(_bytes(x).numpy().data, zlib.crc32(name.encode())))
    return torch.randn(shape, generator=generator).to(x.dtype)


def same(got: Any, expected: Any) -> bool:
    """Whether the tensors in two nests are equal bit for bit."""
    a = [x for x in pytree.tree_leaves(got) if isinstance(x, torch.Tensor)]
    b = [x for x in pytree.tree_leaves(expected) if isinstance(x, torch.Tensor)]
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(_bytes(x), _bytes(y))
        for x, y in zip(a, b, strict=True)
    )


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1).contiguous().view(torch.uint8)
