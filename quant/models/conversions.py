"""transformers' rules for what a stored tensor becomes, where some tensors are packed.

A rule finds its tensors by their names. A packed stack of experts has the name of the parameter whose place it took,
and is no tensor to merge or turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter

from quant.held import Holder


def spare(rules: Iterable[Any], model: nn.Module) -> list[Any]:
    """The rules, which leave alone what the packed modules of `model` hold."""
    holders = [(path, part) for path, part in model.named_modules() if isinstance(part, Holder)]
    packed = {f"{path}.{name}" for path, part in holders for slot in part.slots() for name in slot.names.values()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    packed |= {prefix + name for name in packed} | {name.removeprefix(prefix) for name in packed}

    class Sparing(WeightConverter):
        __slots__ = ()

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            return (source_key, None) if source_key in packed else super().rename_source_key(source_key)

    rules = list(rules)
    for rule in rules:
        if type(rule) is WeightConverter:
            rule.__class__ = Sparing
    return rules
