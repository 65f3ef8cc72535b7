"""Low-rank branches: the layout against its definition, the branch against a naive best one in float64, checkpoints of
them, and their adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import quant
from quant.calibration.statistics import Statistics
from quant.checkpoint.adapter import detach, save_adapter
from quant.errors import BitwrightError, CheckpointError, SettingsError, SolverError
from quant.kernels import dispatch
from quant.kernels.layouts import LAYOUTS, LayoutError
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.measure import random_packed
from quant.kernels.packed import concatenate
from quant.kernels.spec import DTYPES, LowRank, Rotated, Smoothed, Spec, SpecError, Trellis, Uniform, spec_from_dict
from quant.linear import PackedLinear
from quant.prepare import Settings
from quant.recipe import Recipe, with_spec
from quant.solvers.feedback import Feedback
from quant.solvers.lowrank import factors, solve_low_rank
from quant.solvers.nearest import Nearest
from quant.solvers.solution import Problem, Solution, Solver
from tests import tiny

BASES = (Uniform(bits=2, group_size=32), Rotated(Uniform(bits=3), outputs=True), Rotated(Trellis(window=8)))


@pytest.fixture(scope="module")
def trained(trained: tuple[Tensor, Statistics]) -> tuple[Tensor, Statistics]:
    return trained[0][:96], trained[1]


def least(lost: Tensor, hessian: Tensor, rank: int) -> float:
    """`tr(D H DT)` after the best correction of this rank: what the singular values past it leave."""
    values, vectors = torch.linalg.eigh(hessian.double())
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return float(torch.linalg.svdvals(lost.double() @ root)[rank:].square().sum())


def energy(lost: Tensor, hessian: Tensor) -> float:
    return float(((lost.double() @ hessian.double()) * lost).sum())


@pytest.mark.parametrize("base", BASES)
def test_the_layout_is_base_and_branch_at_its_price(base: Spec, trained: tuple[Tensor, Statistics]) -> None:
    weight, statistics = trained
    spec = LowRank(base, rank=5, rounds=0)
    solved = Feedback(sweeps=0).solve(weight, statistics, spec)
    packed, shape = solved.packed, (weight.shape[0], weight.shape[1])
    assert isinstance(packed, PackedLowRank)
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    stored, promised = packed.tensors(), spec.tensors(shape)
    assert list(stored) == list(promised)
    assert all((t.dtype, t.shape) == (DTYPES[promised[n].dtype], promised[n].shape) for n, t in stored.items())
    assert spec.nbytes(shape) == base.nbytes(shape) + 2 * 5 * sum(shape) == sum(t.nbytes for t in stored.values())
    whole = packed.base.dequantize() + packed.lora_b.float() @ packed.lora_a.float()
    assert torch.allclose(packed.dequantize(), whole, atol=1e-6)
    assert torch.allclose(packed.dequantize(torch.float32, 7, 33), whole[7:33], atol=1e-6)
    assert torch.equal(LAYOUTS["lowrank"].from_tensors(spec, shape, stored).dequantize(), packed.dequantize())
    x, bias = torch.randn(3, 2, shape[1]), torch.randn(shape[0])
    x.requires_grad_(True)
    out = dispatch.matmul(x, packed, bias)
    assert torch.allclose(out, x @ whole.T + bias, atol=1e-4)  # the rotation and the branch sum in another order
    out.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, whole.sum(0).expand_as(x), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.matmul(x, packed, bias).dtype == torch.bfloat16


def test_rows_are_stacked_only_where_the_codes_can_be() -> None:
    """Two sequences of 200 rows take as many bytes as one of 256 and one of 144."""
    base = Trellis(window=8)
    spec, factor = LowRank(base, rank=2), torch.randn(2, 8).half()
    made = lambda rows: PackedLowRank(  # noqa: E731
        spec, (rows, 8), random_packed(base, rows, 8, "cpu"), factor, torch.randn(rows, 2).half()
    )
    with pytest.raises(LayoutError, match=r"cannot stack on 200 rows .* a multiple of 256 could"):
        concatenate([made(200), made(200)])
    parts = [made(256), made(144)]
    assert torch.equal(concatenate(parts).dequantize(), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("rows", [40, 96])
def test_the_branch_is_the_best_of_its_rank(trained: tuple[Tensor, Statistics], singular: bool, rows: int) -> None:
    weight, statistics = trained[0][:rows], trained[1]
    if singular:  # fewer tokens than inputs
        seen = torch.randn(24, weight.shape[1], generator=torch.Generator().manual_seed(0)) @ statistics.hessian
        statistics = Statistics(seen.T @ seen / 24, 24)
    lost = weight - Nearest().solve(weight, statistics, Uniform(bits=2)).weight
    before, errors = energy(lost, statistics.hessian), [1.0]
    for rank in (1, 4, 16):
        a, b = factors(lost, statistics, LowRank(rank=rank))
        left = energy(lost - b.float() @ a.float(), statistics.hessian)
        assert left == pytest.approx(least(lost, statistics.hessian, rank), rel=1e-3, abs=1e-6 * before)  # float16
        a, b = factors(lost, None, LowRank(rank=rank))
        plain = energy(lost - b.float() @ a.float(), torch.eye(weight.shape[1]))
        assert plain == pytest.approx(least(lost, torch.eye(weight.shape[1]), rank), rel=1e-3)
        errors.append(left / before)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8


def test_full_rank_leaves_nothing(trained: tuple[Tensor, Statistics]) -> None:
    weight, statistics = trained[0][:24], trained[1]
    found = Feedback().solve(weight, statistics, LowRank(Uniform(bits=1), rank=4096))
    assert found.error < 1e-5
    assert isinstance(found.packed, PackedLowRank)
    assert found.packed.lora_b.shape == (24, 24)
    zero = Feedback().solve(torch.zeros_like(weight), statistics, LowRank(Uniform(bits=1), rank=4))
    assert zero.weight.abs().max() == 0


def test_solving_again_never_hurts_and_weighting_helps(trained: tuple[Tensor, Statistics]) -> None:
    weight, statistics = trained
    base = Uniform(bits=2, group_size=32)
    error = lambda **kw: Feedback().solve(weight, statistics, LowRank(base, rank=8, **kw)).error  # noqa: E731
    once = error(rounds=0)
    assert error(rounds=2) <= error(rounds=1) <= once
    assert once < error(weighted=False, rounds=0) < Feedback().solve(weight, statistics, base).error


@dataclass
class Tired(Solver):
    """A solver that has nothing more to say the second time, or says it with so much noise."""

    louder: float = 0.0
    asked: int = 0

    def solve_all(self, problems: Sequence[Problem], spec: Spec) -> list[Solution]:
        self.asked += 1
        if self.asked > 1 and not self.louder:
            problems = [replace(one, weight=0 * one.weight) for one in problems]
        return [replace(one, noise=self.louder * (self.asked > 1)) for one in Nearest().solve_all(problems, spec)]


def test_the_best_of_the_rounds_is_kept(trained: tuple[Tensor, Statistics]) -> None:
    weight, statistics = trained
    spec = LowRank(Uniform(bits=3, group_size=32), rank=4, rounds=2)
    problem, tired = Problem(weight, statistics), Tired()
    found = solve_low_rank(Nearest(), problem, replace(spec, rounds=0))
    assert solve_low_rank(tired, problem, spec).error == found.error
    assert tired.asked == 3
    heard = Tired(louder=1e9)  # a better base that costs more where its inputs are rounded
    assert solve_low_rank(heard, problem, spec).error == found.error


def test_both_factors_of_a_component_are_as_large(trained: tuple[Tensor, Statistics]) -> None:
    """So that neither leaves its dtype's range first."""
    lora_a, lora_b = factors(1e3 * trained[0], trained[1], LowRank(rank=6))
    torch.testing.assert_close(lora_a.float().norm(dim=1), lora_b.float().norm(dim=0), rtol=1e-2, atol=0)


def test_both_parts_aim_at_the_float_path(trained: tuple[Tensor, Statistics]) -> None:
    weight, own = trained
    cross = own.hessian @ (torch.eye(own.features) + 0.5 * own.hessian / own.hessian.norm())
    statistics = Statistics(own.hessian, own.tokens, cross.T.contiguous())
    damped = own.hessian.double() + 0.01 * float(own.diagonal.mean()) * torch.eye(own.features)
    aim = weight.double() @ torch.linalg.solve(damped, cross.double() + damped - own.hessian.double()).T
    found = Feedback().solve(weight, statistics, LowRank(Uniform(bits=3), rank=96)).weight
    assert float((found - aim).norm() / aim.norm()) < 1e-3
    assert float((found - weight).norm() / aim.norm()) > 1e-2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"rounds": 17}, "rounds is 17"),
        ({"weighted": 1}, "weighted is 1"),
        ({"factor_dtype": "float32"}, "factor_dtype is 'float32'"),
        ({"base": LowRank()}, "beside a low-rank branch"),
    ],
)
def test_impossible_branches_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        LowRank(**settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="goes around it"):
        Rotated(LowRank())


def test_damaged_and_unlike_branches_are_refused(trained: tuple[Tensor, Statistics]) -> None:
    packed = Nearest().solve(*trained, LowRank(Uniform(), rank=2)).packed
    other = Nearest().solve(trained[0] * 2, trained[1], LowRank(Uniform(), rank=2)).packed
    with pytest.raises(LayoutError, match="lora_a"):
        concatenate([packed, other])
    tensors = packed.tensors()
    tensors["lora_b"] = tensors["lora_b"].clone().index_fill_(0, torch.tensor(3), torch.inf)
    with pytest.raises(LayoutError, match="lora_b"):
        PackedLowRank.from_tensors(packed.spec, packed.shape, tensors).validate()
    with pytest.raises(LayoutError, match="lora_a: missing"):
        PackedLowRank.from_tensors(packed.spec, packed.shape, {k: v for k, v in tensors.items() if k != "lora_a"})
    with pytest.raises(SolverError, match="bfloat16"):
        factors(torch.full((4, 8), 1e30), None, LowRank(rank=1))


def test_stacks_of_experts_are_refused(words: Path, tmp_path: Path) -> None:
    model = tiny.model("mixtral", tmp_path / "model")
    recipe = tiny.recipe(words)
    with pytest.raises(SettingsError, match="stack of experts has no low-rank branch"):
        quant.quantize(str(model), tmp_path / "out", Recipe(LowRank(rank=4), calibration=recipe.calibration))
    plan = tmp_path / "plan.json"
    site = "model.layers.0.mlp.experts.down_proj"
    plan.write_text(json.dumps({site: LowRank(rank=4).to_dict()}))
    with pytest.raises(SettingsError, match="stack of experts has no low-rank branch"):
        quant.quantize(str(model), tmp_path / "out", recipe, settings=Settings(plan=plan))


@pytest.mark.parametrize("smooth", [False, True])
def test_a_checkpoint_keeps_its_promise_and_gives_an_adapter(
    smooth: bool, llama: Path, words: Path, tmp_path: Path
) -> None:
    spec = LowRank(Rotated(Uniform(group_size=32)), rank=8)
    recipe = Recipe(Smoothed(spec, points=2) if smooth else spec, calibration=tiny.recipe(words).calibration)
    recipe = with_spec(recipe, bits=2)
    spec = LowRank(Rotated(Uniform(bits=2, group_size=32)), rank=8)
    assert recipe.spec == (Smoothed(spec, points=2) if smooth else spec)
    first = quant.quantize(str(llama), tmp_path / "a", recipe)
    assert first.report["bits"]["promised"] == pytest.approx(first.written.measured_bits)
    quant.quantize(str(llama), tmp_path / "b", recipe)
    assert tiny.contents(tmp_path / "a") == tiny.contents(tmp_path / "b")
    model, ids = quant.load(tmp_path / "a"), torch.arange(10, 40)[None]
    count = save_adapter(tmp_path / "a", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    adapter = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    packed = {name: part for name, part in model.named_modules() if isinstance(part, PackedLinear)}
    assert config["target_modules"] == sorted(packed)
    assert config["base_model_name_or_path"] is None  # or the checkpoint would be opened, which has the branches
    assert count == len(packed) == len(adapter) / 2
    bare = detach(quant.load(tmp_path / "a"))
    with torch.no_grad():
        whole = model(ids).logits
        assert not torch.allclose(bare(ids).logits, whole, atol=1e-3)
        bare.dequantize()
        for name in packed:  # as PEFT merges an adapter
            a, b = (adapter[f"base_model.model.{name}.lora_{k}.weight"].float() for k in "AB")
            bare.get_submodule(name).weight += (b @ a) * config["lora_alpha"] / config["r"]
        assert torch.allclose(bare(ids).logits, whole, atol=1e-5)
    with pytest.raises(SettingsError, match="not an empty folder"):
        save_adapter(tmp_path / "a", tmp_path / "adapter")


def test_without_branches_there_is_no_adapter(packed_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no site has a low-rank branch") as caught:
        save_adapter(packed_llama, tmp_path / "adapter")
    assert isinstance(caught.value, BitwrightError)
    assert not (tmp_path / "adapter").exists()
