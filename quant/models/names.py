"""Names in a model: whose a parameter is, what a module is called, and which modules are its ends."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn


def owner_of(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module in which a parameter, a buffer or a module of this name lies, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def name_of(model: nn.Module, module: nn.Module | None) -> str:
    """What a module of the model is called; "" for any other."""
    return next((name for name, one in model.named_modules() if one is module), "")


def end_of(model: Any, end: Literal["embedding", "head"]) -> Any:
    """The embedding of a model's tokens, or its head; None where there is none."""
    try:
        return model.get_input_embeddings() if end == "embedding" else model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
