"""LoRA through PEFT on packed linears: for language models and for diffusers' `add_adapter` and `load_lora_weights`.

PEFT builds its layer around a module by the module's class and refuses one that it does not know. Its own layer for a
Linear does what is needed, since a packed linear has the same inputs and outputs; only merging into the weight is not
possible, and says so.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from quant.errors import SettingsError
from quant.linear import PackedLinear

LORA = "peft.tuners.lora.model"


def register(model: Any) -> None:
    """Makes PEFT's LoRA take packed linears, given its module `peft.tuners.lora.model`."""
    known: Any = model.dispatch_default
    layer = sys.modules["peft.tuners.lora.layer"].Linear

    class PackedLora(layer):
        """PEFT's layer around a packed linear."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with warnings.catch_warnings():  # of a class that it does not know
                warnings.simplefilter("ignore", UserWarning)
                super().__init__(*args, **kwargs)

        def merge(self, *_: Any, **__: Any) -> None:
            raise SettingsError(
                "an adapter cannot be merged into packed weights: keep it beside them, or load the model with "
                "dequantize=True"
            )

    def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        inner = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(inner, PackedLinear) and kwargs.get("parameter_name") is None:
            kwargs.pop("parameter_name", None)
            return PackedLora(target, adapter_name, config=config, **kwargs)
        return known(target, adapter_name, config=config, **kwargs)

    model.dispatch_default = dispatch
