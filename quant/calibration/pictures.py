"""Real images to calibrate a diffusion transformer on, in place of samples on their own way from noise.

A folder of PNG and JPEG files: encoded by the pipeline's autoencoder where it has one, else the pixels themselves, from
-1 to 1. Each image is a sample; noise of its own is added as the model's scheduler adds it, once for each step that the
trajectory would keep of it, so that timesteps are seen equally often. Prompts and labels are the trajectory's, but
images in a subfolder named by a number have that class label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.errors import CalibrationError
from quant.models.diffusion import DiffusionSkeleton, components, named, quiet
from quant.models.source import first_line, read_json
from quant.recipe import Calibration

SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, eq=False)
class Pictures:
    """`latents`, `noise`: float32 `[samples, C, H, W]`, without noise and of mean 0 and variance 1. `labels` int64
    `[samples]`, where subfolders tell them. `name`, `sha256`, `size` (height, width): of the images."""

    latents: Tensor
    noise: Tensor
    labels: Tensor | None
    name: str
    sha256: str
    size: tuple[int, int]

    def check(self, shape: Sequence[int]) -> None:
        """Raises `CalibrationError` unless the model takes latents `shape`, those of the images."""
        have = self.latents.shape[1:]
        if tuple(shape) != tuple(have):
            high, wide = (part * size / here for part, size, here in zip(shape[1:], self.size, have[1:], strict=True))
            raise CalibrationError(
                f"calibration {self.name}: {_said(*self.size)} make latents {list(have)}, and the model takes "
                f"{list(shape)}: resize them to {wide:g} x {high:g}"
            )

    def at(self, schedule: Any, time: Tensor, which: Sequence[int] | None = None) -> Tensor:
        """Samples with as much noise as there is at a timestep."""
        x, noise = (part if which is None else part[list(which)] for part in (self.latents, self.noise))
        times = time.expand(len(x)).cpu()
        if hasattr(schedule, "scale_noise"):
            return schedule.scale_noise(x, times, noise)
        if not hasattr(schedule, "add_noise"):
            raise CalibrationError(
                f"calibration {self.name}: {type(schedule).__name__} cannot add noise; leave --calibration out"
            )
        return schedule.add_noise(x, noise, times)


def fresh(schedule: Any) -> Any:
    """A copy that has taken no step yet."""
    made = deepcopy(schedule)
    for name in ("_step_index", "_begin_index"):
        if hasattr(made, name):
            setattr(made, name, None)
    return made


def pictures(skeleton: DiffusionSkeleton, calibration: Calibration, schedule: Any) -> Pictures | None:
    """The images of a recipe whose calibration is a folder; None where it is none.

    Raises:
        CalibrationError: there are too few, one cannot be read, they have different sizes, or not the model's.
    """
    folder, count = Path(calibration.text), calibration.samples
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < count:
        raise CalibrationError(
            f"calibration {folder}: {len(files)} images ({', '.join(SUFFIXES)}), and {count} samples are asked for; "
            f"give more{f', or --samples {len(files)}' if files else ''}"
        )
    if schedule is None:
        raise CalibrationError(f"calibration {folder}: noise is added by a scheduler, and the model has none beside it")
    if skeleton.form.layout != "image":
        raise CalibrationError(
            f"calibration {folder}: {type(skeleton.model).__name__} takes latents as {skeleton.form.layout}, not as "
            "images; give a .safetensors file with hidden_states, or leave --calibration out"
        )
    files = files[:: len(files) // count][:count]  # from all subfolders
    latents, size = _latents(skeleton, files, calibration.batch_size)
    noise = [torch.randn(x.shape, generator=_seeded(calibration.seed + n)) for n, x in enumerate(latents)]
    names = [path.parent.name if path.parent != folder else "" for path in files]
    known = skeleton.config.get("num_embeds_ada_norm") or 0
    told = known and all(name.isdecimal() and int(name) < known for name in names)
    labels = torch.tensor([int(name) for name in names]) if told else None
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
    said = f"{count} images of {folder.name}" + (" with their labels" if told else "")
    return Pictures(latents, torch.stack(noise), labels, said, digest, size)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def _latents(skeleton: DiffusionSkeleton, files: Sequence[Path], size: int) -> tuple[Tensor, tuple[int, int]]:
    """The images as the transformer knows them, float32 `[n, C, H, W]`, and their height and width."""
    channels, vae = skeleton.config["in_channels"], _autoencoder(skeleton)
    shown = channels if vae is None else vae.config.get("in_channels") or 3
    if shown not in (1, 3):
        raise CalibrationError(
            f"{skeleton.source.name}: its latents have {channels} channels, and no autoencoder lies beside it to make "
            "them from images; give the whole pipeline's folder as the model"
        )
    made: list[Tensor] = []
    first = _pixels(files[0], shown)
    for start in range(0, len(files), size):
        x = [_pixels(path, shown) for path in files[start : start + size]]
        for path, one in zip(files[start:], x, strict=False):
            if one.shape != first.shape:
                here, there = _said(*one.shape[1:]), _said(*first.shape[1:])
                raise CalibrationError(f"{path}: {here}, and {files[0].name} has {there}: resize them alike")
        part = torch.stack(x) if vae is None else _encoded(vae, torch.stack(x), files[start])
        made.append(part)
    return torch.cat(made), (first.shape[1], first.shape[2])


def _said(height: int, width: int) -> str:
    return f"{width} x {height} pixels"


def _pixels(path: Path, channels: int) -> Tensor:
    """`[channels, H, W]` float32 from -1 to 1."""
    from PIL import Image  # diffusers brings it
    from PIL.Image import DecompressionBombError
    from PIL.ImageOps import exif_transpose

    try:
        with Image.open(path) as image:
            shown = exif_transpose(image).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
        raise CalibrationError(f"calibration {path}: cannot be read as an image ({first_line(error)})") from None
    flat = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8)
    return flat.view(shown.height, shown.width, channels).permute(2, 0, 1).float() / 127.5 - 1


def _autoencoder(skeleton: DiffusionSkeleton) -> Any:
    """That of the pipeline, float32, or None."""
    home = skeleton.source.home / "vae"
    if "vae" not in components(skeleton.source.home) or not home.is_dir():
        return None
    cls = named(read_json(home / "config.json").get("_class_name"), "ModelMixin", home)
    try:
        with quiet():
            return cls.from_pretrained(home).eval().to(skeleton.device)
    except Exception as error:  # whatever a component's loader raises
        raise CalibrationError(f"{home}: diffusers cannot load this autoencoder ({first_line(error)})") from error


def _encoded(vae: Any, x: Tensor, path: Path) -> Tensor:
    """Latents of images, scaled as the transformer takes them: the mean where the autoencoder gives a distribution."""
    try:
        said = vae.encode(x.to(vae.device))
        latent = said.latent_dist.mode() if hasattr(said, "latent_dist") else said.latent
    except Exception as error:  # a model's own code may raise anything
        raise CalibrationError(
            f"{path}: the autoencoder refuses {_said(*x.shape[2:])} ({first_line(error)})"
        ) from error
    mean, deviation = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean and deviation:  # of each channel
        along = (1, -1, *[1] * (latent.dim() - 2))
        mean, deviation = (torch.tensor(values, device=latent.device).view(along) for values in (mean, deviation))
        return ((latent - mean) / deviation).float().cpu()
    shift, scale = (vae.config.get(name) for name in ("shift_factor", "scaling_factor"))
    return ((latent - (shift or 0.0)) * (scale or 1.0)).float().cpu()
