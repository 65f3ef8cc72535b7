"""Timesteps weighed by what their errors do to the image: the measure, and the Hessians that it weighs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.calibration.capture import Stage
from quant.calibration.effects import effects, relative
from quant.calibration.mixing import Mixed
from quant.models.walk import Site
from quant.prepare import prepare
from quant.recipe import Calibration, Recipe, Trajectory, recipe_from_dict
from tests import tiny_dit


def test_an_effect_is_what_schedule_and_later_steps_make_of_an_error() -> None:
    """Linear steps, `x - c said` with `said = a x`: an error at step n is multiplied by c_n, then by each (1 - a c)."""
    c, a = [0.5, 0.3, 0.1], 0.7

    def say(schedule: Any, number: int, x: Tensor) -> Tensor:
        assert schedule["at"] == number  # every way again starts from the schedule as it was there
        return a * x

    def step(schedule: Any, number: int, said: Tensor, x: Tensor) -> Tensor:
        schedule["at"] = number + 1
        return x - c[number] * said

    found = effects(say, step, {"at": 0}, torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), 3, 0)
    expected = [(0.5 * (1 - a * 0.3) * (1 - a * 0.1)) ** 2, (0.3 * (1 - a * 0.1)) ** 2, 0.1**2]
    assert found == pytest.approx(expected, rel=1e-3)


def test_weights_have_mean_one_over_rows() -> None:
    weights = relative([4.0, 1.0], [0, 0, 1], [2, 1, 5])
    assert weights == pytest.approx([32 / 17, 32 / 17, 8 / 17])
    assert sum(w * n for w, n in zip(weights, (2, 1, 5), strict=True)) == pytest.approx(8)


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
