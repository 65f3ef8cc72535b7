"""Outputs that no later solving can change, kept so that each is computed once per batch.

True sequential order runs a block once for every stage, and where the float path is followed, twice. When the sites of
a submodule (an attention, say) are all solved, its output for each batch is final, since everything before it was
solved earlier: the next pass on either path keeps it, and the passes after that read it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

from torch import nn

from quant.calibration.activations import Activations
from quant.calibration.notes import before, pin, written
from quant.calibration.replay import Replay, copy, instead

SHARE = 4
"""A store of outputs inside a block holds this part in memory of what one between blocks does."""


class Remembered(ExitStack):
    """Stands in for `module`'s forward until it is closed. Only passes that `replay` was given a batch's number for use
    `stores`, of each path one."""

    def __init__(self, name: str, module: nn.Module, replay: Replay, stores: Sequence[Activations]) -> None:
        super().__init__()
        self.name, self.stores = name, stores
        forward = module.forward

        @wraps(forward)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            number = replay.number
            if number is None:
                return forward(*args, **kwargs)
            store = stores[replay.path]
            kept = store[number]
            if kept is not None:
                result, notes = copy(kept)
                pin(notes, args, kwargs)
                return result
            seen = before(args, kwargs)
            result = forward(*args, **kwargs)
            store[number] = copy((result, written(seen, args, kwargs)))
            return result

        self.enter_context(instead(module, "forward", remembered))
        for store in stores:
            self.callback(store.clear)


def finished(block: nn.Module, prefix: str, sites: Iterable[str], solved: set[str]) -> list[str]:
    """The largest submodules of `block` (named `prefix`) with at least two sites, all of them solved: full names."""
    found: list[str] = []
    names = [name for name in sites if name.startswith(f"{prefix}.")]
    for name, _ in block.named_modules(prefix=prefix):
        inside = [site for site in names if site.startswith(f"{name}.")]
        outer = any(name.startswith(f"{other}.") for other in found)
        if name != prefix and not outer and len(inside) > 1 and solved.issuperset(inside):
            found.append(name)
    return found
