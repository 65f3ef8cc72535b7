"""The whole model, tuned end to end: it says more of what the float model says, in the same bytes, killed or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import kl_div

from quant import Recipe, quantize
from quant.calibration.statistics import Statistics
from quant.errors import CheckpointError, SettingsError
from quant.estimate import _distillation, _Rehearsal, estimate  # pyright: ignore[reportPrivateUsage]
from quant.kernels.packed import Packed
from quant.kernels.spec import Codebook, Rotated, Smoothed, Spec, Trellis, Uniform
from quant.models.walk import Site
from quant.prepare import prepare
from quant.progress import Progress
from quant.recipe import override, recipe_from_dict
from quant.recovery import timesteps
from quant.recovery.distillation import Distillation, Whole
from quant.recovery.tunable import training_bytes, tunable
from quant.solvers.coupling import Coupling
from quant.solvers.feedback import Feedback
from quant.solvers.nearest import Nearest
from tests import tiny
from tests.test_recovery import SHORT, Killed, perplexity

FAST = Feedback(sweeps=0)


@pytest.fixture(scope="module")
def tuned(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The demonstration model at 2 bits, solved and tuned."""
    folder = tmp_path_factory.mktemp("tuned")
    plain = override(Recipe(spec=Rotated(Trellis(window=8), measured=False), solver=FAST), SHORT)
    return quantize(str(demo), folder / "plain", plain), quantize(
        str(demo), folder / "tuned", replace(plain, distillation=Distillation(steps=24))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_s_gradients_are_the_same_in_less_memory(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, wanted = (3 * torch.randn((2, 50, 3001), generator=torch.Generator().manual_seed(n)) for n in range(2))
    said, wanted = said.to(dtype).requires_grad_(), wanted.to(dtype)
    plain = kl_div(said.float().log_softmax(-1), wanted.float().log_softmax(-1), reduction="sum", log_target=True) / 100
    (expected,) = torch.autograd.grad(plain, said)
    assert float(timesteps.divergence(said, wanted).detach()) == float(plain.detach())
    monkeypatch.setattr(timesteps, "AT_ONCE", 7 * 3001)
    held = list[int]()
    keep = lambda x: held.append(x.untyped_storage().nbytes()) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = timesteps.divergence(said, wanted)
    assert max(held) < said.numel() * 4 / 10
    assert torch.equal(torch.autograd.grad(loss, said)[0], expected)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)


def test_the_model_gets_better_in_as_many_bytes(tuned: tuple[Any, Any]) -> None:
    plain, better = tuned
    gain = better.report["distillation"]
    assert gain["after"] < 0.8 * gain["before"]
    assert "distillation" not in plain.report
    assert better.report["bits"] == plain.report["bits"]
    assert better.report["files"] == plain.report["files"]
    assert perplexity(better.out) < 0.97 * perplexity(plain.out)


@pytest.mark.parametrize("block", ["", "0"])
def test_a_model_that_is_one_block_is_tuned_too(block: str, tmp_path: Path) -> None:
    """Blocks are found as lists of modules; a model without such a list is a block of its own, of no name."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False)]
    model = nn.Sequential(*layers) if not block else nn.Sequential(nn.Sequential(*layers))
    model.requires_grad_(False)
    sites = {name: Site(name, "linear", 64, 64) for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    solve = lambda weight: Nearest().solve(weight, Statistics.identity(64), Uniform(bits=2, group_size=64)).packed  # noqa: E731
    batches = [{"input": torch.randn(8, 64)} for _ in range(3)]
    whole = Whole(
        model, lambda batch: model(**batch), [block], sites,
        {name: solve(model.get_parameter(site.parameter)) for name, site in sites.items()}, lambda _: None, {}, {},
        batches, batches, None, lambda *_: None, tmp_path / "state", 1e9,
    )  # fmt: skip
    with torch.no_grad():
        tuned = Distillation(steps=8).tune(whole)
    assert 0 < tuned.after < 0.95 * tuned.before


def test_only_scales_and_vectors_change(tuned: tuple[Any, Any]) -> None:
    before, after = (load_file(next(run.out.glob("*.safetensors"))) for run in tuned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("norm.weight") for name in changed)
    assert any(name.endswith("scales") for name in changed)
    assert all(name.endswith("scales") or before[name].dim() == 1 for name in changed)
    assert not any(name.endswith(("proj.weight", "embed_tokens.weight")) for name in changed)


def test_codes_of_a_trellis_get_better(demo: Path, tuned: tuple[Any, Any], tmp_path: Path) -> None:
    plain, scales = tuned
    recipe = replace(recipe_from_dict(plain.report["recipe"]), distillation=Distillation(steps=24, codes=1.0))
    codes = quantize(str(demo), tmp_path / "codes", recipe)
    assert codes.report["distillation"]["after"] < 0.97 * scales.report["distillation"]["after"]
    before, after = (load_file(run.out / "model.safetensors") for run in (plain, codes))
    changed = [name for name in before if name.endswith("proj.weight") and not torch.equal(before[name], after[name])]
    assert len(changed) > 20


def test_where_moving_codes_hurts_scales_are_tuned_alone(demo: Path, tuned: tuple[Any, Any], tmp_path: Path) -> None:
    """Codes that move by many levels make it worse: what comes is what a tuning of no codes gives, byte for byte."""
    plain, scales = tuned
    alone = recipe_from_dict(scales.report["recipe"]).distillation
    assert alone is not None
    recipe = replace(recipe_from_dict(plain.report["recipe"]), distillation=replace(alone, codes=60.0))
    far = quantize(str(demo), tmp_path / "far", recipe)
    assert far.report["distillation"]["after"] == scales.report["distillation"]["after"]
    assert (far.out / "model.safetensors").read_bytes() == (scales.out / "model.safetensors").read_bytes()


def test_entries_and_indices_of_codebooks_get_better(demo: Path, tmp_path: Path) -> None:
    plain = override(Recipe(spec=Codebook(length=2, index_bits=4), solver=FAST), SHORT)
    found = [
        quantize(str(demo), tmp_path / str(codes), replace(plain, distillation=Distillation(steps=24, codes=codes)))
        for codes in (0.0, 1.0)
    ]
    entries, indices = (run.report["distillation"]["after"] / run.report["distillation"]["before"] for run in found)
    assert entries < 0.75
    assert indices < 0.97 * entries
    assert found[0].report["files"] == found[1].report["files"]


def test_only_what_is_named_is_tuned(demo: Path, tuned: tuple[Any, Any], tmp_path: Path) -> None:
    plain = tuned[0]
    recipe = replace(
        recipe_from_dict(plain.report["recipe"]), distillation=Distillation(steps=6, codes=1.0, only=("*.mlp.*",))
    )
    assert recipe_from_dict(recipe.to_dict()) == recipe
    some = quantize(str(demo), tmp_path / "some", recipe)
    assert some.report["distillation"]["after"] < some.report["distillation"]["before"]
    before, after = (load_file(run.out / "model.safetensors") for run in (plain, some))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("proj.weight") for name in changed)
    assert all(".mlp." in name for name in changed)
    lost = override(recipe, ['distillation.only=["*.norm9.*"]'])
    with pytest.raises(SettingsError, match="matches no linear and no parameter"):
        quantize(str(demo), tmp_path / "none", lost)


def test_windows_of_its_own(demo: Path, tuned: tuple[Any, Any], tmp_path: Path) -> None:
    """Others than those that judge, and as many as are asked."""
    recipe = recipe_from_dict(tuned[1].report["recipe"])
    asked = override(recipe, ["distillation.samples=48"])
    assert recipe_from_dict(asked.to_dict()) == asked
    made = prepare(str(demo), asked)
    shown, judged = (
        {tuple(row) for batch in batches for row in batch["input_ids"].tolist()}
        for batches in (made.windows(), made.samples.batches)
    )
    assert len(shown) == 48
    assert not shown & judged
    assert not prepare(str(demo), recipe).windows()
    run = quantize(str(demo), tmp_path / "out", asked)
    assert run.report["distillation"]["before"] == tuned[1].report["distillation"]["before"]
    assert run.report["distillation"]["after"] < 0.95 * run.report["distillation"]["before"]


def test_it_is_told(tuned: tuple[Any, Any]) -> None:
    card, page = ((tuned[1].out / name).read_text() for name in ("README.md", "report.html"))
    assert "end-to-end tuning" in card
    assert "steps 24" in card
    assert "end-to-end tuning" in page
    assert recipe_from_dict(tuned[1].report["recipe"]).distillation == Distillation(steps=24)


@pytest.mark.parametrize(("name", "codes"), [("gpt2", 0.0), ("mixtral", 0.2), ("gemma4", 0.2), ("bert", 0.0)])
def test_any_model_twice(name: str, codes: float, words: Path, tmp_path: Path) -> None:
    """Transposed weights, stacks of experts, tied embeddings, and a model without a vocabulary."""
    model = tiny.model(name, tmp_path / "model")
    recipe = replace(tiny.recipe(words, bits=2), solver=Nearest(), distillation=Distillation(steps=16, codes=codes))
    first = quantize(str(model), tmp_path / "first", recipe)
    assert first.report["distillation"]["after"] < first.report["distillation"]["before"]
    quantize(str(model), tmp_path / "again", recipe)
    assert tiny.contents(tmp_path / "again") == tiny.contents(tmp_path / "first")
    assert first.report["verification"]["worst_difference"] < 1e-4


class Kills(Progress):
    def distilling(self, done: int, steps: int, loss: float) -> None:
        if done == 4:
            raise Killed


KILLED = [
    Uniform(bits=2, group_size=32), Rotated(Trellis(window=8, length=64, code="hyb", table_bits=4)),
    Codebook(length=2, index_bits=4, second_bits=2, share=0.2), Smoothed(Rotated(Uniform(bits=2)), points=3),
]  # fmt: skip


@pytest.mark.parametrize("spec", KILLED, ids=str)
def test_killed_while_tuning(spec: Spec, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gemma3", tmp_path / "model")
    solver = Nearest() if isinstance(spec.core, Uniform) else FAST
    recipe = replace(tiny.recipe(words), spec=spec, solver=solver, distillation=Distillation(steps=7, codes=0.5))
    gain = quantize(str(model), tmp_path / "whole", recipe).report["distillation"]
    assert gain["after"] < gain["before"]  # else what was tuned is not in the checkpoint that is compared
    monkeypatch.setattr("quant.finish.PAUSE", 0.0)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(str(model), out, recipe, progress=Kills())
    assert (out / ".bitwright" / "distillation.safetensors").exists()
    kept = out / ".bitwright" / "distillation.safetensors"
    whole = kept.read_bytes()
    for broken, said in ((whole[:-1] + bytes([whole[-1] ^ 1]), "was altered"), (whole[:-9], "damaged")):
        kept.write_bytes(broken)
        with pytest.raises(CheckpointError, match=f"{said}.*delete this file"):
            quantize(str(model), out, recipe, mode="resume")
    kept.write_bytes(whole)
    seen: list[int] = []

    class Watches(Progress):
        def distilling(self, done: int, steps: int, loss: float) -> None:
            seen.append(done)

    report = quantize(str(model), out, recipe, mode="resume", progress=Watches()).report
    assert seen == [4, 5, 6, 7]
    assert report["resumed_blocks"] == len(report["blocks"])
    assert tiny.contents(out) == tiny.contents(tmp_path / "whole")


def test_a_dry_run_counts_it(llama: Path, words: Path) -> None:
    recipe = tiny.recipe(words)
    without = estimate(prepare(str(llama), recipe))
    long = estimate(prepare(str(llama), replace(recipe, distillation=Distillation(steps=100_000))))
    assert long.seconds > without.seconds + 10
    assert long.weight_files == without.weight_files
    assert long.again_seconds == without.again_seconds == 0
    codes = estimate(prepare(str(llama), replace(recipe, distillation=Distillation(steps=100_000, codes=0.5))))
    assert 10 < codes.again_seconds < codes.seconds  # where moving them helps nothing, scales are tuned alone


def test_a_dry_run_counts_how_rows_go_together(llama: Path, words: Path) -> None:
    """Where codes are trained: what errors of each sequence's rows cost together is held for each matrix."""
    spec = Trellis(window=8)
    recipe = replace(tiny.recipe(words), spec=spec, distillation=Distillation(steps=4, codes=0.5))
    bare = prepare(str(llama), recipe)
    rows = {site.name: torch.zeros(site.shape[0], dtype=torch.int8) for site in bare.walk.sites}
    pairs = {name: torch.eye(spec.length, dtype=torch.int8).repeat(9, 1)[: len(one)] for name, one in rows.items()}
    plan = replace(bare.plan, rows=rows, pairs=pairs)
    known = replace(bare, make=lambda *_: plan)
    metrics = [plan.metric(site) for site in bare.walk.sites]
    held = sum(Coupling([metric], spec.length).blocks.nbytes for metric in metrics if metric is not None)
    seen = _Rehearsal(1, *[0.0] * 6, 0, 0)
    more = [_distillation(one, seen, 1, 1)[2] for one in (bare, known)]
    short = sum(-len(one) % spec.length for one in rows.values()) * spec.length * 4  # rows of the last sequences
    assert 0 <= held - (more[1] - more[0]) <= short
    frozen = replace(recipe, distillation=Distillation(steps=4))
    more = [_distillation(replace(one, recipe=frozen), seen, 1, 1)[2] for one in (bare, known)]
    assert more[0] == more[1]


@pytest.mark.parametrize("codes", [0.0, 1.0])
@pytest.mark.parametrize(
    "spec",
    [Trellis(code="inst", window=12), Trellis(), Codebook(length=4, index_bits=8), Uniform(bits=2, group_size=64)],
)
def test_a_dry_run_counts_what_is_trained(spec: Spec, codes: float, trained: tuple[Tensor, Statistics]) -> None:
    """The tensors that are held for a trained matrix, and gradients as large as its codes' places."""
    weight = trained[0].repeat(2, 3)
    statistics = Statistics.identity(weight.shape[1])
    solved = Feedback(sweeps=0).solve(weight, statistics, spec)
    one = tunable(solved.packed, weight, codes > 0)
    seen, found = set[int](), 0

    def count(value: Any) -> None:
        nonlocal found
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found += storage.nbytes()
        elif isinstance(value, list | tuple):
            for part in value:
                count(part)
        elif hasattr(value, "__dict__") and not isinstance(value, Packed | Spec):
            for part in vars(value).values():
                count(part)

    count(one)
    found += sum(place.untyped_storage().nbytes() for place in one.codes())
    assert training_bytes(spec, codes > 0) == pytest.approx(found / weight.numel(), rel=0.15)


BAD = [{"steps": 0}, {"samples": -1}, {"rate": -1.0}, {"rate": float("nan")}, {"rate": 0.0}]


@pytest.mark.parametrize("values", BAD)
def test_bad_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="distillation"):
        Distillation(**values)
    with pytest.raises(SettingsError, match="tuning trains on the calibration text"):
        Recipe(calibration=None, distillation=Distillation())
