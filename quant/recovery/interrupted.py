"""The state of an interrupted training, on disk: what goes on from it ends in the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from quant.checkpoint.shards import Atomic
from quant.errors import CheckpointError


def keep(path: Path, step: int, parameters: Sequence[Tensor], adam: torch.optim.Adam) -> None:
    """Writes an interrupted training's state, by rename."""
    tensors: dict[str, Tensor] = {}
    for number, parameter in enumerate(parameters):
        tensors[f"{number}.value"] = parameter.detach().contiguous().cpu()
        for key, value in adam.state.get(parameter, {}).items():
            tensors[f"{number}.{key}"] = torch.as_tensor(value).contiguous().cpu()
    with Atomic(path) as out:
        out.write(save(tensors, {"step": str(step), "sha256": _digest(tensors)}))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def restore(path: Path, parameters: Sequence[Tensor], adam: torch.optim.Adam) -> int:
    """Puts a kept state back; returns the step to go on with. Raises `CheckpointError` if the file was altered."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            said = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete this file to tune from the first step") from None
    if said.get("sha256") != _digest(found):
        raise CheckpointError(f"{path}: was altered; delete this file to tune from the first step")
    step = int(said["step"])
    for number, parameter in enumerate(parameters):
        parameter.copy_(found[f"{number}.value"])
        kept = {
            key: found[f"{number}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{number}.{key}" in found
        }
        if kept:
            adam.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in kept.items()}
    return step
