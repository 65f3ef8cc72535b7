"""Nothing large is allocated while a model is built."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LARGEST_BUFFER = 2**24  # elements; the largest in use are tables of positions, [131072, 128]


class LargeOnMeta(TorchFunctionMode):
    """Nothing larger than any buffer is ever allocated: `init_empty_weights` moves a parameter to meta only once it is
    made, and one stack of experts may be larger than the machine's memory."""

    factories = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.factories:
            probe = func(*args, **{**kwargs, "device": "meta"})
            if probe.numel() > LARGEST_BUFFER:
                return probe
        return func(*args, **kwargs)
