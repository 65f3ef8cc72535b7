"""Packed transformers in diffusers: `from_pretrained` of a model or a whole pipeline once `quant` is imported.

diffusers keeps its quantizers in a table of a module; there is no function to add one. The entry is made when diffusers
is imported, before `quant` or after it (`announcement`). Loading is then as in transformers: the folder is verified,
packed modules are put in place on the meta device, and diffusers fills them; values that it has cast on the way are
taken as they were stored.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint.manifest import METHOD, VERIFIED, read_config, read_sites, stored_tensors, verify
from quant.errors import BitwrightError, CheckpointError, ResourceError, out_of_memory
from quant.held import Holder, holds
from quant.models.diffusion import named, quiet
from quant.models.source import COMPONENT, PIPELINE, STORED, first_line
from quant.models.structure import owner_of

TABLES = "diffusers.quantizers.auto"


class Method(str, Enum):  # noqa: UP042 (diffusers formats it as a str)
    """diffusers asks a method for its `.value`."""

    BITWRIGHT = METHOD


def register(tables: Any) -> None:
    """Adds our config and quantizer to diffusers' tables, given their module."""
    if METHOD in tables.AUTO_QUANTIZER_MAPPING:
        return
    base = sys.modules["diffusers.quantizers.base"].DiffusersQuantizer
    config = type("BitwrightDiffusersConfig", (Entries, tables.QuantizationConfigMixin), {})
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = type("BitwrightDiffusersQuantizer", (_Quantizer, base), {})


class Entries:
    """`quantization_config` as read from config.json; see `manifest` for the keys. `method`: as a library names it."""

    method: Any = Method.BITWRIGHT

    def __init__(self, **entries: Any) -> None:
        self.quant_method = self.method
        entries.pop("quant_method", None)
        self.entries = entries

    def to_dict(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.entries.items() if key != "checksums"}  # a new folder, a new seal
        return {"quant_method": METHOD, **kept}

    to_diff_dict = to_dict


class _Quantizer:
    """Puts packed modules in place before diffusers loads the tensors, and checks them after."""

    requires_calibration = True
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True  # adapters; gradients go through to what is before
    is_compileable = True
    quantization_config: Any
    folder: Path | None = None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The one call that is told where the files are."""
        self.folder = Path(checkpoint_files[0]).parent
        if self.quantization_config.entries.get("checksums") and not VERIFIED.get():
            verify(self.folder, checkpoint_files)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        from quant.checkpoint.loader import put_site

        for packed in read_sites(self.quantization_config.to_dict(), str(self.folder or "checkpoint")).values():
            put_site(model, packed)

    def check_if_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, state_dict: Any, **options: Any
    ) -> bool:
        if not holds(model, param_name):
            return False
        expected, stored = model.get_buffer(param_name), state_dict[param_name]
        if (stored.shape, stored.dtype) != (expected.shape, expected.dtype):
            raise CheckpointError(
                f"{param_name} is {stored.dtype} {list(stored.shape)}; {expected.dtype} {list(expected.shape)} was "
                "expected; copy the checkpoint again"
            )
        return True

    def create_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, target_device: Any, state_dict: Any,
        *rest: Any, **options: Any,
    ) -> None:  # fmt: skip
        owner, leaf = owner_of(model, param_name)
        owner._buffers[leaf] = state_dict[param_name].to(target_device)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from quant.checkpoint.loader import check_values

        empty = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
        if empty and not getattr(model, "hf_device_map", None):
            raise CheckpointError(f"{self.folder}: missing keys: {empty[:3]}; copy the checkpoint again")
        check_values(model)
        for module in model.modules():
            if isinstance(module, Holder):
                module.settle()
        return model

    def _dequantize(self, model: Any) -> Any:
        from quant.checkpoint.loader import unpack_model

        model = unpack_model(model, model.dtype)
        plain = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(plain)  # with None in it, it could not be saved
        return model


def component(folder: Path) -> Path:
    """The folder of the packed transformer in a pipeline's folder, or the folder itself."""
    pipeline = (folder / PIPELINE).is_file() and not (folder / "config.json").is_file()
    return folder / COMPONENT if pipeline else folder


def load(folder: Path, *, device: str | Mapping[str, Any], dtype: torch.dtype | str | None, dequantize: bool) -> Any:
    """The transformer in `folder`; see `loader.load`, which has read its config."""
    cls = named(read_config(folder).get("_class_name"), "ModelMixin", folder)
    options: dict[str, Any] = {} if isinstance(device, str) and device != "auto" else {"device_map": device}
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else "auto"
    with reading(folder, "diffusers"):
        with quiet():
            model = cls.from_pretrained(
                folder, torch_dtype=stored_dtype(folder) if dtype == "auto" else dtype, use_safetensors=True, **options
            )
        if not options:
            model.to(device)
    return model.dequantize() if dequantize else model


@contextmanager
def reading(folder: Path, library: str) -> Generator[None]:
    """With errors of ours in place of whatever a library, safetensors and torch make of a damaged folder."""
    try:
        yield
    except BitwrightError:
        raise
    except Exception as error:
        reason = first_line(error)
        if out_of_memory(error):
            raise ResourceError(
                f"{folder}: out of memory while it was loaded ({reason}); free some, or choose a narrower dtype"
            ) from None
        raise CheckpointError(f"{folder}: {library} cannot load it ({reason})") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """Of the float tensors, that which holds most of their bytes."""
    sizes = dict.fromkeys(STORED, 0)  # of equal ones the first
    sites = read_sites(read_config(folder).get("quantization_config"), str(folder)).values()
    packed = {name for site in sites for name in site.stored()}
    for name, piece in stored_tensors(folder).items():
        if name not in packed and piece.dtype in sizes:
            sizes[piece.dtype] += piece.nbytes
    return STORED[max(sizes, key=sizes.__getitem__)]
