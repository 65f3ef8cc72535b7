"""Rounded inputs from end to end: what calibration keeps, what solvers see, what a checkpoint promises and runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quant
from quant import Recipe
from quant.calibration.batch import timestep
from quant.calibration.capture import Stage, collect
from quant.calibration.replay import Replay
from quant.calibration.statistics import KEPT, RANGES, RangeCollector, Statistics
from quant.checkpoint.manifest import verify
from quant.errors import SettingsError, SolverError
from quant.kernels import dispatch, integer
from quant.kernels.spec import LowRank, Rotated, Smoothed, Spec, Uniform, rounds_inputs
from quant.linear import PackedLinear
from quant.models.arguments import build, find_form
from quant.models.stream import first_tensor
from quant.models.walk import Site
from quant.prepare import prepare
from quant.progress import Progress
from quant.recipe import Calibration, Trajectory, load_recipe, override, with_spec
from quant.rounding import seen_inputs
from quant.solvers.feedback import Feedback
from quant.solvers.nearest import Nearest
from quant.solvers.smoothing import smoothed
from tests import tiny, tiny_dit
from tests.conftest import ROOT

EIGHT = Uniform(bits=8, group_size=32, activations=8)
FOUR = Uniform(bits=4, group_size=32, activations=8)


@pytest.fixture(scope="module")
def layer(demo: Path) -> tuple[Tensor, Tensor]:
    """A trained weight, and 600 tokens with correlated channels, three of them much larger than the others."""
    stored = load_file(demo / "model.safetensors")
    names = sorted(name for name in stored if "gate_proj" in name)
    one, other = stored[names[0]].float(), stored[names[1]].float()
    tokens = torch.randn(600, len(other), generator=torch.Generator().manual_seed(0)) @ other
    tokens[:, [3, 40, 77]] *= 30
    return one[:96], tokens


class Timed(torch.nn.Module):
    """One block that is told no timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(x)


def seen(tokens: Tensor) -> Statistics:
    peaks = tokens.abs().amax(0)[None]
    return Statistics(tokens.T @ tokens / len(tokens), len(tokens), sample=tokens, peaks=peaks)


def test_largest_values_by_range_of_timesteps_and_some_tokens() -> None:
    made = RangeCollector(3)
    assert made.finish() is None
    for step in range(10):
        made.update(torch.full((7, 13, 3), step + 1.0) * torch.tensor([1.0, -2.0, 0.0]), float(step))
    made.update(torch.full((0, 3), 9.0), 3.0)
    peaks, sample = made.finish() or (torch.empty(0), torch.empty(0))
    assert peaks.tolist() == [[3, 6, 0], [6, 12, 0], [8, 16, 0], [10, 20, 0]]
    assert len(peaks) == RANGES
    assert KEPT <= len(sample) < 2 * KEPT
    counts = sample[:, 0].int().bincount()[1:]
    assert counts.max() - counts.min() <= 1  # spread evenly over all that came
    assert timestep({"timestep": torch.tensor([7, 7])}) == 7
    assert timestep({"input_ids": torch.zeros(1)}) == 0


def test_largest_values_are_kept_by_the_timestep_of_the_batch() -> None:
    stage = Stage(model := Timed(), [Site("inner.0", "linear", 3, 3)], cross=False, ranges=True)
    with Replay(model, ["inner"]) as replay:
        batches = [{"x": torch.full((2, 3), float(n)), "timestep": torch.tensor([n, n])} for n in range(1, 5)]
        collect([stage], replay, 0, batches, [None] * 4)
    peaks = stage.finish()[0].peaks
    assert peaks is not None
    assert peaks[:, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("spec", [EIGHT, FOUR, Rotated(EIGHT, measured=False), Smoothed(EIGHT), LowRank(FOUR, rank=4)])
def test_the_solvers_error_is_what_the_product_loses(spec: Spec, layer: tuple[Tensor, Tensor]) -> None:
    weight, tokens = layer
    found = Feedback().solve(weight, seen(tokens), spec)
    exact = tokens.double() @ weight.double().T
    lost = dispatch.matmul(tokens, found.packed).double() - exact
    assert found.error == pytest.approx(float(lost.square().sum() / exact.square().sum()), rel=0.1)
    assert found.noise > 0


def test_codes_are_found_for_the_inputs_as_they_are_rounded(layer: tuple[Tensor, Tensor]) -> None:
    """Their Hessian is that of the tokens and what rounding adds to each channel."""
    weight, tokens = layer
    noise = (integer.rounded(tokens) - tokens).square().mean(0)
    known = Statistics(seen(tokens).hessian + torch.diag(noise), len(tokens))
    for solver in (Feedback(), Nearest()):
        told = solver.solve(weight, seen(tokens), FOUR).packed
        plain, expected = (solver.solve(weight, s, replace(FOUR, activations=16)).packed for s in (seen(tokens), known))
        assert torch.equal(told.tensors()["weight"], expected.tensors()["weight"])
        assert not torch.equal(told.tensors()["weight"], plain.tensors()["weight"])


def test_outliers_want_another_basis(layer: tuple[Tensor, Tensor]) -> None:
    """At 8 bits of weights what is lost is lost by rounding the inputs."""
    weight, statistics = layer[0], seen(layer[1])
    error = {
        spec: Feedback().solve(weight, statistics, spec).error
        for spec in (EIGHT, Smoothed(EIGHT), Rotated(EIGHT, measured=False), Smoothed(Rotated(EIGHT, measured=False)))
    }
    plain, smoothed, rotated, both = error.values()
    assert smoothed < 0.1 * plain
    assert rotated < 0.1 * plain
    assert both < 0.5 * min(smoothed, rotated)
    assert Feedback().solve(weight, statistics, Rotated(EIGHT)).error <= min(plain, rotated)
    without = Feedback().solve(weight, replace(statistics, sample=None), EIGHT)
    assert without.noise == 0
    assert without.error < 0.5 * plain


def test_smoothing_is_searched_with_the_branch_active(layer: tuple[Tensor, Tensor]) -> None:
    weight, statistics = layer[0], seen(layer[1])
    base = Uniform(bits=3, group_size=32)
    for spec in (base, LowRank(base, rank=8), LowRank(FOUR, rank=8)):
        assert Feedback().solve(weight, statistics, Smoothed(spec)).error <= (
            Feedback().solve(weight, statistics, spec).error
        )
        assert Nearest().solve(weight, statistics, Smoothed(spec)).error <= (
            Nearest().solve(weight, statistics, spec).error
        )
    with pytest.raises(SolverError, match="none were seen"):
        Feedback().solve(weight, replace(statistics, peaks=None), Smoothed(base))


def test_smoothing_looks_at_every_range_of_timesteps(layer: tuple[Tensor, Tensor]) -> None:
    weight, tokens = layer
    peaks = tokens.abs().amax(0)
    ranges = torch.stack([peaks, peaks.flip(0)])
    known = (ranges, ranges.mean(0, keepdim=True), ranges[:1])
    spec = Smoothed(FOUR)
    found = [Nearest().solve(weight, replace(seen(tokens), peaks=one), spec).packed.tensors() for one in known]
    assert torch.equal(found[0]["smooth"], found[1]["smooth"])
    assert not torch.equal(found[0]["smooth"], found[2]["smooth"])


def test_smoothed_statistics_are_those_of_the_inputs_times_the_factors(layer: tuple[Tensor, Tensor]) -> None:
    tokens, m = layer[1], torch.rand(layer[1].shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    reference = tokens.flip(1)
    of = lambda x, y: Statistics(x.T @ x / 600, 600, y.T @ x / 600, sample=x, anchor=x[0])  # noqa: E731
    found, expected = smoothed(of(tokens, reference), m), of(tokens * m, reference * m)
    for name in ("hessian", "cross", "sample", "anchor"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spec", [FOUR, Rotated(FOUR, measured=False), LowRank(FOUR, rank=3)])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_model_under_calibration_sees_what_the_loaded_one_will(
    spec: Spec, smooth: bool, layer: tuple[Tensor, Tensor]
) -> None:
    weight, tokens = layer
    packed = Feedback().solve(weight, seen(tokens), Smoothed(spec) if smooth else spec).packed
    x = seen_inputs(tokens, packed)
    out = x @ packed.dequantize().T
    if isinstance(spec, LowRank):  # the branch takes its inputs as they are
        inner = packed.base if smooth else packed  # pyright: ignore[reportAttributeAccessIssue]
        lost = tokens - x
        out += inner.branch(packed.inputs(lost) if smooth else lost)  # pyright: ignore[reportAttributeAccessIssue]
    # a value between two levels may go either way: few do
    difference = (out - dispatch.matmul(tokens, packed)).abs().amax(1) / out.abs().amax()
    assert float((difference > 1e-5).float().mean()) < 0.02
    assert float(difference.max()) < 1e-2


class Killed(BaseException): ...


class Kill(Progress):
    def advanced(self, index: int, weights: int) -> None:
        raise Killed


SPECS = (FOUR, Smoothed(LowRank(Rotated(FOUR), rank=4), points=1))


@pytest.mark.parametrize("spec", SPECS)
def test_a_language_model_runs_and_resumes_to_the_same_bytes(
    spec: Spec, llama: Path, words: Path, tmp_path: Path
) -> None:
    recipe = replace(tiny.recipe(words), spec=spec, match="float")
    first = quant.quantize(str(llama), tmp_path / "a", recipe)
    assert first.report["bits"]["promised"] == pytest.approx(first.written.measured_bits)
    with pytest.raises(Killed):
        quant.quantize(str(llama), tmp_path / "b", recipe, progress=Kill())
    quant.quantize(str(llama), tmp_path / "b", recipe, mode="resume")
    assert tiny.contents(tmp_path / "a") == tiny.contents(tmp_path / "b")
    assert all(site.spec == spec for site in verify(tmp_path / "a").values())
    model, ids = quant.load(tmp_path / "a"), torch.arange(10, 40)[None]
    plain = quant.load(tmp_path / "a", dequantize=True)
    with torch.no_grad():
        out, other = model(ids).logits, plain(ids).logits
    off = float((out - other).norm() / other.norm())
    assert 1e-4 < off < 0.05  # it rounds, and not much
    assert all(rounds_inputs(part.spec) for part in model.modules() if isinstance(part, PackedLinear))


def test_tuning_trains_on_rounded_inputs_against_a_float_teacher(llama: Path, words: Path, tmp_path: Path) -> None:
    recipe = override(load_recipe("rounding"), ["distillation.steps=4"])
    recipe = replace(recipe, spec=FOUR, calibration=tiny.recipe(words).calibration)
    report = quant.quantize(str(llama), tmp_path / "out", recipe).report
    assert report["distillation"]["after"] <= report["distillation"]["before"]
    assert report["verification"]["worst_difference"] < 2e-2 * report["verification"]["largest_logit"]


def test_modulations_and_experts_keep_their_inputs(tmp_path: Path, words: Path) -> None:
    mixtral = tiny.model("mixtral", tmp_path / "mixtral")
    plan = prepare(str(mixtral), replace(tiny.recipe(words), spec=Smoothed(FOUR))).plan.to_dict()
    experts = {json.dumps(spec) for name, spec in plan.items() if "experts" in name}
    assert experts == {json.dumps(replace(FOUR, activations=16).to_dict())}
    assert all(spec == Smoothed(FOUR).to_dict() for name, spec in plan.items() if "experts" not in name)
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "dit", "DDIMScheduler")
    plan = prepare(str(source), Recipe(spec=FOUR, calibration=None, solver=Nearest())).plan.specs
    rounding = {name: rounds_inputs(spec) for name, spec in plan.items() if spec}
    assert {name.rpartition("norm1")[1] == "norm1" for name, on in rounding.items() if not on} == {True}
    assert any(rounding.values())


def test_what_cannot_round_is_refused_in_words() -> None:
    with pytest.raises(SettingsError, match="Trellis has no activations; take a recipe of uniform grids"):
        with_spec(load_recipe("balanced"), activations=8)
    with pytest.raises(SettingsError, match="8-bit activations take a multiple of 32"):
        with_spec(Recipe(), group_size=40, activations=8)
    with pytest.raises(SettingsError, match="activations is 6"):
        with_spec(Recipe(), activations=6)


def test_a_pipeline_library_loads_rounded_inputs(tmp_path: Path) -> None:
    diffusers = tiny_dit.library()
    source = tiny_dit.folder("FluxTransformer2DModel", tmp_path / "float", "FlowMatchEulerDiscreteScheduler")
    small = {"calibration": Calibration(samples=3, batch_size=2), "trajectory": Trajectory(steps=3, keep=2)}
    recipe = Recipe(spec=Smoothed(EIGHT, points=1), **small)  # pyright: ignore[reportArgumentType]
    quant.quantize(str(source), tmp_path / "w8a8", recipe)
    model = diffusers.FluxTransformer2DModel.from_pretrained(source)
    form = find_form(model)
    given = build(model, form.layout, form.traced, 2)
    loaded = (
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "w8a8"),
        quant.load(tmp_path / "w8a8"),
        quant.load(tmp_path / "w8a8", dequantize=True),
    )
    with torch.no_grad():
        expected = first_tensor(model(**given))
        found = [first_tensor(one(**given)) for one in loaded]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])  # which rounds nothing
    assert float((found[0] - expected).norm() / expected.norm()) < 0.01


@pytest.mark.slow
def test_images_of_rounded_inputs_are_those_of_whole_ones(tmp_path: Path) -> None:
    """4-bit weights with 8-bit activations, within 0.5 dB of 4-bit weights alone."""
    tiny_dit.library()
    from quant.eval.draw import Rule
    from quant.eval.gallery import judge_images

    small = {"calibration": Calibration(samples=32), "trajectory": Trajectory(steps=8, keep=2)}
    specs = {"a16": Uniform(bits=4, group_size=64), "a8": Uniform(bits=4, group_size=64, activations=8)}
    for name, spec in specs.items():
        quant.quantize(str(ROOT / "demo" / "dit"), tmp_path / name, Recipe(spec=spec, **small))  # pyright: ignore[reportArgumentType]
    folders = [tmp_path / name for name in specs]
    whole, rounded = judge_images(folders, against=ROOT / "demo" / "dit", rule=Rule(images=32, steps=8)).pictures
    assert whole.psnr is not None
    assert rounded.psnr is not None
    assert rounded.psnr > whole.psnr - 0.5
