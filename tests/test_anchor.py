"""A first text token that never changes: found on the calibration inputs alone, and kept in float."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_dit
import torch
from safetensors.torch import save_file
from torch import Tensor

import quant
from quant import planning, prepare
from quant.budget import sized
from quant.calibration.anchors import anchored
from quant.calibration.statistics import HessianCollector, Statistics
from quant.checkpoint.shards import sizes
from quant.checkpoint.writer import arrangement, promised_pieces
from quant.errors import SolverError
from quant.kernels.spec import LowRank, Rotated, Smoothed, Spec, Trellis, Uniform, spec_from_dict
from quant.models.arguments import build
from quant.models.folding import Folding
from quant.models.walk import Site
from quant.plan import with_anchor
from quant.prepare import settled
from quant.progress import Progress
from quant.recipe import Calibration, Recipe, Trajectory, with_spec
from quant.solvers.anchor import without
from quant.solvers.feedback import Feedback
from quant.solvers.nearest import Nearest
from quant.solvers.solution import Solver

KEYS = [f"transformer_blocks.{n}.attn2.to_{k}" for n in range(2) for k in "kv"]
HUGE = 40.0


def layer(matched: bool = False) -> tuple[Tensor, Tensor, Tensor, Statistics]:
    """A weight, a token, other tokens, and the statistics of all; the token is one of six."""
    generator = torch.Generator().manual_seed(0)
    weight, c = torch.randn(48, 64, generator=generator), HUGE * torch.randn(64, generator=generator)
    mix = torch.randn(64, 64, generator=generator) / 8
    others = torch.randn(500, 64, generator=generator) @ mix
    x = torch.cat([others, c.expand(100, -1)])
    collector = HessianCollector(64, cross=matched)
    collector.update(x, reference=x + 0.01 * torch.randn(x.shape, generator=generator) if matched else None)
    found = collector.finish()
    return weight, c, others, Statistics(found.hessian, found.tokens, found.cross, anchor=c)


GRID = Uniform(bits=3, group_size=32)


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("solver", [Feedback(), Nearest()])
@pytest.mark.parametrize("base", [GRID, Rotated(Trellis(bits=2, window=8)), LowRank(GRID, rank=2)])
def test_the_token_is_exact_and_the_others_are_better(base: Spec, solver: Solver, matched: bool) -> None:
    if isinstance(solver, Nearest) and (matched or isinstance(base, Rotated)):
        pytest.skip("round to nearest knows grids, and aims at nothing")
    weight, c, others, statistics = layer(matched)
    plain, kept = (solver.solve(weight, statistics, spec).packed.dequantize() for spec in (base, with_anchor(base)))
    lost = lambda made, x: float(((weight - made) @ x.T).norm() / (weight @ x.T).norm())  # noqa: E731
    assert lost(kept, c[None]) < 1e-3
    assert lost(kept, others) < 0.95 * lost(plain, others)
    best_without = solver.solve(weight, Statistics(others.T @ others / 500, 500), base)
    if not matched:
        assert lost(kept, others) < 1.1 * lost(best_without.packed.dequantize(), others)


def test_it_is_one_more_component() -> None:
    assert with_anchor(GRID) == LowRank(GRID, rank=1, rounds=0, anchor=True)
    assert with_anchor(with_anchor(GRID)) == with_anchor(GRID)
    assert with_anchor(Smoothed(LowRank(GRID, rank=4))) == Smoothed(LowRank(GRID, rank=5, anchor=True))
    assert spec_from_dict(with_anchor(GRID).to_dict()) == with_anchor(GRID)
    extra = with_anchor(GRID).nbytes((48, 64)) - GRID.nbytes((48, 64))
    assert extra == 2 * (48 + 64)
    weight, _, _, statistics = layer()
    with pytest.raises(SolverError, match="base spec with --plan"):
        Feedback().solve(weight, Statistics(statistics.hessian, 600), with_anchor(GRID))


def test_what_is_left_are_the_statistics_of_the_inputs_without_the_token() -> None:
    """Of `P x`; and of `x_float` without what goes through the float weight, whatever the two have in common."""
    generator = torch.Generator().manual_seed(1)
    c, mix = torch.randn(12, generator=generator), torch.randn(12, 12, generator=generator)
    x = torch.randn(200, 12, generator=generator) @ mix
    x_float = x @ torch.randn(12, 12, generator=generator)
    found = without(Statistics(x.T @ x / 200, 200, x_float.T @ x / 200, anchor=c))
    along = torch.outer(c, c) / c.square().sum()
    left = x - x @ along
    assert found.cross is not None
    assert found.anchor is None
    torch.testing.assert_close(found.hessian, left.T @ left / 200, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.cross, (x_float - x @ along).T @ left / 200, rtol=1e-4, atol=1e-3)


def texts(path: Path, constant: bool = True) -> dict[str, Tensor]:
    """Embeddings of eight prompts, written to `path`; every one begins with the same huge token."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 6, 24, generator=generator)
    x[:, 0] = HUGE * torch.randn(24, generator=generator) if constant else x[:, 0]
    save_file({"encoder_hidden_states": x}, path)
    return {"encoder_hidden_states": x}


def recipe(path: Path, **changes: Any) -> Recipe:
    calibration = Calibration(str(path), samples=8, batch_size=4)
    return Recipe(spec=Uniform(bits=2, group_size=16), calibration=calibration, trajectory=Trajectory(3, 3), **changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dit.folder("PixArtTransformer2DModel", tmp_path_factory.mktemp("anchor") / "float", "DDIMScheduler")


def error(folder: Path, source: Path, text: Tensor) -> float:
    """Of the loaded model's outputs on these texts."""
    model, original = quant.load(str(folder)), tiny_dit.library().PixArtTransformer2DModel.from_pretrained(source)
    prepared = prepare.prepare(str(source), Recipe(calibration=None))
    form: Any = prepared.skeleton.form  # pyright: ignore[reportAttributeAccessIssue]
    batch = build(original, form.layout, form.traced, len(text)) | {"encoder_hidden_states": text}
    batch.pop("encoder_attention_mask", None)
    with torch.no_grad():
        made, wanted = (one(**batch).sample for one in (model, original))
    return float((made - wanted).square().mean() / wanted.square().mean())


def test_cross_attention_keeps_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts(tmp_path / "text.safetensors")["encoder_hidden_states"]
    own = recipe(tmp_path / "text.safetensors", only=("*attn2.to_[kv]",))
    result = quant.quantize(str(source), tmp_path / "kept", own)
    plan = {site["site"]: site["spec"] for site in result.report["sites"]}
    assert sorted(name for name, spec in plan.items() if spec.get("anchor")) == sorted(KEYS)
    assert result.report["bits"]["measured"] == pytest.approx(result.report["bits"]["promised"])
    with monkeypatch.context() as patch:
        patch.setattr(planning, "anchored", lambda *_: frozenset[str]())
        quant.quantize(str(source), tmp_path / "plain", own)
    fresh = torch.randn(8, 6, 24, generator=torch.Generator().manual_seed(7))
    known = torch.cat([text[:, :1], fresh[:, 1:]], 1)
    for x, gain in ((known, 0.5), (fresh, 1.0)):  # a text that never has it is none the worse
        assert error(tmp_path / "kept", source, x) < gain * error(tmp_path / "plain", source, x)


def test_two_runs_and_a_resumed_one_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    class Stop(Progress):
        def advanced(self, index: int, weights: int) -> None:
            raise KeyboardInterrupt

    texts(tmp_path / "text.safetensors")
    own = recipe(tmp_path / "text.safetensors", match="float")
    for name in ("first", "second"):
        quant.quantize(str(source), tmp_path / name, own)
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(source), tmp_path / "stopped", own, progress=Stop())
    assert quant.quantize(str(source), tmp_path / "stopped", own, mode="resume").report["resumed_blocks"] == 1
    first = tiny.contents(tmp_path / "first", people=False)
    assert first == tiny.contents(tmp_path / "second", people=False)
    assert first == tiny.contents(tmp_path / "stopped", people=False)


def test_only_a_token_that_never_changes_and_is_far_longer(source: Path, tmp_path: Path) -> None:
    text = texts(tmp_path / "text.safetensors", constant=False)["encoder_hidden_states"]
    prepared = prepare.prepare(str(source), recipe(tmp_path / "text.safetensors"))
    assert all(spec is None or not isinstance(spec, LowRank) for spec in settled(prepared).plan.specs.values())

    def never(_: Any) -> None:
        raise AssertionError("the model ran, though no argument begins alike")

    model, sites = prepared.skeleton.model, prepared.walk.sites
    assert anchored(model, sites, [{"encoder_hidden_states": text}], never) == frozenset()
    text[:, 0] = text[0, 0]  # the same, but no longer than the others
    ran: list[int] = []
    save_file({"encoder_hidden_states": text}, tmp_path / "text.safetensors")
    prepared = prepare.prepare(str(source), recipe(tmp_path / "text.safetensors"))
    assert all(spec is None or not isinstance(spec, LowRank) for spec in settled(prepared).plan.specs.values())
    assert anchored(model, sites, [{"encoder_hidden_states": text}], lambda few: ran.append(len(few))) == frozenset()
    assert ran == [1]


class Changing(torch.nn.Module):
    """Two linears of which one reads the text as it is, and one what becomes of it with the time."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.modulated = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)

    def forward(self, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        changed = encoder_hidden_states * (1 + timestep)[:, None, None]
        return self.plain(encoder_hidden_states) + self.modulated(changed)


@pytest.mark.parametrize("together", [True, False])
def test_a_token_that_a_site_sees_change_is_none(together: bool) -> None:
    """In one batch, or from one batch to the next."""
    text = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    text[:, 0] = HUGE
    times = [[0.0, 1.0]] * 2 if together else [[0.0, 0.0], [1.0, 1.0]]
    batches = [{"encoder_hidden_states": text, "timestep": torch.tensor(time)} for time in times]
    model, sites = Changing(), [Site(name, "linear", 4, 8) for name in ("plain", "modulated")]
    assert anchored(model, sites, batches, lambda some: [model(**batch) for batch in some]) == {"plain"}


def test_a_plan_s_own_word_comes_first(source: Path, tmp_path: Path) -> None:
    texts(tmp_path / "text.safetensors")
    (tmp_path / "plan.json").write_text(json.dumps({KEYS[0]: Uniform(bits=4, group_size=16).to_dict(), KEYS[1]: None}))
    given = prepare.Settings(plan=tmp_path / "plan.json")
    plan = settled(prepare.prepare(str(source), recipe(tmp_path / "text.safetensors"), given)).plan.specs
    assert plan[KEYS[0]] == Uniform(bits=4, group_size=16)
    assert plan[KEYS[1]] is None
    assert all(getattr(plan[name], "anchor", False) for name in KEYS[2:])


def test_an_average_counts_it(source: Path, tmp_path: Path) -> None:
    texts(tmp_path / "text.safetensors")
    result = quant.quantize(str(source), tmp_path / "out", recipe(tmp_path / "text.safetensors", average=4.5))
    assert sum(bool(site["spec"].get("anchor")) for site in result.report["sites"]) == len(KEYS)
    assert result.report["bits"]["measured"] <= 4.5


def test_a_size_counts_it(source: Path, tmp_path: Path) -> None:
    """Codes of 8 bits would fit, but not with what keeps the token, which is known once the model has run."""
    texts(tmp_path / "text.safetensors")
    made, size = recipe(tmp_path / "text.safetensors"), 131_000
    with_bits = lambda bits: with_spec(made, bits=bits)  # noqa: E731
    ready = settled(sized(str(size), with_bits, lambda one: prepare.prepare(str(source), one), Progress()))
    assert sum(getattr(spec, "anchor", False) for spec in ready.plan.specs.values()) == len(KEYS)
    assert sum(sizes(arrangement(ready, promised_pieces(ready)), ready.source.stem).values()) <= size


def test_folded_weights_keep_it_too(source: Path, tmp_path: Path) -> None:
    """Values are turned on the side that they write, so their token stays exact for what the turned weight gives."""
    text = texts(tmp_path / "text.safetensors")["encoder_hidden_states"]
    own = recipe(tmp_path / "text.safetensors", folding=Folding())
    result = quant.quantize(str(source), tmp_path / "out", own)
    assert sorted(site["site"] for site in result.report["sites"] if site["spec"].get("anchor")) == sorted(KEYS)
    prepared = prepare.prepare(str(source), own)
    assert {f"{name}.weight" for name in KEYS if name.endswith("v")} < prepared.folded.changes.keys()
    original = tiny_dit.library().PixArtTransformer2DModel.from_pretrained(source)
    loaded, lost = quant.load(tmp_path / "out"), dict[str, tuple[float, float]]()

    def listen(name: str) -> Any:
        known = original.get_submodule(name)
        weight, bias = (prepared.folded(f"{name}.{part}", getattr(known, part).detach()) for part in ("weight", "bias"))

        def hook(_: Any, args: tuple[Tensor, ...], made: Tensor) -> None:
            wanted = torch.nn.functional.linear(args[0], weight, bias)
            share = (made - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            lost[name] = (float(share[:, 0].max()), float(share[:, 1:].mean()))

        return hook

    for name in KEYS:
        loaded.get_submodule(name).register_forward_hook(listen(name))
    form: Any = prepared.skeleton.form  # pyright: ignore[reportAttributeAccessIssue]
    batch = build(original, form.layout, form.traced, len(text)) | {"encoder_hidden_states": text}
    batch.pop("encoder_attention_mask", None)
    with torch.no_grad():
        loaded(**batch)
    assert sorted(lost) == sorted(KEYS)
    assert all(first < 2e-3 and others > 0.05 for first, others in lost.values()), lost
    assert error(tmp_path / "out", source, text) < 0.05


def test_a_size_counts_it_only_where_a_text_is_read(source: Path, tmp_path: Path) -> None:
    """What an image's tokens are multiplied by has no first text token, and its bits are not held back for one."""
    texts(tmp_path / "text.safetensors")
    with_bits = lambda bits: with_spec(recipe(tmp_path / "text.safetensors"), bits=bits)  # noqa: E731
    widest = settled(prepare.prepare(str(source), with_bits(8)))
    assert sorted(site.name for site in widest.walk.sites if site.words) == sorted(KEYS)
    size = sum(sizes(arrangement(widest, promised_pieces(widest)), widest.source.stem).values())
    ready = settled(sized(str(size), with_bits, lambda one: prepare.prepare(str(source), one), Progress()))
    assert {spec.core.to_dict()["bits"] for spec in ready.plan.specs.values() if spec is not None} == {8}
    assert sum(sizes(arrangement(ready, promised_pieces(ready)), ready.source.stem).values()) == size
