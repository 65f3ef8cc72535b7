"""Packed checkpoints in transformers: `quant.load`, and `from_pretrained` once `quant` is imported.

transformers finds the method by the name in `config.json`; this module registers it. Before a weight is read the
folder is verified (`manifest.verify`), sites are replaced by packed modules on the meta device, and transformers fills
them like any other tensor: packed weights are never expanded on the way in. `save_pretrained` of such a model writes
the same tensors back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quant.checkpoint import pipelines
from quant.checkpoint.manifest import METHOD, VERIFIED, PackedSite, read_config, read_sites, stored_tensors, verified
from quant.checkpoint.manifest import verify as verify_folder
from quant.embedding import PackedEmbedding, PackedHead, put_embedding, resized, untie
from quant.errors import CheckpointError, SettingsError
from quant.experts import PackedExperts
from quant.held import Holder
from quant.kernels.layouts import LayoutError
from quant.kernels.spec import Uniform
from quant.linear import PackedLinear, put_packed
from quant.machine import check_device
from quant.models.conversions import spare
from quant.models.source import local
from quant.models.structure import end_of, is_linear, owner_of


@register_quantization_config(METHOD)
class BitwrightConfig(pipelines.Entries, QuantizationConfigMixin):
    """For transformers."""

    method = METHOD


@register_quantizer(METHOD)
class BitwrightQuantizer(HfQuantizer):
    """Puts packed modules in place before transformers loads the tensors, and checks them after."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        files = kwargs.get("checkpoint_files") or []
        if files and not VERIFIED.get():
            verify_folder(Path(files[0]).parent, files)
        where = getattr(model.config, "name_or_path", "") or "checkpoint"
        sites = read_sites(config.to_dict(), where)
        names = {name: put_site(model, packed) for name, packed in sites.items()}
        if any(packed.site.end for packed in sites.values()):
            model.resize_token_embeddings = partial(resized, end_of(model, "embedding"))
            stored = stored_tensors(Path(files[0]).parent, [Path(file).name for file in files]).keys() if files else {}
            untie(model, [to for to, origin in model.all_tied_weights_keys.items() if {to, origin} <= {*stored}])
        config.entries["sites"] = {new: config.entries["sites"][name] for name, new in names.items() if new}
        self.model = model
        self.made = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_values(model)
        as_made(model, self.made)
        del self.model, self.made
        for module in model.modules():
            if isinstance(module, Holder):
                module.settle()
        # save_pretrained undoes the renaming and merging of loading; packed stacks cannot be split into files of old
        model._weight_conversions = []
        return model

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return spare(super().update_weight_conversions(weight_conversions, *model), self.model)

    def is_serializable(self, *_: Any, **__: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True  # adapters on packed linears: gradients go through to what is before

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        named = isinstance(dtype, str)  # so the config has it once `save_pretrained` was called
        return unpack_model(model, getattr(torch, dtype) if named else dtype or torch.float32)


def put_site(model: Any, packed: PackedSite) -> str:
    """Replaces one site in a model on the meta device, whether that is the whole model or its base. Returns the name of
    the site there, "" for a head of which that base has none.

    Raises:
        CheckpointError: the model has no such matrix.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    told = packed.site
    for name in (told.name, told.name.removeprefix(prefix), prefix + told.name):
        site = replace(told, name=name)
        try:
            parameter = model.get_parameter(site.parameter)
        except AttributeError:
            continue
        rows, columns = (site.inputs, site.out) if site.transposed else (site.out, site.inputs)
        if tuple(parameter.shape) != ((site.experts, rows, columns) if site.experts else (rows, columns)):
            raise CheckpointError(
                f"{told.name}: config.json says {list(told.shape)}, the model has {list(parameter.shape)}; "
                "config.json and weights do not belong together"
            )
        owner, _ = owner_of(model, site.parameter)
        if site.end in ("embedding", "both"):
            if not isinstance(owner, nn.Embedding) or not isinstance(packed.spec, Uniform):
                raise CheckpointError(f"{told.name}: not an embedding in the model; config.json is damaged")
            put_embedding(model, site, packed.spec)
            return name
        if site.kind == "linear" and (not is_linear(owner) or isinstance(owner, Conv1D) != site.transposed):
            raise CheckpointError(
                f"{told.name}: config.json lists this {type(owner).__name__} as a "
                f"{'transposed' if site.transposed else 'plain'} linear layer; config.json is damaged, copy it again"
            )
        bias = site.kind == "linear" and getattr(owner, "bias", None) is not None
        put_packed(model, replace(site, bias=bias), packed.spec)
        return name
    if told.end == "head" and end_of(model, "head") is None:
        return ""
    raise CheckpointError(f"{told.name}: config.json lists this site, but the model has no such matrix")


def check_values(model: nn.Module) -> None:
    """Raises `CheckpointError` for values that no layout allows and for float tensors that are none, naming them."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":  # left on disk by device="auto"
            continue
        if not parameter.is_floating_point():
            raise CheckpointError(f"{name}: stored as {parameter.dtype}; floating-point numbers were expected")
        low, high = parameter.detach().aminmax() if parameter.numel() else (torch.zeros(()), torch.zeros(()))
        if not bool(low.isfinite() and high.isfinite()):
            raise CheckpointError(f"{name}: holds NaN or infinite numbers; copy the checkpoint again")
    for name, module in model.named_modules():
        try:
            for slot in module.slots() if isinstance(module, Holder) else ():
                slot.packed.validate()
        except LayoutError as error:
            raise CheckpointError(f"{name}: {error}") from None


def as_made(model: Any, made: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Sees to it that float parameters are as the model was made. transformers 5.17 looks at no shape where a quantizer
    is, and leaves a tensor that it renames in the dtype it is stored in. Raises `CheckpointError` for another shape."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        shape, dtype = made.get(name, (parameter.shape, parameter.dtype))
        if parameter.shape != shape:
            raise CheckpointError(f"{name}: stored as {list(parameter.shape)}; the model has {list(shape)}")
        if parameter.dtype != dtype and not any(re.search(part.replace("*", ".*"), name) for part in kept):
            parameter.data = parameter.data.to(dtype)


def unpack_model(model: Any, dtype: torch.dtype) -> Any:
    """Every packed site expanded to the float module it stands for, in place; nothing of ours remains."""
    model._weight_conversions = None  # a plain model is saved as its architecture's files are
    vars(model).pop("resize_token_embeddings", None)
    modules = list(model.named_modules())
    for name, module in modules:
        if isinstance(module, PackedLinear | PackedHead):
            setattr(*owner_of(model, name), module.unpack(dtype).train(module.training))
        elif isinstance(module, PackedExperts | PackedEmbedding):
            module.unpack(dtype)
    if any(isinstance(module, PackedHead) for _, module in modules):  # its parameter is tied again
        del model._tied_weights_keys
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


def load(
    checkpoint: str | Path, *, device: str | Mapping[str, Any] = "cpu", dtype: torch.dtype | str | None = None,
    dequantize: bool = False, verify: bool = True,
) -> Any:  # fmt: skip
    """A packed checkpoint as a transformers model, or the transformer of a diffusers pipeline, in eval mode.

    `checkpoint`: a local folder or a hub name. `device`: where all of it goes, "auto", or a map from modules to devices
    (`device_map` in transformers). `dtype` of what is not packed and of the computation: by default float32 on a CPU
    and the checkpoint's own ("auto") elsewhere. `dequantize`: a plain float model with the same weights, for tools that
    know nothing of this package; the memory of a float model, and no inputs rounded. `verify`: check every file's
    sha256 first.

    Raises:
        SettingsError: an unknown dtype, or a device that torch cannot use.
        CheckpointError: the folder is not a sound packed checkpoint; says which file or tensor.
        ResourceError: out of memory.
    """
    if isinstance(device, str) and device != "auto":
        check_device(device)
    folder = pipelines.component(local(str(checkpoint)))
    config = read_config(folder)
    read_sites(config.get("quantization_config"), str(folder))
    if verify:
        verify_folder(folder)
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise SettingsError(f"dtype {dtype!r} is unknown; give float32, float16, bfloat16 or auto")
        dtype = getattr(torch, dtype)
    if "_class_name" in config:
        with verified():
            return pipelines.load(folder, device=device, dtype=dtype, dequantize=dequantize)
    names = [n for n in config.get("architectures") or [] if isinstance(n, str) and hasattr(transformers, n)]
    if not names:
        raise CheckpointError(f"{folder}: architectures {config.get('architectures')} are unknown to transformers here")
    spread = {"": device} if isinstance(device, str) and device != "auto" else device
    options: dict[str, Any] = {} if device == "cpu" else {"device_map": spread}
    options |= {"dtype": dtype or (torch.float32 if device == "cpu" else "auto"), "output_loading_info": True}
    with pipelines.reading(folder, "transformers"), verified():
        kind = getattr(transformers, names[0])
        model, info = kind.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **options)
    packed = tuple(f"{name}." for name in model.config.quantization_config.entries["sites"])
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        wrong = sorted(info.get(what) or ())
        if what == "unexpected_keys":  # what the class has no use for, it has none for in a float checkpoint either
            wrong = [name for name in wrong if name.startswith(packed)]
        if wrong:
            raise CheckpointError(f"{folder}: {what.replace('_', ' ')}: {wrong[:3]}; copy the checkpoint again")
    return model.dequantize() if dequantize else model
