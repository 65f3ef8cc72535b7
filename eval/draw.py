"""Drawing from fixed noise: the same seeds, classes or prompts, scheduler, steps and guidance for every model.

Image i starts from a generator of its own, seeded `seed + i` on the CPU, so neither the batch size nor the device
changes what it starts from. Class i is i modulo the number of classes; prompts are taken in turn likewise. With
classifier-free guidance g > 1 the noise is `e(no class) + g (e(class) - e(no class))` (Ho and Salimans,
arXiv:2207.12598), both in one batch.

Of the first images every step is kept (`Trace`): what went into the transformer, and the noise that came out. With it a
second model is judged twice: on its own trajectory, where errors add up or cancel, and by `forced` on the inputs of the
first, where the error of each timestep stands alone.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from quant.errors import ModelError, SettingsError
from quant.eval.memory import Rise, watch
from quant.eval.painter import Painter
from quant.models.source import first_line

Progress = Callable[[int, int], object]
TRACED, TRACE_BYTES = 64, 2**28


@dataclass(frozen=True)
class Rule:
    """What is drawn. `guidance` 1 is none. `prompts` only where the model takes them."""

    images: int = 256
    steps: int = 50
    guidance: float = 1.0
    seed: int = 0
    batch: int = 64
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("images", "steps", "batch"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.guidance < 1e3:
            raise SettingsError(f"guidance is {self.guidance}; give 1 for none, usually 1.5 to 7.5.")

    def chunks(self) -> Iterator[range]:
        """The numbers of the images, batch by batch."""
        for start in range(0, self.images, self.batch):
            yield range(start, min(self.images, start + self.batch))


@dataclass(frozen=True)
class Trace:
    """Every step of the first `K` images, on the CPU.

    `latents`: `[S, K, ...]` float32 after each step. `inputs`, `noise`: `[S, K, ...]`, what the transformer saw and
    predicted, empty for a pipeline that is not drawn step by step here. `timesteps`: one per step.
    """

    timesteps: tuple[float, ...]
    latents: torch.Tensor = field(repr=False)
    inputs: torch.Tensor = field(repr=False)
    noise: torch.Tensor = field(repr=False)


@dataclass(frozen=True)
class Drawn:
    """`images`: `[N, C, H, W]` float32 in [0, 1] on the CPU (a film's frames side by side in height). `asked`: `[N]`
    int64, the class or the number of the prompt. `seconds`: per image, drawing a batch at a time."""

    images: torch.Tensor = field(repr=False)
    asked: torch.Tensor = field(repr=False)
    trace: Trace = field(repr=False)
    seconds: float
    memory: Rise


@torch.no_grad()
def draw(painter: Painter, rule: Rule, progress: Progress | None = None) -> Drawn:
    """Draws `rule.images` images.

    Raises:
        SettingsError: prompts for a model that takes classes, none for one that wants them, or too many steps.
        ModelError: an image that is not finite.
    """
    if painter.pipeline is None and rule.prompts:
        raise SettingsError(f"{painter.name} draws {painter.classes} classes and takes no prompts; leave them out.")
    if painter.pipeline is not None and not rule.prompts:
        raise SettingsError(f"{painter.name} wants prompts; give a text file with one in each line.")
    images: list[torch.Tensor] = []
    asked: list[torch.Tensor] = []
    traces: list[Trace] = []
    start, kept = time.perf_counter(), 0
    with watch(painter.device) as watched:
        for chunk in rule.chunks():
            made, asked_B, trace = (_prompted if painter.pipeline is not None else _classes)(painter, rule, chunk, kept)
            if not bool(made.isfinite().all()):
                raise ModelError(f"{painter.name}: drew an image that is not finite (seed {rule.seed + chunk[0]} on).")
            images.append(made)
            asked.append(asked_B)
            if trace is not None:
                traces.append(trace)
                kept += trace.latents.shape[1]
            if progress is not None:
                progress(chunk[-1] + 1, rule.images)
    seconds = (time.perf_counter() - start) / rule.images
    return Drawn(torch.cat(images), torch.cat(asked), _joined(traces), seconds, watched.result)


@torch.no_grad()
def forced(painter: Painter, trace: Trace, asked_K: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Returns `[S, K, ...]` float32: the noise that `painter` predicts on the inputs of another model's trace."""
    found = [
        torch.cat([predict(painter, x, t, y, rule.guidance) for x, y in _split(inputs, asked_K, rule.batch)])
        for t, inputs in zip(trace.timesteps, trace.inputs, strict=True)
    ]
    return torch.stack(found)


def predict(painter: Painter, x_B: torch.Tensor, t: float, y_B: torch.Tensor, guidance: float) -> torch.Tensor:
    """Returns the guided noise `[B, C, H, W]` float32 on the CPU for inputs `x_B` at timestep `t` and classes `y_B`."""
    x, y = x_B.to(painter.device, painter.dtype), y_B.to(painter.device)
    if guidance > 1:
        x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, painter.classes)])
    times = torch.full((len(x),), t, device=x.device)
    noise = painter.transformer(x, timestep=times, class_labels=y).sample.float()
    noise = noise[:, : x.shape[1]]  # DiT may predict a variance after the noise; a scheduler of fixed variance drops it
    if guidance > 1:
        with_class, without = noise.chunk(2)
        noise = without + guidance * (with_class - without)
    return noise.cpu()


def _classes(painter: Painter, rule: Rule, chunk: range, kept: int) -> tuple[torch.Tensor, torch.Tensor, Trace | None]:
    config, scheduler = painter.settings, painter.scheduler
    side = config["sample_size"]
    generators = [torch.Generator().manual_seed(rule.seed + i) for i in chunk]
    x = torch.stack([torch.randn(config["in_channels"], side, side, generator=each) for each in generators])
    y = torch.tensor([i % painter.classes for i in chunk])
    try:
        scheduler.set_timesteps(rule.steps)
    except ValueError as error:  # more steps than it was trained for
        raise SettingsError(f"steps is {rule.steps}: the scheduler takes fewer ({first_line(error)})") from None
    x = x * scheduler.init_noise_sigma
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    keep = _room(x, rule, kept)
    inputs: list[torch.Tensor] = []
    noises: list[torch.Tensor] = []
    latents: list[torch.Tensor] = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        noise = predict(painter, seen, float(t), y, rule.guidance)
        x = scheduler.step(noise, t, x, **extra).prev_sample
        inputs.append(seen[:keep].clone())
        noises.append(noise[:keep])
        latents.append(x[:keep].clone())
    times = tuple(float(t) for t in scheduler.timesteps)
    trace = Trace(times, torch.stack(latents), torch.stack(inputs), torch.stack(noises)) if keep else None
    if painter.vae is not None:
        scaled = (x / painter.vae.config.scaling_factor).to(painter.device, painter.vae.dtype)
        x = painter.vae.decode(scaled).sample.float().cpu()
    return (x / 2 + 0.5).clamp(0, 1), y, trace


def _prompted(painter: Painter, rule: Rule, chunk: range, kept: int) -> tuple[torch.Tensor, torch.Tensor, Trace | None]:
    numbers = [i % len(rule.prompts) for i in chunk]
    latents: list[torch.Tensor] = []
    times: list[float] = []

    def keep(t: Any, x: torch.Tensor) -> dict[str, Any]:
        times.append(float(t))
        latents.append(x[: _room(x, rule, kept)].detach().float().cpu())
        return {}

    watching: dict[str, Any] = {"callback_on_step_end": lambda _, __, t, tensors: keep(t, tensors["latents"])}
    if "callback_on_step_end" not in inspect.signature(painter.pipeline.__call__).parameters:
        watching = {"callback": lambda _, t, x: keep(t, x)}  # PixArt's pipelines have the older one

    made = painter.pipeline(
        prompt=[rule.prompts[number] for number in numbers],
        num_inference_steps=rule.steps,
        guidance_scale=rule.guidance,
        generator=[torch.Generator().manual_seed(rule.seed + i) for i in chunk],
        output_type="pt",
        **watching,
    )
    out = made.images if hasattr(made, "images") else made.frames
    out = out if isinstance(out, torch.Tensor) else torch.stack(list(out))
    images = out.float().cpu()
    if images.ndim == 5:  # [B, F, C, H, W]: frames of a film
        images = images.movedim(1, 2).flatten(2, 3)
    none = torch.empty(0)
    trace = Trace(tuple(times), torch.stack(latents), none, none) if latents and latents[0].numel() else None
    return images.clamp(0, 1), torch.tensor(numbers), trace


def _room(x_B: torch.Tensor, rule: Rule, kept: int) -> int:
    """How many images of a batch are still traced: `TRACED` in all, and at most `TRACE_BYTES` for one of the lists."""
    each = 4 * rule.steps * x_B[0].numel()
    return max(0, min(len(x_B), min(TRACED, max(1, TRACE_BYTES // each)) - kept))


def _joined(traces: list[Trace]) -> Trace:
    if not traces:
        return Trace((), torch.empty(0), torch.empty(0), torch.empty(0))
    stepwise = traces[0].inputs.numel() > 0
    none = torch.empty(0)
    return Trace(
        traces[0].timesteps,
        torch.cat([trace.latents for trace in traces], 1),
        torch.cat([trace.inputs for trace in traces], 1) if stepwise else none,
        torch.cat([trace.noise for trace in traces], 1) if stepwise else none,
    )


def _split(x: torch.Tensor, y: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(x.split(size), y.split(size), strict=True)
