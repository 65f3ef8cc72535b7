"""What is said of a diffusion transformer: the figures of one model's images, with every setting they depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from quant.eval.footprint import Size
from quant.eval.memory import Rise
from quant.eval.report import plain
from quant.machine import Machine


@dataclass(frozen=True)
class Step:
    """One timestep. `cosine`, `latent`: of the latents after it, each model on its own way. `noise`: of the prediction
    on the original's inputs. The last two are squared errors over the original's square."""

    timestep: float
    cosine: float
    latent: float
    noise: float | None


@dataclass(frozen=True)
class PictureSettings:
    """Everything that decides the figures of a picture. `traced`: how many images the steps were compared on."""

    images: int
    steps: int
    guidance: float
    seed: int
    batch: int
    traced: int
    scheduler: str
    conditions: str
    judge: str | None
    judge_sha256: str | None
    real: str
    device: str
    dtype: str
    machine: Machine
    versions: dict[str, str]

    @property
    def said(self) -> str:
        """How the images were drawn, in words."""
        guided = f"guidance {self.guidance:g}" if self.guidance > 1 else "no guidance"
        return f"{self.scheduler} {self.steps} steps, {guided}, {self.conditions}, seeds from {self.seed} on"


@dataclass(frozen=True)
class Picture:
    """One model judged by its images. What needs an original or a judge is None without one.

    `psnr`, `ssim`: means over the images; `psnr_pooled` is that of the mean squared error, which one infinite value
    does not hide, `psnr_worst` the lowest. `cosine`: of the final latents. `frechet`, `precision`, `recall`: of the
    judge's features to those of the settings' `real`. `accuracy`: judged as the class asked for. `clip`, `reward`: how
    well images fit their prompts.
    """

    model: str
    path: str | None
    against: str | None
    psnr: float | None
    psnr_pooled: float | None
    psnr_worst: float | None
    ssim: float | None
    cosine: float | None
    frechet: float | None
    precision: float | None
    recall: float | None
    accuracy: float | None
    clip: float | None
    reward: float | None
    distances: dict[str, float]
    steps: tuple[Step, ...]
    size: Size
    seconds: float
    memory: Rise
    settings: PictureSettings

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values only; a number that is not finite becomes None."""
        return plain(asdict(self))


@dataclass(frozen=True)
class Hung:
    """The pictures with their images, for the contact sheet: `rows` are (name, `[N, C, H, W]`), the original first."""

    original: Picture | None
    pictures: tuple[Picture, ...]
    rows: tuple[tuple[str, torch.Tensor], ...] = field(repr=False)

    @property
    def shown(self) -> list[Picture]:
        """All of them, the original first."""
        return [*([self.original] if self.original else []), *self.pictures]
