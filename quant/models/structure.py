"""What a model's structure alone says: which modules may be blocks, which parameters may be sites, how many experts,
which modules are the ends, and whose a name is."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D


def candidates(model: nn.Module) -> list[str]:
    """Names of the modules that may be blocks: the children with matrices of the outermost lists of like modules.

    A bare linear is no block; a model without such lists is one block, named `""`.
    """
    names: list[str] = []
    for name, module in model.named_modules():
        if any(name == taken or name.startswith(taken + ".") for taken in names):
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential):
            heavy = [(key, child) for key, child in module.named_children() if matrices(child) and not is_linear(child)]
            alike = max(Counter(type(child) for _, child in heavy).values(), default=0)
            if alike > 1 or (heavy and isinstance(module, nn.ModuleList)):
                names += [f"{name}.{key}" if name else key for key, _ in heavy]
    return names or [""]


def matrices(module: nn.Module, prefix: str = "") -> list[str]:
    """Names of the linear weights and the 3-D stacks under a module."""
    found: list[str] = []
    for path, part in module.named_modules(prefix=prefix):
        for leaf, parameter in part.named_parameters(recurse=False):
            stack = parameter.dim() == 3 and not isinstance(part, _ConvNd)
            if stack or (leaf == "weight" and is_linear(part)):
                found.append(f"{path}.{leaf}" if path else leaf)
    return found


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def expert_counts(model: nn.Module) -> dict[str, set[int]]:
    """How many experts each module holds, as stacks or as a list, in itself or in a child."""
    counts: dict[str, set[int]] = {}
    for path, part in model.named_modules():
        sizes = {x.shape[0] for x in part.parameters(recurse=False) if x.dim() == 3 and not isinstance(part, _ConvNd)}
        if isinstance(part, nn.ModuleList) and len(part) > 1 and all(matrices(child) for child in part):
            sizes.add(len(part))
        for holder in (path, path.rpartition(".")[0]) if sizes else ():
            counts.setdefault(holder, set()).update(sizes)
    return counts


def owner_of(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module in which a parameter, a buffer or a module of this name lies, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def inside(name: str, *modules: str) -> bool:
    """Whether what has this name lies in one of these modules or is one; all lies in the model itself, `""`."""
    return any(not module or name == module or name.startswith(module + ".") for module in modules)


def name_of(model: nn.Module, module: nn.Module | None) -> str:
    """What a module of the model is called; "" for any other."""
    return next((name for name, one in model.named_modules() if one is module), "")


def end_of(model: Any, end: Literal["embedding", "head"]) -> Any:
    """The embedding of a model's tokens, or its head; None where there is none."""
    try:
        return model.get_input_embeddings() if end == "embedding" else model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
