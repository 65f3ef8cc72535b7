"""What a transformers checkpoint is, from its config: its class, and an instance that weighs nothing yet."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode

from quant.errors import ModelError
from quant.models.source import Source, first_line

LARGEST_BUFFER = 2**24  # elements; the largest in use are tables of positions, [131072, 128]


def read_config(source: Source) -> Any:
    """The transformers config of a source. Raises `ModelError` when transformers does not know the architecture."""
    try:
        return transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # a config class may raise anything
        reason = first_line(error)
        known = str(source.config.get("model_type")) in transformers.CONFIG_MAPPING
        if "auto_map" in source.config and not known:
            reason = "its auto_map asks for code of its own; bitwright runs no code from a checkpoint"
        raise ModelError(
            f"{source.name}: transformers {transformers.__version__} cannot read its config.json ({reason})"
        ) from None


def model_class(source: Source, config: Any) -> Any:
    """The transformers class named in `architectures`; never code from the checkpoint."""
    if (found := named_class(config)) is not None:
        return found
    raise ModelError(
        f"{source.name}: config.json names architectures {getattr(config, 'architectures', None)}, none of which is in "
        f"transformers {transformers.__version__}; bitwright runs no code from a checkpoint"
    )


def named_class(config: Any) -> Any:
    """The first class of `architectures` that transformers has; None if it has none of them."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def build(cls: Any, config: Any, dtype: torch.dtype, name: str) -> Any:
    """An instance of `cls` with meta parameters and real buffers. Experts run one by one, so that each can be seen."""
    try:
        with init_empty_weights(include_buffers=False), LargeOnMeta(), quiet():
            model = cls._from_config(config, dtype=dtype, experts_implementation="eager")
    except Exception as error:  # a model's constructor may raise anything
        raise ModelError(
            f"{name}: transformers cannot build this model from its config.json ({first_line(error)})"
        ) from None
    return model.eval()


def refuse_quantized(source: Source, config: Any) -> None:
    """Raises `ModelError` if there is a `quantization_config`."""
    if config is None:
        return
    method = config.get("quant_method", "?") if isinstance(config, dict) else getattr(config, "quant_method", "?")
    raise ModelError(f"{source.name}: already quantized ({method}); give the float model that it was made from")


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


class quiet:
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
