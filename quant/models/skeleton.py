"""A model whose weights come and go: built on the meta device, filled part by part from the checkpoint.

The pipeline never holds a whole model. A `Skeleton` knows which stored tensors make which parameters, and loads just
those that a set of parameters needs, through transformers' own renaming and merging rules (`core_model_loading`): files
with one matrix per expert become the fused 3-D parameter here exactly as they do in `from_pretrained`, for every
architecture, without a list of ours. Buffers (rotary tables) are real from the start; parameters are dropped back to
the meta device after use. Tied parameters follow their source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from quant.errors import ModelError
from quant.models.source import Source


def read_config(source: Source) -> Any:
    """The transformers config of a source. Raises `ModelError` when transformers does not know the architecture."""
    try:
        return transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{source.name}: transformers {transformers.__version__} cannot read its config.json ({reason})"
        ) from None


def model_class(source: Source, config: Any) -> Any:
    """The transformers class named in `architectures`; never code from the checkpoint."""
    for name in getattr(config, "architectures", None) or ():
        if isinstance(name, str) and hasattr(transformers, name):
            return getattr(transformers, name)
    raise ModelError(
        f"{source.name}: config.json names architectures {getattr(config, 'architectures', None)}, none of which is in "
        f"transformers {transformers.__version__}; bitwright runs no code from a checkpoint"
    )


class Skeleton:
    """`model` with parameters on meta, and the rules to fill them. `dtype` is what float parameters are loaded as.

    `prepare` changes the model before its parameters are mapped: the verification of a packed checkpoint puts packed
    modules in place.
    """

    def __init__(
        self,
        source: Source,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = device
        config = read_config(source)
        if prepare is not None:
            del config.quantization_config
        elif getattr(config, "quantization_config", None) is not None:
            raise ModelError(
                f"{source.name}: already quantized ({config.quantization_config}); give the float model it was made from"
            )
        self.config = config
        self.model = build(model_class(source, config), config, dtype, source.name)
        if prepare is not None:
            prepare(self.model)
        self.place_buffers()
        self.remap()

    def place_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)

    def remap(self) -> None:
        """Works out which stored tensors make which parameters; call again after modules were replaced."""
        mapping = get_model_conversion_mapping(self.model)
        self.mapping = mapping
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state: dict[str, Any] = self.model.state_dict()
        prefix = self.model.base_model_prefix
        self.targets: dict[str, tuple[str, ...]] = {}
        for key in self.source.entries:
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if pattern is None:
                self.targets[key] = (name,) if name in state else ()
            else:
                patterns = by_pattern[pattern].target_patterns
                names = tuple(name.replace(patterns[0], target) for target in patterns)
                self.targets[key] = tuple(target for target in names if target in state)
        self.converted = frozenset(
            key for key in self.targets if rename_source_key(key, renamings, converters, prefix, state)[1] is not None
        )
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        found = {name for names in self.targets.values() for name in names}
        for target, origin in list(self.tied.items()):  # whichever of the pair is stored is the source of the other
            if origin not in found and target in found:
                del self.tied[target]
                self.tied[origin] = target
        missing = [name for name in state if name not in found and self.tied.get(name) not in found]
        if missing:
            raise ModelError(
                f"{self.source.name}: {len(missing)} parameters have no stored weights, first {missing[0]}; the checkpoint "
                "is incomplete or belongs to another architecture"
            )

    def load(self, names: Iterable[str]) -> None:
        """Fills the named parameters and persistent buffers, and the tied ones among them."""
        wanted = set(names)
        wanted |= {self.tied[name] for name in wanted if name in self.tied}
        keys = [key for key, targets in self.targets.items() if wanted.intersection(targets)]
        with self.source.open(keys) as slices, _quiet():
            info, _ = convert_and_load_state_dict_in_model(
                self.model,
                slices,
                LoadStateDictConfig(dtype=self.dtype, weight_mapping=self.mapping, device_map={"": self.device}),
            )
        if info.mismatched_keys or info.conversion_errors:
            what = sorted(info.mismatched_keys) or sorted(info.conversion_errors)
            raise ModelError(f"{self.source.name}: stored tensors do not fit the architecture: {what[0]}")
        for name in wanted & set(self.tied):
            owner, leaf = self._owner(name)
            origin, origin_leaf = self._owner(self.tied[name])
            setattr(owner, leaf, getattr(origin, origin_leaf))
        for name in wanted:
            parameter = getattr(*self._owner(name))
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise ModelError(
                    f"{name}: holds NaN or infinite weights; the checkpoint is damaged or was saved in too narrow a dtype"
                )
            if isinstance(parameter, nn.Parameter):
                parameter.requires_grad_(False)

    def unload(self, names: Iterable[str]) -> None:
        """Returns parameters to the meta device, so that their memory is free."""
        for name in names:
            owner, leaf = self._owner(name)
            old = getattr(owner, leaf)
            empty = torch.empty_like(old, device="meta")
            if isinstance(old, nn.Parameter):
                owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
            else:
                owner._buffers[leaf] = empty

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def names_under(self, *prefixes: str) -> list[str]:
        """State names inside the modules of these names (`""` is the whole model)."""
        return [name for name in self.model.state_dict() if any(_inside(name, prefix) for prefix in prefixes)]


def build(cls: Any, config: Any, dtype: torch.dtype, name: str) -> Any:
    """An instance of `cls` with meta parameters and real buffers. Experts run one by one, so that each can be seen."""
    try:
        with init_empty_weights(include_buffers=False), _quiet():
            model = cls._from_config(config, dtype=dtype, experts_implementation="eager")
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError, KeyError, ZeroDivisionError) as error:
        raise ModelError(f"{name}: transformers cannot build this model from its config.json ({error})") from None
    return model.eval()


def _inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


class _quiet:
    """Silences transformers' progress bar and its per-call load report."""

    def __enter__(self) -> None:
        from transformers.utils import logging as transformers_logging

        self._bars = transformers_logging.is_progress_bar_enabled()
        self._level = transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(self._level)
        if self._bars:
            transformers_logging.enable_progress_bar()
