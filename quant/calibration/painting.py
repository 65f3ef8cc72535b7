"""Calibration inputs from a pipeline at work: its prompts, text encoders, scheduler and guidance, as users run it.

The pipeline is called as anybody would call it, and what it gives its transformer is kept, for some steps of each
sample (see `trajectory`). So nothing is known here of any pipeline but two names of arguments, `prompt` and
`class_labels`. Each sample has a generator of its own: the batch size changes none of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.batch import joined, rows, shapes
from quant.calibration.effects import SAMPLES, Answer, effects, honest, relative
from quant.calibration.hearing import Hear, hearing, stepping
from quant.calibration.pictures import Pictures, fresh, pictures
from quant.calibration.prompts import prompts
from quant.calibration.replay import Stop, instead
from quant.calibration.samples import Batch, Samples, moved
from quant.errors import CalibrationError, ModelError, SettingsError
from quant.models.diffusion import DiffusionSkeleton, components, named, quiet
from quant.models.source import PIPELINE, Source, first_line, read_json, variant
from quant.models.stream import outside_blocks
from quant.recipe import Calibration, Recipe, Trajectory

LIBRARIES = ("diffusers", "transformers")


def complete(source: Source) -> str | None:
    """None if the transformer's whole pipeline is there to be run, else what is missing."""
    if not source.inside:
        return "it stands alone"
    for name, (library, _) in components(source.home).items():
        if library not in LIBRARIES:
            return f"its {name} is of {library}, not of diffusers or transformers"
        if not (source.home / name).is_dir():
            return f"its {name} is missing"
    if not (read_json(source.home / PIPELINE).get("vae") or [None])[0]:  # pipelines do not load without
        return "it has no vae"
    return None


def follow(skeleton: DiffusionSkeleton, chain: Sequence[str], recipe: Recipe, limit: int, weighed: bool) -> Samples:
    """Runs the pipeline for `recipe.calibration.samples` samples. `limit`: bytes of weights up to which the transformer
    stays in memory; a larger one loads each block for its turn. `weighed`: with each batch's effect on the final
    image, measured on the first samples.

    Raises:
        ModelError: diffusers cannot load the pipeline.
        CalibrationError: the prompts do not fit, or the pipeline fails on them.
    """
    calibration, trajectory = recipe.calibration, recipe.trajectory
    assert calibration is not None
    paint = _painter(skeleton, calibration, trajectory)
    kept: dict[int, list[Batch]] = {}
    with torch.no_grad(), _present(skeleton, chain, limit), quiet():
        for samples in paint.parts(calibration.samples):
            for step, given in paint.calls(samples):
                which = [n for n in samples if step in trajectory.kept(n, trajectory.steps)]
                again = len(given["hidden_states"]) // len(samples)
                places = [half * len(samples) + n - samples[0] for half in range(again) for n in which]
                if places:
                    part = moved(rows(given, torch.tensor(places)), "cpu")
                    if paint.seen is not None:
                        part["hidden_states"] = _noisy(paint.seen, paint.pipe.scheduler, step, part, which)
                    kept.setdefault(step, []).append(part)
        first = paint.parts(min(SAMPLES, calibration.samples)) if weighed else []
        found = effects([partial(paint, part) for part in first], calibration.seed)
    steps = [(step, batch) for step in sorted(kept) for batch in _packed(kept[step], calibration.batch_size)]
    if not steps:
        raise _uncalled(skeleton, calibration)
    batches, counts = tuple(batch for _, batch in steps), [len(batch["hidden_states"]) for _, batch in steps]
    guidance = "its own guidance" if trajectory.guidance is None else f"guidance {trajectory.guidance:g}"
    text = (
        f"{paint.name}; {trajectory.steps} steps of {type(paint.pipe).__name__} with "
        f"{type(paint.pipe.scheduler).__name__}, {min(trajectory.keep, trajectory.steps)} kept of each sample, "
        f"{guidance}, seed {calibration.seed}"
    )
    weights = relative(found, [step for step, _ in steps], counts) if weighed else None
    probe = rows(batches[len(batches) // 2], torch.tensor([0]))
    return Samples(batches, text, paint.sha256, sum(counts), probe, weights)


def outline(skeleton: DiffusionSkeleton, chain: Sequence[str], recipe: Recipe) -> tuple[Batch, int, int]:
    """A batch like the largest that `follow` will give, how many there will be, and the rows of a sample under its
    guidance: by what the pipeline calls its transformer with in its first step, answered with zeros."""
    calibration, steps = recipe.calibration, range(recipe.trajectory.steps)
    assert calibration is not None
    paint, asked = _painter(skeleton, calibration, recipe.trajectory), list[Batch]()
    parts = paint.parts(calibration.samples)

    def hear(step: int, given: Batch, ask: Callable[[], Any]) -> Any:
        if step:
            raise Stop
        asked.append(_own(given))
        return (torch.zeros_like(given["hidden_states"]),)

    try:
        with torch.no_grad(), _present(skeleton, chain, 0), quiet(), suppress(Stop):
            paint.run(parts[0], hear)
    except CalibrationError:  # of this answer, perhaps
        if not asked:
            raise
    if not asked:
        raise _uncalled(skeleton, calibration)
    some = lambda one, count: rows(one, torch.arange(count) % len(one["hidden_states"]))  # noqa: E731
    times = [(moved(one, "meta"), len(one["hidden_states"]) // len(parts[0])) for one in asked]
    kept = [[sum(step in recipe.trajectory.kept(n, len(steps)) for n in part) for part in parts] for step in steps]
    made = [[some(one, n * rowed) for n in counts if n for one, rowed in times] for counts in kept]
    sizes = [len(one["hidden_states"]) for calls in made for one in _packed(calls, calibration.batch_size)]
    return some(asked[0], max(sizes)), len(sizes), sum(rowed for _, rowed in times)


def _uncalled(skeleton: DiffusionSkeleton, calibration: Calibration) -> CalibrationError:
    return CalibrationError(
        f"{skeleton.source.name}: its pipeline did not call its {skeleton.source.inside} in the steps kept of "
        f"{calibration.samples} samples; raise trajectory.keep, trajectory.steps or --samples"
    )


def drawer(skeleton: DiffusionSkeleton, recipe: Recipe) -> Callable[[], Tensor]:
    """Draws the final latents float32 `[rows, ..., height, width]` of the first samples with the pipeline, as its
    transformer, whose weights must be in memory, is just then.

    Raises:
        SettingsError: the latents are packed tokens, of which nobody here knows which lie side by side.
    """
    calibration = recipe.calibration
    assert calibration is not None
    if skeleton.form.layout == "packed":
        raise SettingsError(
            f"{skeleton.source.name}: sensitivity=image compares images, and its latents are packed tokens; leave it "
            "at output"
        )
    paint = _painter(skeleton, calibration, recipe.trajectory)

    def draw() -> Tensor:
        with torch.no_grad(), quiet():
            return torch.cat([paint(part, honest) for part in paint.parts(min(SAMPLES, calibration.samples))])

    return draw


@dataclass(frozen=True)
class _Painter:
    """A pipeline and what it is to show: `prompts`, given as its argument `asked`; their `name` and `sha256`. `seen`:
    real images."""

    pipe: Any
    skeleton: DiffusionSkeleton
    calibration: Calibration
    asked: str
    prompts: list[Any]
    name: str
    sha256: str
    seen: Pictures | None
    options: dict[str, Any]

    def parts(self, count: int) -> list[range]:
        """The first samples in batches."""
        size = self.calibration.batch_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def calls(self, samples: range) -> list[tuple[int, Batch]]:
        """What the transformer is called with, and at which step."""
        found: list[tuple[int, Batch]] = []

        def hear(step: int, given: Batch, ask: Callable[[], Any]) -> Any:
            found.append((step, _own(given)))
            return ask()

        self.run(samples, hear)
        return found

    def __call__(self, samples: range, answer: Answer) -> Tensor:
        """Draws: see `effects.Draw`."""
        device = self.skeleton.device
        end = self.run(samples, lambda step, _, ask: moved(answer(step, lambda: moved(ask(), "cpu")), device))
        if not end:
            raise CalibrationError(
                f"{self.skeleton.source.name}: its pipeline takes no step of its scheduler, which would tell what an "
                "error does to the image; give the folder of its transformer as the model"
            )
        return end[0][: len(samples)].float().cpu()

    def run(self, samples: range, hear: Hear) -> list[Tensor]:
        """Runs the pipeline with `hear` in its transformer's place; the latents of its scheduler's last step, if it
        took one."""
        some, seed, ends = [self.prompts[n] for n in samples], self.calibration.seed, list[Tensor]()
        seeds = [torch.Generator().manual_seed(seed + n) for n in samples]
        model, scheduler = self.skeleton.model, self.pipe.scheduler
        heard, stepped = hearing(model, hear), stepping(scheduler, ends)
        mine = torch.random.fork_rng([self.skeleton.device] if self.skeleton.device.startswith("cuda") else [])
        with instead(model, "forward", heard), instead(type(scheduler), "step", stepped), mine:
            torch.manual_seed(seed + samples[0])  # for schedulers that their pipeline gives no generator
            try:
                self.pipe(**{self.asked: some}, generator=seeds, **self.options)
            except CalibrationError:
                raise
            except Exception as error:  # a pipeline may raise anything
                raise CalibrationError(
                    f"{self.skeleton.source.name}: its pipeline failed on {some[:1]} ({first_line(error)}); see that "
                    "it runs in diffusers by itself"
                ) from error
        return ends


def _painter(skeleton: DiffusionSkeleton, calibration: Calibration, trajectory: Trajectory) -> _Painter:
    pipe = _load(skeleton)
    takes = inspect.signature(type(pipe).__call__).parameters
    by_label, untaken = "class_labels" in takes, sorted(trajectory.size.keys() - takes)
    if untaken:
        raise SettingsError(f"{type(pipe).__name__} takes no {', '.join(untaken)}; leave that of the trajectory at 0")
    seen = pictures(skeleton, calibration, pipe.scheduler)
    shown = prompts(calibration, skeleton.config if by_label else None, seen)
    options: dict[str, Any] = {"num_inference_steps": trajectory.steps, "output_type": "latent", **trajectory.size}
    if trajectory.guidance is not None:
        options["guidance_scale"] = trajectory.guidance
    return _Painter(pipe, skeleton, calibration, "class_labels" if by_label else "prompt", *shown, seen, options)


def _load(skeleton: DiffusionSkeleton) -> Any:
    home = skeleton.source.home
    index = read_json(home / PIPELINE)
    cls = named(index.get("_class_name"), "DiffusionPipeline", home / PIPELINE)
    own = {name: None for name, value in index.items() if value == [None, None]}  # left out, and to be said so
    own |= {skeleton.source.inside: skeleton.model}
    try:
        with quiet():
            pipe = cls.from_pretrained(home, torch_dtype=skeleton.dtype, **own)
    except Exception as error:  # whatever a component's loader raises
        why = f"{first_line(error)}{variant(home, '*/*.*.safetensors')}"
        raise ModelError(f"{home}: diffusers cannot load this pipeline ({why})") from error
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not skeleton.model:
            part.to(skeleton.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _noisy(seen: Pictures, scheduler: Any, step: int, part: Batch, which: list[int]) -> Tensor:
    """Real images in the place of the pipeline's own latents at a step, for both halves under guidance."""
    schedule, time, own = fresh(scheduler), scheduler.timesteps[step], part["hidden_states"]
    seen.check(own.shape[1:])
    x = seen.at(schedule, time, which)
    x = schedule.scale_model_input(x, time) if hasattr(schedule, "scale_model_input") else x
    return x.repeat(len(own) // len(x), 1, 1, 1).to(own.dtype)


def _own(given: dict[str, Any]) -> Batch:
    """With memory of their own: schedulers may write into their latents."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in given.items()}


@contextmanager
def _present(skeleton: DiffusionSkeleton, chain: Sequence[str], limit: int) -> Generator[None]:
    """The transformer's weights in memory: all, or each block's while it runs."""
    blocks = [] if skeleton.source.nbytes() <= limit else list(chain)
    outside, head = outside_blocks(skeleton, chain)
    there = [*outside, *head] if blocks else skeleton.names_under("")
    skeleton.load(there)
    with ExitStack() as hooks:
        hooks.callback(skeleton.unload, there)
        for name in blocks:
            names, module = skeleton.names_under(name), skeleton.model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, names=names: skeleton.load(names)))
            hooks.enter_context(module.register_forward_hook(lambda *_, names=names: skeleton.unload(names)))
        yield


def _packed(parts: Sequence[Batch], size: int) -> list[Batch]:
    """Parts of the same step joined to batches of at least `size` rows, where their shapes allow it."""
    made: list[Batch] = []
    for part in parts:
        if made and len(made[-1]["hidden_states"]) < size and shapes(made[-1]) == shapes(part):
            made[-1] = joined(made[-1], part)
        else:
            made.append(part)
    return made
