"""`judge_images`: one call that judges diffusion transformers by what they draw, alone or against their original.

    original = open_painter("path/to/pipeline")
    hung = judge_images(["path/to/pipeline-4bit"], against=original, rule=Rule(images=256, steps=50))
    print(hung.pictures[0].psnr, hung.pictures[0].ssim)

All models draw the same seeds (`quant.eval.draw`); the original once, whoever is compared with it. Samples that one
cannot tell from the original's need not be equal to them: distances between images (PSNR, SSIM, latents) say how much
changed, those between sets (Fréchet, precision, recall, the judge's accuracy) whether it got worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from quant.errors import SettingsError
from quant.eval import pixels
from quant.eval.draw import Drawn, Progress, Rule, draw, forced
from quant.eval.features import frechet, precision_recall
from quant.eval.footprint import size_of
from quant.eval.judge import Judge, Seen
from quant.eval.painter import Painter, open_painter
from quant.eval.picture import Hung, Picture, PictureSettings, Step
from quant.eval.subject import Subject
from quant.machine import machine, versions

Source = str | Path | Painter
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Two batches of images in [0, 1] to `[N]`: how LPIPS or another distance of the user's own comes in."""
Fit = Callable[[torch.Tensor, Sequence[str]], float]
"""Images in [0, 1] and their prompts to a mean score."""


@dataclass(frozen=True)
class _Wall:
    """What every picture is compared with. `real`: features, and where they are from."""

    original: Painter | None
    drawn: Drawn | None
    real: torch.Tensor | None
    source: str


def judge_images(
    models: Sequence[Source],
    *,
    against: Source | None = None,
    rule: Rule | None = None,
    judge: Judge | None = None,
    real: torch.Tensor | None = None,
    clip: Fit | None = None,
    reward: Fit | None = None,
    distances: dict[str, Distance] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Callable[[str], Progress | None] | None = None,
) -> Hung:
    """Draws with every model and compares.

    Args:
        models: folders or opened painters; packed by bitwright or not.
        against: the original, likewise.
        rule: how many images of which seeds, in how many steps, with what guidance; the defaults of `Rule` without.
        judge: a network for accuracy, Fréchet distance, precision and recall (`quant.eval.judge`).
        real: images `[M, C, H, W]` in [0, 1] that the features are compared with; the original's samples without.
        clip, reward: images and their prompts to a score (`quant.eval.clip`, `quant.eval.reward`).
        distances: further distances between images of the same seed, by name.
        progress: called with a model's name, gives what is called with (images done, images in all).

    Raises:
        SettingsError: settings that cannot be, models that draw different sizes.
        ModelError: a model that cannot be opened, or draws what is not finite.
        CheckpointError: a packed checkpoint is damaged.
    """
    rule = rule or Rule()
    original = None if against is None else open_painter(against, device, dtype)
    drawn = None if original is None else draw(original, rule, progress(original.name) if progress else None)
    known = real if real is not None else drawn.images if drawn else None
    seen = judge.look(known) if judge and known is not None else None
    source = "real images" if real is not None else f"samples of {original.name}" if original else "nothing"
    count = "" if seen is None else f"{len(seen.features)} "
    wall = _Wall(original, drawn, None if seen is None else seen.features, count + source)

    def picture(painter: Painter, made: Drawn, alone: bool) -> Picture:
        looked = judge.look(made.images) if judge else None
        asked = [rule.prompts[i] for i in made.asked] if rule.prompts else []
        fits = [fit(made.images, asked) if fit and asked else None for fit in (clip, reward)]
        return _picture(painter, made, rule, wall, (judge, looked), fits, alone, distances or {})

    rows = [] if original is None or drawn is None else [(original.name, drawn.images)]
    pictures: list[Picture] = []
    for model in models:
        painter = open_painter(model, device, dtype, original=original)
        _comparable(painter, original)
        made = draw(painter, rule, progress(painter.name) if progress else None)
        pictures.append(picture(painter, made, alone=original is None))
        rows.append((painter.name, made.images))
    first = None if original is None or drawn is None else picture(original, drawn, alone=True)
    return Hung(first, tuple(pictures), tuple(rows))


def _picture(
    painter: Painter,
    made: Drawn,
    rule: Rule,
    wall: _Wall,
    judged: tuple[Judge | None, Seen | None],
    fits: Sequence[float | None],
    alone: bool,
    distances: dict[str, Distance],
) -> Picture:
    judge, looked = judged
    near: dict[str, float] = {}
    steps: tuple[Step, ...] = ()
    apart: dict[str, float] = {}
    if not alone and wall.original is not None and wall.drawn is not None:
        near = _near(made.images, wall.drawn.images)
        apart = {name: float(each(made.images, wall.drawn.images).mean()) for name, each in distances.items()}
        steps = _steps(painter, made, wall.drawn, rule)
    # without real images the original is the measure, and has no distance to itself
    real = wall.real if not alone or wall.source.endswith("real images") else None
    far = between = None
    if looked is not None and real is not None:
        far, between = frechet(looked.features, real), precision_recall(looked.features, real)
    return Picture(
        model=painter.name,
        path=str(painter.folder) if painter.folder else None,
        against=wall.original.name if wall.original and not alone else None,
        psnr=near.get("psnr"),
        psnr_pooled=near.get("psnr_pooled"),
        psnr_worst=near.get("psnr_worst"),
        ssim=near.get("ssim"),
        cosine=steps[-1].cosine if steps else None,
        frechet=far,
        precision=between[0] if between else None,
        recall=between[1] if between else None,
        accuracy=looked.accuracy(made.asked) if looked is not None and painter.classes else None,
        clip=fits[0],
        reward=fits[1],
        distances=apart,
        steps=steps,
        size=size_of(Subject(painter.name, painter.transformer, "encoder", painter.folder)),  # pyright: ignore[reportArgumentType]
        seconds=made.seconds,
        memory=made.memory,
        settings=_settings(painter, made, rule, judge, wall.source),
    )


def _near(images: torch.Tensor, original: torch.Tensor) -> dict[str, float]:
    each, mse = pixels.psnr(images, original), float(pixels.squared_error(images, original).mean())
    return {
        "psnr": float(each.mean()),
        "psnr_pooled": -10 * math.log10(mse) if mse else math.inf,
        "psnr_worst": float(each.min()),
        "ssim": float(pixels.ssim(images, original).mean()),
    }


def _steps(painter: Painter, made: Drawn, original: Drawn, rule: Rule) -> tuple[Step, ...]:
    mine, theirs = made.trace, original.trace
    if mine.timesteps != theirs.timesteps or mine.latents.shape != theirs.latents.shape:
        return ()
    cosines, latents = (f(mine.latents, theirs.latents) for f in (pixels.step_cosines, pixels.step_errors))
    noise: Sequence[float | None] = [None] * len(cosines)
    if theirs.noise.numel():
        found = forced(painter, theirs, original.asked[: theirs.noise.shape[1]], rule)
        noise = pixels.step_errors(found, theirs.noise).tolist()
    columns = zip(theirs.timesteps, cosines.tolist(), latents.tolist(), noise, strict=True)
    return tuple(Step(*values) for values in columns)


def _settings(painter: Painter, made: Drawn, rule: Rule, judge: Judge | None, real: str) -> PictureSettings:
    return PictureSettings(
        images=rule.images,
        steps=rule.steps,
        guidance=rule.guidance,
        seed=rule.seed,
        batch=rule.batch,
        traced=made.trace.latents.shape[1] if made.trace.latents.numel() else 0,
        scheduler=type(painter.scheduler).__name__,
        conditions=f"{painter.classes} classes in turn" if painter.classes else f"{len(rule.prompts)} prompts in turn",
        judge=judge.name if judge else None,
        judge_sha256=judge.sha256 if judge else None,
        real=real,
        device=str(painter.device),
        dtype=str(painter.dtype).removeprefix("torch."),
        machine=machine(),
        versions=versions() | {"diffusers": version("diffusers")},
    )


def _comparable(painter: Painter, original: Painter | None) -> None:
    """Raises `SettingsError` where the same seeds do not mean the same images."""
    if original is None:
        return
    if painter.classes != original.classes:
        raise SettingsError(
            f"{painter.name} draws {painter.classes or 'prompts'}, {original.name} {original.classes or 'prompts'} "
            "classes: nothing to compare."
        )
    mine, theirs = (dict(each.scheduler.config) for each in (painter, original))
    differs = sorted(key for key in mine.keys() | theirs.keys() if key[0] != "_" and mine.get(key) != theirs.get(key))
    if differs or type(painter.scheduler) is not type(original.scheduler):
        raise SettingsError(
            f"{painter.name} and {original.name} have different schedulers ({', '.join(differs) or 'class'}); copy the "
            "original's scheduler folder, then what differs is the model's."
        )
