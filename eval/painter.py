"""What draws: a diffusion transformer with its scheduler and whatever else its pipeline has, packed by us or not.

Three kinds of folder are opened, from safetensors only and without remote code:

    a pipeline        model_index.json, transformer/, scheduler/, often vae/, text encoders
    pixels            the same with a null VAE: the transformer draws the pixels themselves (demo/dit)
    bare              the transformer's own config.json and weights, scheduler/ beside them

A class-conditional transformer is sampled by `quant.eval.draw` itself, step by step as diffusers' DiTPipeline does it
(that class has neither a callback nor a way to do without a VAE, and writes 1000 for the class of no class). Everything
that wants prompts goes through its own pipeline.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quant
from quant.errors import BitwrightError, ModelError, SettingsError
from quant.eval.subject import DTYPES, short
from quant.machine import check_device
from quant.models.diffusion import library, named, quiet
from quant.models.source import first_line, local


@dataclass(frozen=True)
class Painter:
    """An opened model. `vae` is None where the transformer draws pixels; `pipeline` is None where it draws classes.

    `folder` holds the transformer's weights as they are, None for one handed over in memory.
    """

    name: str
    transformer: nn.Module = field(repr=False)
    scheduler: Any = field(repr=False)
    vae: Any = field(default=None, repr=False)
    pipeline: Any = field(default=None, repr=False)
    folder: Path | None = None

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a pipeline that takes prompts. The class of no class comes after the last."""
        return 0 if self.pipeline is not None else int(self.settings["num_embeds_ada_norm"])

    @property
    def settings(self) -> dict[str, Any]:
        """The transformer's configuration."""
        return dict(getattr(self.transformer, "config", {}))

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: that of its first float parameter or buffer."""
        tensors = (*self.transformer.parameters(), *self.transformer.buffers())
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def is_diffusion(source: str | Path) -> bool:
    """Whether a folder, or what the hub has of this name, holds a pipeline or a model of diffusers, by its files alone.

    Raises:
        ModelError: no such folder, and the hub cannot give it.
    """
    folder = local(str(source))
    return (folder / "model_index.json").is_file() or "_class_name" in _json(folder / "config.json")


def open_painter(
    source: str | Path | Painter,
    device: str = "cpu",
    dtype: str = "float32",
    *,
    original: Painter | None = None,
) -> Painter:
    """Opens a folder or a hub name; parts that it lacks (scheduler, VAE, text encoders) are those of `original`.

    Raises:
        SettingsError: unknown dtype or device.
        ModelError: diffusers is not installed, not such a folder, a class that is not its own, weights missing, no
            scheduler.
        CheckpointError: a packed checkpoint is damaged.
    """
    if isinstance(source, Painter):
        return source
    if dtype not in DTYPES:
        raise SettingsError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}.")
    check_device(device)
    root = local(str(source))
    if not is_diffusion(root):
        raise ModelError(f"{source}: no model_index.json and no config.json of diffusers; give a pipeline's folder.")
    try:
        with quiet():
            return _open(short(str(source)), root, device, dtype, original)
    except (BitwrightError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the file decides what goes wrong in diffusers
        raise ModelError(
            f"{source}: diffusers could not load it ({first_line(error)}). It must hold safetensors of classes that "
            "diffusers knows without remote code."
        ) from error


def _open(name: str, root: Path, device: str, dtype: str, original: Painter | None) -> Painter:
    index = _json(root / "model_index.json")
    folder = root / "transformer" if index else root
    transformer = transformer_of(root, folder, dtype).to(device).eval()
    prompted = index.get("_class_name", "DiTPipeline") != "DiTPipeline"
    if "num_embeds_ada_norm" not in getattr(transformer, "config", {}) or prompted:
        pipeline = _pipeline(root, index, transformer, dtype, original)
        return Painter(name, transformer, pipeline.scheduler, None, pipeline.to(device), folder)
    scheduler = _scheduler(root, original)
    vae = None
    if (index.get("vae") or [None])[0]:
        found = named(index["vae"][1], "ModelMixin", root)
        vae = found.from_pretrained(root / "vae", torch_dtype=DTYPES[dtype], use_safetensors=True).to(device).eval()
    return Painter(name, transformer, scheduler, vae, None, folder)


def transformer_of(root: Path, folder: Path, dtype: str) -> nn.Module:
    """The transformer in `folder` of the pipeline in `root`: through `quant.load` if we packed it."""
    config = _json(folder / "config.json")
    if (config.get("quantization_config") or {}).get("quant_method") == "bitwright":
        return quant.load(root, dtype=dtype)
    found = named(config.get("_class_name"), "ModelMixin", folder)
    model, info = found.from_pretrained(
        folder, torch_dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ModelError(
            f"{folder}: {len(info['missing_keys'])} weights are missing from its files (first: "
            f"{sorted(info['missing_keys'])[0]}), and diffusers would run on random ones. Copy the folder again."
        )
    return model


def _scheduler(root: Path, original: Painter | None) -> Any:
    folder = root / "scheduler"
    if not folder.is_dir():
        if original is not None:
            return original.scheduler
        raise ModelError(f"{root}: no scheduler folder, so nothing says how it is sampled; copy the original's there.")
    found = named(_json(folder / "scheduler_config.json").get("_class_name"), "SchedulerMixin", folder)
    return found.from_pretrained(folder)


def _pipeline(root: Path, index: dict[str, Any], transformer: nn.Module, dtype: str, original: Painter | None) -> Any:
    """The prompted pipeline around `transformer`: the folder's own, or the original's with this transformer in it."""
    if index:
        whole = library().DiffusionPipeline
        made = whole.from_pretrained(
            root, transformer=transformer, torch_dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True
        )
    elif original is not None and original.pipeline is not None:
        made = type(original.pipeline)(**{**original.pipeline.components, "transformer": transformer})
    else:
        raise ModelError(
            f"{root}: {type(transformer).__name__} wants prompts, and without model_index.json nothing says which "
            "pipeline encodes them; give the whole pipeline's folder."
        )
    made.set_progress_bar_config(disable=True)
    return made


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
