"""A whole forward pass with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quant.calibration.replay import Replay
from quant.memory import give_back
from quant.models.skeleton import Skeleton


def outside_blocks(skeleton: Skeleton, chain: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the state outside all blocks: what is needed from the start, and an untied head, needed at the end."""
    inside = set(skeleton.names_under(*chain))
    outside = [name for name in skeleton.model.state_dict() if name not in inside]
    module = skeleton.model.get_output_embeddings() if hasattr(skeleton.model, "get_output_embeddings") else None
    prefix = next(
        (name for name, part in skeleton.model.named_modules() if module is not None and part is module), None
    )
    tied = set(skeleton.tied) | set(skeleton.tied.values())
    head = [name for name in outside if prefix and name.startswith(prefix + ".") and name not in tied]
    return [name for name in outside if name not in head], head


@torch.no_grad()
def stream(skeleton: Skeleton, chain: Sequence[str], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits (or hidden states) on one batch, each block loaded for its turn."""
    outside, head = outside_blocks(skeleton, chain)
    skeleton.load(outside)
    output: Any = None
    with Replay(skeleton.model, chain) as replay:
        for index, name in enumerate(chain):
            names = skeleton.names_under(name)
            skeleton.load(names)
            output = replay.output(index, batch, output)
            skeleton.unload(names)
            give_back()
        skeleton.load(head)
        result = first_tensor(replay.head(batch, output))
    skeleton.unload([*outside, *head])
    return result


def first_tensor(output: Any) -> torch.Tensor:
    """The main tensor of a model's or block's output: logits, hidden states."""
    if isinstance(output, torch.Tensor):
        return output
    values = list(output.values()) if hasattr(output, "values") else list(output)
    return next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
