"""Networks that look at images: classes for the accuracy of class-conditional samples, features for distances.

A judge is any classifier: what its last linear layer puts out are the classes, what goes in are the features. It comes
from safetensors, never from a pickle and never with code of its own:

    FILE.safetensors                    layers named in its metadata under `layers`
    FILE.safetensors:LAYERS             layers named here, in the order of the Sequential whose state dict it is
    FOLDER                              an image classifier of transformers
    torchvision:NAME:FILE.safetensors   torchvision's or timm's architecture with local weights
    timm:NAME:FILE.safetensors

LAYERS are words: `conv/2+1` (stride 2, padding 1), `linear`, `relu`, `gelu`, `silu`, `tanh`, `sigmoid`, `flatten`,
`dropout`, `maxpool/2`, `avgpool/2`, `mean` (over pixels). Sizes come from the tensors. Such a network sees images in
[-1, 1] at their own size, the others at 224 (a folder: what its preprocessor says) with their usual mean and deviation.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import interpolate

from quant.errors import ModelError, SettingsError
from quant.models.source import first_line

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PLAIN: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "flatten": nn.Flatten,
    "dropout": nn.Identity,
    "mean": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}
_WORD = re.compile(r"([a-z]+)(?:/(\d+))?(?:\+(\d+))?")


@dataclass(frozen=True)
class Seen:
    """`classes`: `[N, K]` logits; `features`: `[N, F]`; float32 on the CPU."""

    classes: torch.Tensor = field(repr=False)
    features: torch.Tensor = field(repr=False)

    def accuracy(self, asked_N: torch.Tensor) -> float:
        """The share of images taken for the class that was asked for."""
        return float((self.classes.argmax(1) == asked_N).double().mean())


@dataclass(frozen=True)
class Judge:
    """A network and how images are put before it: resized to `size` (None leaves them), `(x - mean) / deviation`."""

    name: str
    network: nn.Module = field(repr=False)
    channels: int
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.5,)
    deviation: tuple[float, ...] = (0.5,)
    sha256: str | None = None

    @torch.no_grad()
    def look(self, images: torch.Tensor, batch: int = 64) -> Seen:
        """Looks at images `[N, C, H, W]` in [0, 1].

        Raises:
            ModelError: images that the network cannot take, or a network without a linear layer.
        """
        linears = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        caught: list[torch.Tensor] = []
        hooks = [each.register_forward_pre_hook(lambda _, args: caught.append(args[0])) for each in linears]
        classes: list[torch.Tensor] = []
        features: list[torch.Tensor] = []
        try:
            for part in images.split(batch):
                caught.clear()
                out = self.network(self._prepared(part))
                classes.append(getattr(out, "logits", out).float())
                features.append(caught[-1].flatten(1).float())
        except (RuntimeError, IndexError, AttributeError) as error:
            raise ModelError(
                f"judge {self.name}: cannot look at images of {list(images.shape[1:])} ({first_line(error)})."
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        return Seen(torch.cat(classes), torch.cat(features))

    def _prepared(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x = x_BCHW.float()
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = interpolate(x, size=self.size, mode="bilinear", antialias=True)
        if x.shape[1] != self.channels:
            x = x.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        return (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.deviation).view(-1, 1, 1)


def open_judge(source: str | Path) -> Judge:
    """Opens a judge; see above for what `source` may be.

    Raises:
        SettingsError: no such file, unknown words, a library that is not installed.
        ModelError: weights that do not fit.
    """
    text = str(source)
    if text.partition(":")[0] in ("torchvision", "timm"):
        return _known(*text.split(":", 2))
    if Path(text).expanduser().is_dir():
        return _transformers(Path(text).expanduser())
    name, _, words = text.partition(".safetensors:")
    file = Path(f"{name}.safetensors" if words else text).expanduser()
    tensors, metadata = _read(file)
    words = words or metadata.get("layers", "")
    if not words:
        raise SettingsError(
            f"judge {file}: nothing says which layers it has; write them behind it, for example "
            f"'{file.name}:conv/2+1 relu flatten linear'."
        )
    network = _sequential(words, tensors, file.name)
    first = next((m for m in network.children() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    channels = first.in_channels if isinstance(first, nn.Conv2d) else int(metadata.get("channels", 1))
    return Judge(file.name, network.eval(), channels, sha256=_sha256(file))


def _sequential(words: str, tensors: dict[str, torch.Tensor], name: str) -> nn.Module:
    layers: list[nn.Module] = []
    for index, word in enumerate(words.split()):
        match = _WORD.fullmatch(word)
        kind, stride, padding = (match[1], int(match[2] or 1), int(match[3] or 0)) if match else (word, 1, 0)
        weight = tensors.get(f"{index}.weight")
        if kind in ("conv", "linear"):
            if weight is None or weight.ndim != (4 if kind == "conv" else 2):
                raise ModelError(f"judge {name}: layer {index} is {word!r}, and the file has no weight that fits it.")
            bias = f"{index}.bias" in tensors
            if kind == "linear":
                layers.append(nn.Linear(weight.shape[1], weight.shape[0], bias))
            else:
                sizes = (int(weight.shape[2]), int(weight.shape[3]))
                layers.append(nn.Conv2d(weight.shape[1], weight.shape[0], sizes, stride, padding, bias=bias))
        elif kind in ("maxpool", "avgpool"):
            layers.append((nn.MaxPool2d if kind == "maxpool" else nn.AvgPool2d)(stride))
        elif kind in _PLAIN:
            layers.append(_PLAIN[kind]())
        else:
            known = ", ".join(["conv/2+1", "linear", "maxpool/2", "avgpool/2", *_PLAIN])
            raise SettingsError(f"judge {name}: layer {word!r} is unknown; known are {known}.")
    return _filled(nn.Sequential(*layers), tensors, name)


def _known(library: str, name: str = "", file: str = "") -> Judge:
    if not file:
        raise SettingsError(f"judge {library}:{name}: give it as {library}:NAME:FILE.safetensors.")
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise SettingsError(f"judge {library}:{name}: {library} is not installed; python -m pip install it.") from error
    tensors, _ = _read(Path(file).expanduser())
    try:
        network = module.create_model(name) if library == "timm" else module.models.get_model(name, weights=None)
    except (RuntimeError, ValueError) as error:
        raise SettingsError(f"judge {library}:{name}: unknown there ({first_line(error)}).") from error
    sha = _sha256(Path(file).expanduser())
    return Judge(f"{library}:{name}", _filled(network, tensors, name).eval(), 3, (224, 224), *_IMAGENET, sha)


def _transformers(folder: Path) -> Judge:
    from transformers import AutoModelForImageClassification

    try:
        network: Any = AutoModelForImageClassification.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        said = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except Exception as error:  # the file decides what goes wrong in transformers
        raise ModelError(f"judge {folder}: transformers could not load it ({first_line(error)}).") from error
    size = said.get("size", 224)
    side = size if isinstance(size, int) else size.get("shortest_edge", size.get("height", 224))
    mean, deviation = said.get("image_mean", (0.5,)), said.get("image_std", (0.5,))
    channels = getattr(network.config, "num_channels", 3)
    return Judge(folder.name, network.eval(), channels, (side, side), tuple(mean), tuple(deviation))


def _filled(network: nn.Module, tensors: dict[str, torch.Tensor], name: str) -> nn.Module:
    try:
        network.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    except RuntimeError as error:
        raise ModelError(f"judge {name}: its weights do not fit ({' '.join(str(error).split())[:300]}).") from error
    return network


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not file.is_file():
        raise SettingsError(f"judge {file}: no such file; give a safetensors file or a folder.")
    try:
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata() or {}
        return load_file(file), metadata
    except SafetensorError as error:
        raise ModelError(f"judge {file}: not a readable safetensors file ({first_line(error)}).") from error


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
