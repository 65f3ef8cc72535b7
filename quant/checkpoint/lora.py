"""LoRA through PEFT on packed linears: for language models and for diffusers' `add_adapter` and `load_lora_weights`.

PEFT builds its layer around a module by the module's class and refuses one that it does not know. Its own layer for a
Linear does what is needed, since a packed linear has the same inputs and outputs; only what reads or writes the weight
is not possible (merging, DoRA, first values made from the weight), and says so. By class it also finds "all-linear".
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import Any

from quant.errors import SettingsError
from quant.linear import PackedLinear
from quant.models.source import first_line
from quant.models.structure import end_of

LORA = "peft.tuners.lora.model"
FLOAT = "load the model with dequantize=True"


def register(model: Any) -> None:
    """Makes PEFT's LoRA take packed linears, given its module `peft.tuners.lora.model`."""
    known: Any = model.dispatch_default
    layer = sys.modules["peft.tuners.lora.layer"].Linear

    class PackedLoraLinear(layer):
        """PEFT's layer around a packed linear, which has "Linear" in its name."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with warnings.catch_warnings():  # of a class that it does not know
                warnings.simplefilter("ignore", UserWarning)
                super().__init__(*args, **kwargs)

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().update_layer(*args, **kwargs)
            except (RuntimeError, TypeError) as error:
                why = f"PEFT cannot make this adapter on packed weights, if it reads them ({first_line(error)})"
                raise SettingsError(f"{why}: choose plain LoRA, or {FLOAT}") from error

        def merge(self, *_: Any, **__: Any) -> None:
            raise SettingsError(f"an adapter cannot be merged into packed weights: keep it beside them, or {FLOAT}")

    def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        inner = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(inner, PackedLinear) and kwargs.get("parameter_name") is None:
            kwargs.pop("parameter_name", None)
            return PackedLoraLinear(target, adapter_name, config=config, **kwargs)
        return known(target, adapter_name, config=config, **kwargs)

    model.dispatch_default = dispatch
    tuners: Any = sys.modules["peft.tuners.tuners_utils"]
    tuners._maybe_include_all_linear_layers = partial(_all_linear, tuners._maybe_include_all_linear_layers)


def _all_linear(known: Any, config: Any, model: Any) -> Any:
    """As PEFT resolves "all-linear", packed linears included: all but the head, and those that have an adapter."""
    asked = str(getattr(config, "target_modules", None)).lower() == "all-linear"
    config, head = known(config, model), end_of(model, "head")
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear) and module is not head}
    if asked:
        config.target_modules |= {name for name in packed if not name.endswith(".base_layer")}
    return config
