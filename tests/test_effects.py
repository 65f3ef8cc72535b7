"""Timesteps weighed by what their errors do to the image: the measure, and the Hessians that it weighs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_dit
import tiny
import tiny_dit
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import quant
from quant.calibration import effects as measure
from quant.calibration import painting
from quant.calibration.batch import Mixed
from quant.calibration.capture import Stage
from quant.calibration.effects import Answer, effects, relative
from quant.calibration.trajectory import passes
from quant.decoupled import SPLITS
from quant.errors import CalibrationError
from quant.models.walk import Site
from quant.planning import probes
from quant.prepare import prepare
from quant.recipe import Calibration, Recipe, Trajectory, recipe_from_dict
from quant.recovery.timesteps import usual_errors


@pytest.mark.parametrize("copies", [1, 2])  # rows of a pass for each sample, as guidance doubles them
@pytest.mark.parametrize("calls", [1, 2])  # passes of a step
def test_an_effect_is_what_schedule_and_later_steps_make_of_an_error(copies: int, calls: int) -> None:
    """Linear steps, `x - c said` with `said = a x`: an error at step n is multiplied by c_n, then by each (1 - a c)."""
    c, a = [0.5, 0.3, 0.1], 0.7
    start = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    asked: list[int] = []

    def draw(answer: Answer) -> Tensor:
        x = start
        for number, factor in enumerate(c):

            def ask(number: int = number, x: Tensor = x) -> dict[str, Tensor]:
                asked.append(number)
                return {"sample": a * torch.cat([x] * copies)}

            said = [answer(number, ask)["sample"] for _ in range(calls)]
            x = x - factor * torch.stack(said).view(-1, 4, 5).mean(0)
        return x

    expected = [(0.5 * (1 - a * 0.3) * (1 - a * 0.1)) ** 2, (0.3 * (1 - a * 0.1)) ** 2, 0.1**2]
    assert effects([draw, draw], 0) == pytest.approx(expected, rel=1e-3)
    if calls == 1:
        assert asked == 2 * [0, 1, 2, 1, 2, 2]  # what was said before the error is not asked again


def test_effects_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        effects([lambda answer: answer(0, lambda: torch.ones(2, 3)) * torch.inf], 0)
    with pytest.raises(CalibrationError, match="2 samples with 3 rows"):
        effects([lambda answer: answer(0, lambda: torch.ones(3, 3))[:2]], 0)


def test_weights_have_mean_one_over_rows() -> None:
    weights = relative([4.0, 1.0], [0, 0, 1], [2, 1, 5])
    assert weights == pytest.approx([32 / 17, 32 / 17, 8 / 17])
    assert sum(w * n for w, n in zip(weights, (2, 1, 5), strict=True)) == pytest.approx(8)


def test_a_usual_error_is_a_mean_of_its_timestep() -> None:
    """However many rows have it: they lie in several batches, and some timesteps in more of them."""
    errors = [torch.tensor([1.0, 3.0, 10.0]), torch.tensor([5.0])]
    assert usual_errors(errors, [torch.tensor([0, 0, 2]), torch.tensor([0])]).tolist() == [3, 0, 10]


def test_a_batch_counts_as_much_as_its_weight_says() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 8)})
    stage = Stage(model, [Site("a", "linear", 8, 6, False)], cross=False)
    first, second = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    stage.take(torch.tensor(1.5))(0, first)
    stage.take(torch.tensor(0.5))(0, second)
    wanted = 1.5 * first.reshape(-1, 6).T @ first.reshape(-1, 6) + 0.5 * second.reshape(-1, 6).T @ second.reshape(-1, 6)
    torch.testing.assert_close(stage.finish()[0].hessian, wanted / 24)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_trajectory_is_weighed_and_stays_what_it_was(scheduler: str, tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float", scheduler)
    plain = Recipe(calibration=Calibration(samples=6, batch_size=4), trajectory=Trajectory(steps=4, keep=2))
    image = replace(plain, trajectory=replace(plain.trajectory, weighting="image"))
    assert recipe_from_dict(image.to_dict()) == image
    without, weighed = (prepare(str(source), recipe).samples for recipe in (plain, image))
    assert without.weights is None
    assert weighed.weights is not None
    assert weighed.tokens_sha256() == without.tokens_sha256()
    rows = [len(batch["hidden_states"]) for batch in weighed.batches]
    assert sum(w * n for w, n in zip(weighed.weights, rows, strict=True)) == pytest.approx(sum(rows), rel=1e-5)
    assert max(weighed.weights) > 1.2 * min(weighed.weights)


def test_mixed_batches_hold_every_row_once_and_all_parts_of_the_way(tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float", "DDIMScheduler")
    recipe = Recipe(calibration=Calibration(samples=8, batch_size=4), trajectory=Trajectory(steps=4, keep=2))
    batches = prepare(str(source), recipe).samples.batches
    mixed = Mixed(batches, 6)
    assert [len(batch["hidden_states"]) for batch in mixed] == [6, 5, 5]
    assert all(len(set(batch["timestep"].tolist())) == 4 for batch in mixed)
    for batch, times in zip(mixed, mixed.times, strict=True):
        ranked = batch["timestep"].unique()
        assert torch.equal(ranked[times], batch["timestep"])
    rows = torch.cat([batch["hidden_states"] for batch in mixed]).flatten(1)
    before = torch.cat([batch["hidden_states"] for batch in batches]).flatten(1)
    assert {tuple(row) for row in rows.tolist()} == {tuple(row) for row in before.tolist()}
    other = {**batches[0], "hidden_states": torch.zeros(4, 4, 16, 16)}
    apart = Mixed([*batches, other], 6)
    assert len(apart) == len(batches) + 1


PAINTED = Recipe(
    spec=quant.Uniform(bits=2, group_size=16),
    calibration=Calibration(samples=8, batch_size=8),
    trajectory=Trajectory(steps=5, keep=2, weighting="image"),
)


@pytest.mark.parametrize("weighting", ["uniform", "image"])
def test_a_dry_run_counts_the_passes(weighting: Any, tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float", "DDIMScheduler")
    way = Trajectory(steps=4, keep=2, weighting=weighting)
    prepared, rows = prepare(str(source), replace(PAINTED, trajectory=way)), list[int]()
    count = lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"]))  # noqa: E731
    prepared.skeleton.model.register_forward_pre_hook(count, with_kwargs=True)
    _ = prepared.samples
    assert sum(rows) == passes(PAINTED.calibration or Calibration(), way, weighting == "image")


@pytest.mark.parametrize("sensitivity", ["output", "image"])
def test_a_dry_run_counts_what_choosing_bits_takes(sensitivity: Any, tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float", "DDIMScheduler")
    made = replace(PAINTED, average=5.0, widths=(2, 4, 8), sensitivity=sensitivity)
    prepared, calls = prepare(str(source), replace(made, trajectory=Trajectory(steps=4, keep=4))), list[int]()
    few = len(prepared.samples.batches)
    prepared.skeleton.model.register_forward_pre_hook(lambda *_: calls.append(1))
    _ = prepared.plan
    counted = probes(prepared.recipe, prepared.source, len(prepared.walk.sites), few)
    assert counted - SPLITS * 4 * (sensitivity == "image") <= len(calls) <= counted  # fewer where splits are alike


@pytest.mark.parametrize("prompts", [None, "7\n11\n"])
def test_bits_by_the_image_are_chosen_in_the_pipeline(prompts: str | None, tmp_path: Path) -> None:
    """As by its transformer alone from the same noise and labels; a file of labels is read, guidance is the
    pipeline's."""
    test_dit.pipeline(tmp_path / "float")
    seeds = [torch.Generator().manual_seed(n) for n in range(8)]
    start = torch.cat([torch.randn((1, 4, 8, 8), generator=seed) for seed in seeds])
    labels = torch.randint(0, 1000, (8,), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(samples=8, batch_size=4)
    if prompts is not None:
        (tmp_path / "labels.txt").write_text(prompts)
        labels = torch.tensor([7, 11] * 4)
        calibration = replace(calibration, text=str(tmp_path / "labels.txt"))
    save_file({"hidden_states": start, "class_labels": labels}, tmp_path / "start.safetensors")
    own = replace(PAINTED, average=5.0, widths=(2, 8), sensitivity="image", trajectory=Trajectory(3, 1, guidance=1.0))
    own = replace(own, calibration=calibration)
    alone = replace(own, calibration=replace(calibration, text=str(tmp_path / "start.safetensors")))
    plan = prepare(str(tmp_path / "float"), own).plan
    assert plan.specs == prepare(str(tmp_path / "float" / "transformer"), alone).plan.specs
    assert len({spec.bits for spec in plan.specs.values() if isinstance(spec, quant.Uniform)}) == 2
    assert prepare(str(tmp_path / "float"), guided(own, 4.0)).plan.specs


def guided(recipe: Recipe, guidance: float) -> Recipe:
    return replace(recipe, trajectory=replace(recipe.trajectory, guidance=guidance))


def weights(folder: Path, recipe: Recipe) -> dict[str, float]:
    found = prepare(str(folder), recipe).samples.by_timestep()
    assert found
    return found


@pytest.mark.parametrize(("guidance", "tolerance"), [(1.0, 1e-4), (4.0, 0.03)])
def test_a_pipeline_weighs_as_its_transformer_alone(
    guidance: float, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same noise, by the same sampler. Under guidance the errors are of another size, since a transformer
    alone has it relative to the guided prediction: they agree where errors are small."""
    monkeypatch.setattr(measure, "SIZE", 0.02 if guidance == 1 else 1e-3)
    test_dit.pipeline(tmp_path / "float")
    seeds = [torch.Generator().manual_seed(n) for n in range(8)]
    start = torch.cat([torch.randn((1, 4, 8, 8), generator=seed) for seed in seeds])
    labels = torch.randint(0, 1000, (8,), generator=torch.Generator().manual_seed(0))
    save_file({"hidden_states": start, "class_labels": labels}, tmp_path / "start.safetensors")
    alone = replace(PAINTED, calibration=Calibration(str(tmp_path / "start.safetensors"), samples=8, batch_size=8))
    found = weights(tmp_path / "float", guided(PAINTED, guidance))
    assert found == pytest.approx(weights(tmp_path / "float" / "transformer", guided(alone, guidance)), rel=tolerance)
    assert max(found.values()) > 100 * min(found.values())


def test_a_doubled_batch_weighs_as_two_calls_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SIZE", 1e-3)  # relative to the first call of a step, which has half of the rows here
    test_dit.pipeline(tmp_path / "float")
    doubled = weights(tmp_path / "float", guided(PAINTED, 4.0))
    load = painting._load  # pyright: ignore[reportPrivateUsage]

    class Twice(tiny_dit.library().DiTPipeline):
        def __call__(self, class_labels: Any, generator: Any, num_inference_steps: int, **_: Any) -> None:
            x = torch.cat([torch.randn((1, 4, 8, 8), generator=one) for one in generator])
            labels = torch.tensor(class_labels)
            self.scheduler.set_timesteps(num_inference_steps)
            for time in self.scheduler.timesteps:
                given = {"timestep": time.expand(len(x)), "return_dict": False}
                told = self.transformer(x, class_labels=labels, **given)[0][:, :4]
                free = self.transformer(x, class_labels=torch.full_like(labels, 1000), **given)[0][:, :4]
                x = self.scheduler.step(free + 4.0 * (told - free), time, x).prev_sample

    def twice(skeleton: Any) -> Any:
        pipe = load(skeleton)
        pipe.__class__ = Twice
        return pipe

    monkeypatch.setattr(painting, "_load", twice)
    assert weights(tmp_path / "float", guided(PAINTED, 4.0)) == pytest.approx(doubled, rel=0.03)


def test_a_pipeline_is_quantized_by_its_weights_and_says_them(tmp_path: Path) -> None:
    test_dit.pipeline(tmp_path / "float")
    small = replace(PAINTED, calibration=Calibration(samples=3, batch_size=2), only=("*ff*",))
    runs = {
        name: quant.quantize(str(tmp_path / "float"), tmp_path / name, recipe)
        for name, recipe in {
            "first": small,
            "second": small,
            "alike": replace(small, trajectory=Trajectory(5, 2)),
        }.items()
    }
    assert tiny.contents(tmp_path / "first", people=False) == tiny.contents(tmp_path / "second", people=False)
    said = runs["first"].report["calibration"]["timesteps"]
    assert len(said) == 5
    assert said == weights(tmp_path / "float", small)
    assert max(said.values()) > 2 * min(said.values())
    assert "timesteps" not in runs["alike"].report["calibration"]
    models = [quant.load(tmp_path / name, dequantize=True).state_dict() for name in ("first", "alike")]
    assert any(not torch.equal(models[0][key], models[1][key]) for key in models[0] if "ff" in key)


def test_a_scheduler_with_noise_of_its_own_draws_the_same_each_time(tmp_path: Path) -> None:
    """DiTPipeline gives its scheduler no generator."""
    pipe = test_dit.pipeline(tmp_path / "float")
    pipe.register_modules(scheduler=tiny_dit.library().DDPMScheduler())
    pipe.save_pretrained(tmp_path / "float")
    first = prepare(str(tmp_path / "float"), guided(PAINTED, 1.0)).samples
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = prepare(str(tmp_path / "float"), guided(PAINTED, 1.0)).samples
    assert (first.tokens_sha256(), first.weights) == (again.tokens_sha256(), again.weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.by_timestep() != dict.fromkeys(first.by_timestep() or (), 1.0)
