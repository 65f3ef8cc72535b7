"""Calibration inputs of a diffusion transformer: its own way from noise to image, so no data set is needed.

Samples start from seeded noise and follow the float model's trajectory under the model's own scheduler (as VQ4DiT's
calibration does, arXiv 2408.17131, section 3.3). Of each, some steps are kept, spread evenly, and shifted from sample
to sample, so that all timesteps are seen equally often. What is kept are the transformer's own keyword arguments; from
there on they are batches like any other. A batch holds one timestep.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quant.calibration.batch import UNBATCHED, Batch, joined, rows
from quant.calibration.effects import SAMPLES, Answer, Draw, effects, honest, relative
from quant.calibration.pictures import Pictures, fresh, pictures
from quant.calibration.samples import Samples, read_text
from quant.checkpoint.shards import sha256
from quant.errors import CalibrationError, SettingsError
from quant.models.arguments import build, cast, own_size
from quant.models.diffusion import DiffusionSkeleton, scheduler
from quant.models.source import first_line
from quant.models.stream import Forward
from quant.recipe import Calibration, Recipe, Trajectory


@dataclass
class Way:
    """Samples on their way through the model as `forward` runs it: `given`, the arguments that stay; `x` float32, the
    latents; `schedule`, or None; `null`: the arguments of the unconditional half under guidance, or None; `seen`: real
    images, which noise is added to instead of taking any steps."""

    forward: Callable[[Sequence[Batch]], list[Tensor]]
    calibration: Calibration
    trajectory: Trajectory
    dtype: torch.dtype
    given: dict[str, Any]
    x: Tensor
    schedule: Any
    null: dict[str, Any] | None
    seen: Pictures | None = None

    @property
    def times(self) -> Tensor:
        if self.schedule is None:
            return torch.linspace(999, 1, self.trajectory.steps).round()
        return self.schedule.timesteps

    def walk(self) -> tuple[list[Batch], list[int]]:
        """All samples together, a step at a time; returns what was kept, and the number of each batch's step."""
        batches, steps = list[Batch](), list[int]()
        count, schedule, times, seed = len(self.x), self.schedule, self.times, self.calibration.seed
        for number, time in enumerate(times):
            if self.seen is not None:
                schedule = fresh(self.schedule)
                self.x = self.seen.at(schedule, time)
            given, null = self._given(schedule, time, self.x)
            kept = [n for n in range(count) if number in self.trajectory.kept(n, len(times))]
            for some in torch.tensor(kept, dtype=torch.int64).split(self.calibration.batch_size) if kept else ():
                part = rows(given, some)
                batches.append(part if null is None else joined(part, rows(null, some)))
                steps.append(number)
            if schedule is None:
                self.x = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(seed + 1 + number))
            elif number + 1 < len(times) and self.seen is None:
                self.x = _step(schedule, self._said(given, null), time, self.x, seed)
            if not bool(self.x.isfinite().all()):
                raise CalibrationError(f"the latents are not finite after step {number + 1}; try --dtype float32")
        return batches, steps

    def few(self) -> Draw:
        """Takes the first samples from noise to image."""
        first, start = torch.arange(min(SAMPLES, len(self.x))), {"hidden_states": self.x}
        null = None if self.null is None else rows({**start, **self.null}, first)
        given = {key: value for key, value in rows({**start, **self.given}, first).items() if key not in start}
        some = replace(self, given=given, x=self.x[first], null=null, seen=None)

        def draw(answer: Answer) -> Tensor:
            schedule, x = deepcopy(self.schedule), some.x
            for number, time in enumerate(self.times):
                given, null = some._given(schedule, time, x)
                said = answer(number, lambda given=given, null=null: some._said(given, null))
                x = _step(schedule, said, time, x, self.calibration.seed)
            return x

        return draw

    def _given(self, schedule: Any, time: Tensor, x: Tensor) -> tuple[Batch, Batch | None]:
        """The model's arguments at one step, and under guidance those of the unconditional half."""
        seen = schedule.scale_model_input(x, time) if hasattr(schedule, "scale_model_input") else x
        share = float(self.given["timestep"].max()) <= 1  # as `build` has told the model
        when = (time.float() / 1000 if share else time).expand(len(x)).clone()
        given = cast({"hidden_states": seen, **self.given, "timestep": when}, self.dtype)
        return given, None if self.null is None else {**given, "class_labels": self.null["class_labels"]}

    def _said(self, given: Batch, null: Batch | None) -> Tensor:
        parts = torch.arange(len(given["hidden_states"])).split(self.calibration.batch_size)
        said = torch.cat(self.forward([rows(given, part) for part in parts])).float().cpu()
        if null is not None:
            free = torch.cat(self.forward([rows(null, part) for part in parts])).float().cpu()
            said = free + (self.trajectory.guidance or 1) * (said - free)
        return said


def follow(skeleton: DiffusionSkeleton, forward: Forward, recipe: Recipe, weighed: bool) -> Samples:
    """The calibration inputs that a recipe asks for. `weighed`: with each batch's effect on the final image.

    Raises:
        CalibrationError: the file with prompts or tensors does not fit, or the latents leave the range of numbers.
    """
    calibration, trajectory = recipe.calibration, recipe.trajectory
    assert calibration is not None
    if recipe.importance is not None:
        raise SettingsError("importance weighs the tokens of a text; set it to null for a diffusion transformer")
    schedule = scheduler(skeleton.source)
    way, name, digest = _start(skeleton, forward, calibration, trajectory, schedule)
    found = None
    if weighed:  # all alike where there is no schedule
        found = [1.0] * len(way.times) if schedule is None else effects([way.few()], calibration.seed)
    batches, numbers = way.walk()
    steps = f"{trajectory.steps} steps of {type(schedule).__name__}" if schedule else "noise at all timesteps"
    kept = f"{min(trajectory.keep, trajectory.steps)} kept of each sample"
    text = f"{name}; {steps}, {kept}, guidance {trajectory.guidance or 1:g}, seed {calibration.seed}"
    tokens = sum(len(batch["hidden_states"]) for batch in batches)
    weights = found and relative(found, numbers, [len(batch["hidden_states"]) for batch in batches])
    probe = rows(batches[len(batches) // 2], torch.tensor([0]))
    return Samples(tuple(batches), text, digest, tokens, probe, weights)


def outline(skeleton: DiffusionSkeleton, calibration: Calibration, trajectory: Trajectory) -> tuple[Batch, int, int]:
    """A batch of the size of those that `follow` will give, made of noise, how many there will be, and the rows of a
    sample."""
    steps, count = trajectory.steps, calibration.samples
    kept = [sum(step in trajectory.kept(n, steps) for n in range(count)) for step in range(steps)]
    halves = 1 if (trajectory.guidance or 1) == 1 else 2
    size = min(calibration.batch_size, max(kept)) * halves
    given = build(skeleton.model, skeleton.form.layout, own_size(skeleton.config), size)
    return cast(given, skeleton.dtype), sum(-(-number // calibration.batch_size) for number in kept), halves


def passes(calibration: Calibration, trajectory: Trajectory, weighed: bool, piped: bool = False) -> int:
    """How many passes of a sample through the whole model `follow` takes; `piped`: that of `painting`, whose pipeline
    draws its own images also where real ones are then put in their place."""
    rows = calibration.samples * (trajectory.steps if piped else trajectory.steps - 1)
    if Path(calibration.text).is_dir() and not piped:
        rows = 0
    if weighed:
        rows += min(SAMPLES, calibration.samples) * trajectory.steps * (trajectory.steps + 1) // 2
    return rows


def noise(skeleton: DiffusionSkeleton) -> Samples:
    """For recipes that read nothing: the verification alone runs on one sample of noise."""
    given = build(skeleton.model, skeleton.form.layout, skeleton.form.traced, 1)
    return Samples((cast(given, skeleton.dtype),), "none (data-free)", "", 1, cast(given, skeleton.dtype))


def _start(
    skeleton: DiffusionSkeleton, forward: Callable[[Sequence[Batch]], list[Tensor]], calibration: Calibration,
    trajectory: Trajectory, schedule: Any,
) -> tuple[Way, str, str]:  # fmt: skip
    if trajectory.size:
        raise SettingsError("trajectory.height, width and frames are a pipeline's; a transformer alone has its own")
    generator = torch.Generator().manual_seed(calibration.seed)
    count = calibration.samples
    given = build(skeleton.model, skeleton.form.layout, own_size(skeleton.config), count, generator)
    seen = pictures(skeleton, calibration, schedule)
    told, name, digest = _told(calibration if seen is None else replace(calibration, text=Calibration.text), given)
    if seen is not None:
        seen.check(given["hidden_states"].shape[1:])
        told = {} if seen.labels is None or "class_labels" not in given else {"class_labels": seen.labels}
        name, digest = seen.name if told else f"{seen.name}, {name}", seen.sha256
    given |= told
    null = None
    if (trajectory.guidance or 1) != 1:
        if "class_labels" not in given:
            raise CalibrationError(
                f"trajectory.guidance is {trajectory.guidance:g}, and {type(skeleton.model).__name__} takes no class "
                "labels: guidance by text needs the pipeline's text encoder; leave it at 1"
            )
        null = {**given, "class_labels": torch.full_like(given["class_labels"], skeleton.config["num_embeds_ada_norm"])}
    if schedule is not None:
        _set(schedule, trajectory.steps)
    x = given.pop("hidden_states").float() * getattr(schedule, "init_noise_sigma", 1.0)
    return Way(forward, calibration, trajectory, skeleton.dtype, given, x, schedule, null, seen), name, digest


def _told(calibration: Calibration, given: Mapping[str, Any]) -> tuple[dict[str, Any], str, str]:
    """What the calibration file says of the arguments, repeated to fit; its name and sha256."""
    count, path = calibration.samples, Path(calibration.text)
    conditions = "random class labels" if "class_labels" in given else "seeded noise as text embeddings"
    if calibration.text == Calibration.text:
        return {}, conditions if len(given) > 2 else "no condition", ""
    if path.suffix != ".safetensors":
        text = read_text(calibration)
        lines = [line.strip() for line in text.text.splitlines() if line.strip()]
        if "class_labels" not in given or not all(line.isdecimal() for line in lines):
            raise CalibrationError(
                f"calibration {text.name}: prompts need the pipeline's text encoder; give class labels, one a line, to "
                "a model that takes them, or a .safetensors file with the text embeddings (encoder_hidden_states, ...)"
            )
        labels = torch.tensor([int(lines[n % len(lines)]) for n in range(count)])
        return {"class_labels": labels}, f"labels of {text.name}", text.sha256
    try:
        tensors = load_file(path)
        digest = sha256(path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"calibration {path}: cannot be read ({first_line(error)})") from None
    for key, tensor in tensors.items():
        have = given.get(key)
        if not isinstance(have, Tensor) or tensor.dim() != have.dim() or tensor.shape[-1:] != have.shape[-1:]:
            wanted = {name: list(value.shape) for name, value in given.items() if isinstance(value, Tensor)}
            raise CalibrationError(
                f"calibration {path}: {key} {list(tensor.shape)} is none of the model's arguments {wanted}"
            )
    repeated = {key: x if key in UNBATCHED else x[torch.arange(count) % len(x)] for key, x in tensors.items()}
    return repeated, f"tensors of {path.name}", digest


def drawer(
    skeleton: DiffusionSkeleton, forward: Callable[[Sequence[Batch]], list[Tensor]], recipe: Recipe
) -> Callable[[], Tensor]:
    """Draws the final latents float32 `[rows, ...]` of the first samples, with `forward` as the model is just then."""
    calibration, trajectory, schedule = recipe.calibration, recipe.trajectory, scheduler(skeleton.source)
    if calibration is None or schedule is None or skeleton.form.layout == "packed":
        raise SettingsError(
            f"{skeleton.source.name}: sensitivity=image draws images; that takes a scheduler beside the model, and "
            "latents that are no packed tokens; leave it at output"
        )
    way, _, _ = _start(skeleton, forward, calibration, trajectory, schedule)
    draw = way.few()
    return lambda: draw(honest)


def _step(schedule: Any, said: Tensor, time: Tensor, x: Tensor, seed: int) -> Tensor:
    if said.shape != x.shape:  # a model that also predicts its variance: the mean comes first
        axis = next(axis for axis in range(1, x.dim()) if said.shape[axis] != x.shape[axis])
        if said.shape[axis] < x.shape[axis]:
            raise CalibrationError(
                f"the model answers latents {list(x.shape)} with {list(said.shape)}: it takes a condition beside its "
                "latents; calibrate it with --recipe rtn, or inside its pipeline"
            )
        said = said.narrow(axis, 0, x.shape[axis])
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(schedule.step).parameters:
        options["generator"] = torch.Generator().manual_seed(seed)
    return schedule.step(said, time, x, **options).prev_sample


def _set(schedule: Any, steps: int) -> None:
    dynamic = bool(schedule.config.get("use_dynamic_shifting"))
    schedule.set_timesteps(steps, **({"mu": 1.0} if dynamic else {}))
