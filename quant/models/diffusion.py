"""diffusers, and nothing of it anywhere else: the one file that imports that library, and only once it is needed.

A transformer of a pipeline is built from its config by the class of diffusers that `_class_name` names (never code from
the checkpoint), on the meta device, and filled tensor by tensor like any other model: stored names are its own names.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from quant.errors import ModelError
from quant.held import holds
from quant.models.arguments import Form, find_form, translate
from quant.models.building import LargeOnMeta, refuse_quantized
from quant.models.skeleton import Skeleton
from quant.models.source import PIPELINE, Source, first_line, is_plain, read_json

EXTRA = "pip install 'bitwright[diffusers]'"


def library() -> Any:
    """The diffusers package. Raises `ModelError` when it is not installed."""
    try:
        with quiet():
            import diffusers
    except ImportError as error:
        raise ModelError(f"this is a model for diffusers, which cannot be imported ({error}): {EXTRA}") from None
    return diffusers


def named(name: Any, kind: str, where: object) -> Any:
    """The class of diffusers of this name, a `kind` (`ModelMixin`, `SchedulerMixin`, `DiffusionPipeline`)."""
    diffusers = library()
    with quiet():
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
        wanted = getattr(diffusers, kind)
    if not isinstance(found, type) or not issubclass(found, wanted):
        raise ModelError(
            f"{where}: {name!r} is no {kind} of diffusers {diffusers.__version__}; bitwright runs no code from a "
            "checkpoint"
        )
    return found


def scheduler(source: Source) -> Any:
    """The scheduler beside or below a transformer, or None."""
    for folder in (source.home / "scheduler", source.folder.parent / "scheduler"):
        path = folder / "scheduler_config.json"
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
                cls = named(config["_class_name"], "SchedulerMixin", path)
                with quiet():
                    return cls.from_config(config)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{path}: cannot be read ({first_line(error)})") from None
    return None


class DiffusionSkeleton(Skeleton):
    """A `Skeleton` of a diffusion transformer. `form`: how it takes its latents."""

    form: Form

    def open(self, *, packed: bool) -> Any:
        config = {key: value for key, value in self.source.config.items() if key != "quantization_config"}
        if not packed:
            refuse_quantized(self.source, self.source.config.get("quantization_config"))
        cls = named(config.get("_class_name"), "ModelMixin", self.source.name)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(self.dtype)
            with init_empty_weights(include_buffers=False), LargeOnMeta(), quiet():
                model = cls.from_config(config).eval()
        except Exception as error:  # a model's constructor may raise anything
            raise ModelError(
                f"{self.source.name}: diffusers cannot build this model from its config.json ({first_line(error)})"
            ) from None
        finally:
            torch.set_default_dtype(before)
        self.config = model.config
        translate(model)
        if not packed:
            self.form = find_form(model, self.dtype)
        return model

    def remap(self) -> None:
        state: dict[str, Any] = self.model.state_dict()
        self.names = tuple(state)
        self.targets = {key: (key,) if key in state else () for key in self.source.entries}
        self.converted = frozenset()
        self.tied = {}
        self.check_complete(name for name in state if name not in self.source.entries)

    def fill(self, slices: dict[str, Any]) -> None:
        for name, part in slices.items():
            old, stored = self._get(name), part[...]
            if stored.shape != old.shape:
                raise self.mismatch(name, stored.shape, old.shape)
            dtype = self.dtype_of(name) if stored.is_floating_point() and not holds(self.model, name) else None
            self._put(name, stored.to(self.device, dtype))

    def dtype_of(self, name: str) -> torch.dtype:
        """diffusers keeps some parts of some models in float32."""
        kept = getattr(self.model, "_keep_in_fp32_modules", None) or ()
        return torch.float32 if any(part in kept for part in name.split(".")) else self.dtype


@contextmanager
def quiet() -> Generator[None]:
    """Without what the libraries say while they are imported or build a model."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def components(home: Path) -> Mapping[str, Any]:
    """The components that a pipeline's folder names, or nothing. Raises `ModelError` where it cannot be read, and for
    a name that leads out of the folder."""
    path = home / PIPELINE
    index = read_json(path) if path.is_file() else {}
    found = {name: value for name, value in index.items() if isinstance(value, list) and all(value)}
    for name in found:
        if not is_plain(name) or name[0] == ".":
            raise ModelError(f"{path}: component {name!r} is no plain name of a folder; the file is damaged or hostile")
    return found
