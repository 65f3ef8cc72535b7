"""Which sites of a diffusion transformer read a first token that is always the same and far larger than the others.

Text encoders that begin every prompt with one token give such an embedding, and cross-attention's keys and values read
it (MixDQ, arXiv 2405.17873, section 3.2: 823 where others have 10 to 15). No names are looked at: a site is one if on
calibration inputs the first row of what it reads is one and the same for all samples and `FAR` times longer than any
other. What is done about it stands in `solvers/anchor.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.batch import Batch
from quant.models.walk import Site

FAR = 4.0
SAME = 0.01
"""Of its length: how far first tokens may lie apart, for the rounding of narrow dtypes."""
LOOKED_AT = 4  # batches


def anchored(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], forward: Callable[[Sequence[Batch]], Any]
) -> frozenset[str]:
    """Names of the linears with such a token. `forward` runs the float model on batches; it is not called where no
    argument of all `batches` begins with one and the same token, which is cheap to see."""
    if not _constant_arguments(batches):
        return frozenset()
    seen: dict[str, Tensor | None] = {}  # the token, or None where there is none

    def look(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        c = _first(args[0].float(), seen.get(name))
        seen[name] = None if name in seen and seen[name] is None else c

    with ExitStack() as hooks:
        for site in sites:
            if site.kind == "linear":
                module = model.get_submodule(site.name)
                hooks.enter_context(module.register_forward_pre_hook(partial(look, site.name)))
        forward(batches[:: -(-len(batches) // LOOKED_AT)])
    return frozenset(name for name, c in seen.items() if c is not None)


def _first(x: Tensor, known: Tensor | None) -> Tensor | None:
    """The first token of `x` `[B, T, in]` if it is `known` (any, where None is) in all samples and far the longest."""
    if x.dim() != 3 or x.shape[1] < 2:
        return None
    c = x[0, 0] if known is None else known
    others = float(x[:, 1:].norm(dim=-1).max())
    return c if _same(x, c) and float(c.norm()) >= max(FAR * others, torch.finfo(x.dtype).tiny) else None


def _same(x: Tensor, c: Tensor) -> bool:
    return float((x[:, 0] - c).norm(dim=-1).max()) <= SAME * float(c.norm())


def _constant_arguments(batches: Sequence[Batch]) -> list[str]:
    """Arguments `[B, T, in]` whose first token is the same in all samples of all batches."""
    found: list[str] = []
    for name, first in batches[0].items() if batches else ():
        parts = [batch.get(name) for batch in batches]
        if name != "hidden_states" and all(isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] > 1 for x in parts):
            found += [name] if all(_same(x.float(), first[0, 0].float()) for x in parts) else []  # pyright: ignore
    return found
