"""Others in place of a pipeline's parts: what its transformer is asked and answers, what its scheduler made last.

A pipeline is run as it is; only the forward of its transformer and the step of its scheduler's class are exchanged
while it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.samples import Batch
from quant.models.arguments import spoken
from quant.models.stream import first_tensor

Hear = Callable[[int, Batch, Callable[[], Any]], Any]


def hearing(model: nn.Module, hear: Hear) -> Callable[..., Any]:
    """A forward in place of the model's: `hear(step, given, ask)` is told what it is called with, and answers with
    `ask()`, what the model says, or something else. A step is the n-th timestep that is new."""
    forward, times = model.forward, dict[float, int]()
    names, usual = list(inspect.signature(type(model).forward).parameters)[1:], spoken(model)

    @wraps(forward)
    def heard(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        given = {usual.get(key, key): x for key, x in given.items() if x is not None and key != "return_dict"}
        if usual:
            given["hidden_states"] = torch.stack(given["hidden_states"])
        time = torch.as_tensor(given["timestep"]).flatten()[0].item()
        return hear(times.setdefault(time, len(times)), given, lambda: forward(*args, **kwargs))

    return heard


def stepping(scheduler: Any, ends: list[Tensor]) -> Callable[..., Any]:
    """A step in place of the scheduler's class's, with `ends` for the latents that it made last. Pipelines may copy a
    scheduler, so that one of the instance's own would step the wrong one."""
    step = type(scheduler).step

    @wraps(step)
    def stepped(one: Any, *args: Any, **kwargs: Any) -> Any:
        made = step(one, *args, **kwargs)
        if one is scheduler:
            ends[:] = [first_tensor(made)]
        return made

    return stepped
