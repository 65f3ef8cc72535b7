"""What an error of each matrix costs, from gradients: as the whole model's gradient has it, and as errors show it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import quant
from quant import Settings, fisher, load_recipe
from quant.allocation import sensitivities
from quant.calibration.activations import Activations
from quant.calibration.statistics import Statistics
from quant.errors import CalibrationError, ModelError, ResourceError, SettingsError
from quant.eval.evaluate import evaluate
from quant.eval.subject import open_subject
from quant.kernels.spec import Spec, Trellis
from quant.models.walk import Site
from quant.pairs import Pairs
from quant.pipeline import run
from quant.planning import measured, relative, widths
from quant.prepare import Prepared, prepare
from quant.recipe import override, with_spec
from quant.recovery.placed import oriented
from quant.recovery.tunable_trellis import TunableTrellis
from quant.solvers.feedback import Feedback
from quant.solvers.metric import own
from quant.solvers.solution import Problem, Solution, solution
from tests import tiny

SMALL = ["calibration.samples=16", "calibration.sequence_length=256"]
QUICK = [*SMALL, "spec.base.window=8", "solver.sweeps=0"]


def costs(prepared: Prepared, spill: int = 1 << 30) -> dict[str, fisher.Cost]:
    return fisher.information(prepared.skeleton, prepared.walk, prepared.samples.batches, spill, lambda _: None)


def check(prepared: Prepared, found: dict[str, fisher.Cost]) -> None:
    """Against the whole model's gradient, without factors."""
    for name, (rows, energy) in whole(prepared).items():
        cost = found[name]
        torch.testing.assert_close(cost.rows, rows, rtol=1e-3, atol=1e-3 * float(rows.mean()))
        torch.testing.assert_close(cost.energy, energy)
        assert cost.zero == pytest.approx(float(rows @ energy), rel=1e-3)
        assert cost.zero > 0


def whole(prepared: Prepared) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What errors of one size cost in each row, and the rows' mean squares."""
    skeleton = prepared.skeleton
    skeleton.load(skeleton.names_under(""))
    model: Any = skeleton.model
    parameters = {site.name: model.get_parameter(site.parameter).requires_grad_() for site in prepared.walk.sites}
    generator, tokens = torch.Generator().manual_seed(0), 0
    wanted = {site.name: torch.zeros(site.shape[0]) for site in prepared.walk.sites}
    for batch in prepared.samples.batches:
        said = model(**batch)[0]
        gradients = torch.autograd.grad(fisher._surprise(model, said, generator), list(parameters.values()))
        tokens += said[..., 0].numel()
        for site, gradient in zip(prepared.walk.sites, gradients, strict=True):
            wanted[site.name] += oriented(gradient, site).square().sum(-1).flatten()
    energy = {s.name: oriented(parameters[s.name], s).detach().square().mean(-1).flatten() for s in prepared.walk.sites}
    return {name: (rows / 2 / tokens, energy[name]) for name, rows in wanted.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "gemma3", "gemma4"])
@pytest.mark.parametrize("spill", [0, 1 << 30], ids=["on disk", "in memory"])
def test_streamed_gradients_are_those_of_the_whole_model(
    name: str, spill: int, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(str(tiny.model(name, tmp_path / "model")), tiny.recipe(words))
    monkeypatch.setattr(fisher, "_factors", lambda *_: {site.name: {} for site in prepared.walk.sites})
    check(prepared, costs(prepared, spill))


@pytest.mark.parametrize("depth", [1, 7, 9, 10])
def test_a_deep_model_keeps_the_outputs_of_few_blocks(
    depth: int, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the logits of one window at a time."""
    config = AutoConfig.from_pretrained(tiny.model("llama", tmp_path / "model"))
    config.update({"num_hidden_layers": depth, "layer_types": None})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    prepared = prepare(str(tmp_path / "model"), tiny.recipe(words))
    monkeypatch.setattr(fisher, "_factors", lambda *_: {site.name: {} for site in prepared.walk.sites})
    rooms, held, rows = list[Activations](), list[int](), set[int]()

    class Counted(Activations):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            rooms.append(self)

        def __setitem__(self, index: int, tree: Any) -> None:
            super().__setitem__(index, tree)
            held.append(sum(room.held > 0 for room in rooms))

    surprise = fisher._surprise
    monkeypatch.setattr(fisher, "Activations", Counted)
    monkeypatch.setattr(fisher, "_surprise", lambda *given: rows.add(len(given[1])) or surprise(*given))
    found = costs(prepared)
    assert 0 < max(held) <= fisher.kept(depth) <= 2 * math.isqrt(depth) + 4
    assert rows == {1}
    assert not any(room.held for room in rooms if room is not rooms[1])  # all but the last gradients
    check(prepared, found)


def test_errors_cost_what_the_gradients_say(demo: Path) -> None:
    """Errors of 3 bits as feedback leaves them, put into one matrix of a trained model after another."""
    recipe = replace(override(load_recipe("balanced"), SMALL), only=("*.1.*", "*.3.mlp.*"))
    prepared = prepare(str(demo), recipe)
    said, skeleton = {name: cost.zero for name, cost in costs(prepared).items()}, prepared.skeleton
    skeleton.load(skeleton.names_under(""))
    seen = sensitivities(skeleton.model, prepared.walk, prepared.samples.batches, [1.0, 1.0], (3,))
    ratios = {name: said[name] / 64 / seen[name][0] for name in said}
    assert all(0.75 < ratio < 1.25 for ratio in ratios.values()), ratios
    assert max(said.values()) > 4 * min(said.values())  # there is something to choose


def test_rows_and_bits_by_what_they_cost_beat_all_alike(demo: Path, tmp_path: Path) -> None:
    """A trained model, the same bytes, another text than the calibration's."""
    mixed = override(load_recipe("balanced"), QUICK)
    found = list[float]()
    few = ("*.q_proj", "*.k_proj")  # what differs from row to row most
    rows = replace(override(mixed, ["widths=[]"]), only=few)
    recipes = {"both": mixed, "none": replace(mixed, mixed=False), "rows": rows, "alike": replace(rows, mixed=False)}
    for name, recipe in recipes.items():
        result = quant.quantize(str(demo), tmp_path / name, recipe, settings=Settings(threads=1))
        assert result.report["bits"]["promised"] <= (2.08 if recipe.only else 2.07)  # of smaller matrices
        divergence = evaluate(result.out, against=open_subject(demo), max_windows=16).divergence
        assert divergence is not None
        found.append(divergence.kl)
    assert found[0] < 0.9 * found[1]
    assert found[2] < 0.95 * found[3]


def test_rows_that_count_more_lose_less(demo: Path) -> None:
    """A trained matrix, solved with the rows' own costs and without: what is lost where it costs, at the same bits."""
    recipe = replace(override(load_recipe("balanced"), QUICK), only=("*.1.self_attn.k_proj", "*.2.mlp.up_proj"))
    prepared = prepare(str(demo), override(recipe, ["widths=[]"]))
    skeleton = prepared.skeleton
    found, plan = costs(prepared), prepared.plan
    skeleton.load(skeleton.names_under(""))
    for site in prepared.walk.sites:
        weight, counts = skeleton.model.get_parameter(site.parameter).detach(), plan.counts(site.name)
        assert counts is not None
        exact = found[site.name].rows
        metric = counts[:, None]
        torch.testing.assert_close(
            counts, (exact / exact.mean()).pow(0.75).clamp_min(1 / 64), rtol=0.1, atol=0
        )  # 2^(1/8)
        alike, lost = Statistics.identity(site.inputs), list[tuple[float, float]]()
        for known in (metric, None):
            errors = (weight - Feedback().solve(weight, alike, Trellis(window=8), known).weight).square().sum(1)
            lost.append((float(exact @ errors), float(errors.sum())))
        assert lost[0][0] < 0.95 * lost[1][0], site.name
        assert lost[0][1] > lost[1][1]


def test_what_missed_where_rows_count_is_worse() -> None:
    """Of two solutions, each better in one half of the rows, the one that is better where rows count missed by less;
    what is reported of both knows no counts."""
    weight, alike = torch.randn((64, 32), generator=torch.Generator().manual_seed(0)), Statistics.identity(32)
    halves = [torch.tensor([50.0] * 32 + [1.0] * 32).roll(by)[:, None] for by in (0, 32)]
    solved = [Feedback().solve(weight, alike, Trellis(window=8, length=64), metric) for metric in halves]
    for one in range(2):
        found = [solution(made.packed, weight, alike, metric=halves[one]) for made in solved]
        assert found[one].missed < 0.8 * found[1 - one].missed
        assert [made.error for made in found] == [made.error for made in solved]
        assert solved[one].missed == found[one].missed


def test_each_expert_has_its_own_rows(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = override(load_recipe("balanced"), [f"calibration.text={words}", *TRELLIS, "solver.sweeps=0"])
    recipe = replace(recipe, only=("*.0.mlp.experts.*",))
    seen, solve = list[torch.Tensor](), Feedback.solve_all

    def spied(self: Feedback, problems: Sequence[Problem], spec: Spec) -> list[Solution]:
        if isinstance(spec, Trellis):
            seen.extend(own(one.metric) for one in problems if one.metric is not None)
        return solve(self, problems, spec)

    monkeypatch.setattr(Feedback, "solve_all", spied)
    prepared = prepare(str(tiny.model("mixtral", tmp_path / "model")), recipe)
    run(prepared, tmp_path / "out")
    wanted = [prepared.plan.counts(site.name) for site in prepared.walk.sites]
    assert torch.equal(torch.cat(seen), torch.cat([rows for rows in wanted if rows is not None]))
    assert len(seen) == sum(site.experts for site in prepared.walk.sites) > 2
    assert sum(len(rows.unique()) > 1 for rows in seen) > len(seen) / 2  # those that saw tokens
    few = fisher.Cost(torch.cat([torch.tensor([1.0, 4.0]), torch.tensor([1.0, 4.0]) / 1e4]), torch.ones(4))
    assert relative(few, 2).tolist() == [-4, 2] * 2  # an expert that is rarely asked has rows of its own, too


def test_the_tuning_is_told_what_rows_count(
    llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["distillation.steps=1", "distillation.samples=4"]
    prepared = prepare(str(llama), override(load_recipe("best"), [f"calibration.text={words}", *TRELLIS, *short]))
    told, weigh = list[torch.Tensor](), TunableTrellis.weigh
    monkeypatch.setattr(TunableTrellis, "weigh", lambda self, metric: told.append(own(metric)) or weigh(self, metric))
    run(prepared, tmp_path / "out")
    wanted = [prepared.plan.counts(site.name) for site in prepared.walk.sites]
    assert len(wanted) == 14
    assert len(told) in (14, 28)  # again, where scales are then tuned alone
    assert all(rows is not None and torch.equal(one, rows) for one, rows in zip(told, wanted * 2, strict=False))


def test_what_is_measured(llama: Path, words: Path) -> None:
    source = prepare(str(llama), tiny.recipe(words)).source
    balanced = load_recipe("balanced")
    assert widths(balanced) == [1, 2, 3, 4]
    assert measured(balanced, source)
    assert measured(replace(with_spec(balanced, bits=4), average=3.5), source)
    assert not measured(with_spec(balanced, bits=4), source)  # nothing to choose
    assert not measured(replace(balanced, widths=()), source)
    assert not measured(replace(balanced, calibration=None), source)
    assert not measured(replace(load_recipe("gptq"), average=3.5, mixed=True), source)
    asks = lambda recipe: prepare(str(llama), override(recipe, [f"calibration.text={words}"])).measures  # noqa: E731
    assert asks(with_spec(balanced, bits=4))  # rows count
    assert asks(replace(balanced, widths=()))
    assert not asks(replace(balanced, mixed=False))
    assert not asks(replace(load_recipe("gptq"), mixed=True))  # no row knows of another


def test_enough_tokens() -> None:
    batch = {"input_ids": torch.zeros((4, 512), dtype=torch.int64)}
    site = lambda inputs: Site("x", "linear", 8, inputs)  # noqa: E731
    assert len(fisher.enough([batch] * 32, [site(64)])) == 8  # 32 windows
    assert len(fisher.enough([batch] * 32, [site(2048), site(64)])) == 8
    assert len(fisher.enough([batch] * 32, [site(4096)])) == 16
    assert len(fisher.enough([batch] * 32, [site(14336)])) == 32
    assert len(fisher.enough([batch] * 2, [site(64)])) == 2
    numbered = [batch | {"number": number} for number in range(32)]
    assert [each["number"] for each in fisher.enough(numbered, [site(64)])] == list(range(0, 32, 4))  # of all the text


TRELLIS = ["spec.base.window=8", "spec.base.length=32", "calibration.samples=4", "calibration.sequence_length=32"]


def test_sites_of_a_plan_file_are_left_out_of_the_choice(
    llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average holds with them, others get what they leave, and with no trellis left nothing is measured."""
    called = list[int]()

    def known(_skeleton: Any, found: Any, *_: Any) -> dict[str, fisher.Cost]:
        called.append(1)
        one = lambda site: torch.ones(site.shape[0])  # noqa: E731
        return {site.name: fisher.Cost(one(site) * number**2, one(site)) for number, site in enumerate(found.sites)}

    monkeypatch.setattr("quant.planning.information", known)
    recipe = override(load_recipe("balanced"), [f"calibration.text={words}", *TRELLIS, "average=3.6"])
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"*.down_proj": quant.Uniform(bits=4, group_size=32).to_dict()}))
    prepared = prepare(str(llama), recipe, Settings(plan=file))
    sizes = {site.name: site.shape for site in prepared.walk.sites}
    specs = {name: spec for name, spec in prepared.plan.specs.items() if spec is not None}
    used = 8 * sum(spec.nbytes(sizes[name]) for name, spec in specs.items()) / sum(a * b for a, b in sizes.values())
    assert 3.3 < used <= 3.6
    assert {spec.core.layout for name, spec in specs.items() if "down_proj" in name} == {"uniform"}
    assert len({spec.core.to_dict()["bits"] for name, spec in specs.items() if "down_proj" not in name}) > 1
    assert called == [1]
    every = {name: spec.to_dict() for name, spec in prepared.plan.specs.items() if spec is not None}
    file.write_text(json.dumps(every))
    again = prepare(str(llama), recipe, Settings(plan=file)).plan
    assert again.specs == prepared.plan.specs  # rows of trellises are weighed, and bits are as they were
    assert again.fingerprint() == prepared.plan.fingerprint()
    assert called == [1, 1]
    some = {"*.0.self_attn.*": quant.Uniform(bits=4, group_size=32).to_dict(), "*.1.mlp.up_proj": None}
    file.write_text(json.dumps(some))  # grids of a stage are solved as one, and no row of theirs knows of another
    mixture = prepare(str(llama), recipe, Settings(plan=file))
    assert {name for name, spec in mixture.plan.specs.items() if spec and spec.core.layout == "trellis"} == set(
        mixture.plan.rows
    )
    run(mixture, tmp_path / "mixture")
    called.pop()
    file.write_text(json.dumps({"*": quant.Uniform(bits=4, group_size=32).to_dict()}))
    grids = prepare(str(llama), recipe, Settings(plan=file)).plan.specs.values()
    assert {spec.core.layout for spec in grids if spec is not None} == {"uniform"}
    assert called == [1, 1]
    with pytest.raises(SettingsError, match="cannot be read"):
        prepare(str(llama), recipe, Settings(plan=tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("cost", "words_"), [(0.0, "no gradient reaches it"), (math.inf, "the cost of an error is not finite")]
)
def test_costs_that_say_nothing(
    cost: float, words_: str, llama: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pairs, "rows", lambda self: torch.full((self.site.shape[0],), cost))
    with pytest.raises(CalibrationError, match=rf"q_proj: {words_}.*mixed=false --set widths=\[\]"):
        costs(prepare(str(llama), tiny.recipe(words)))


def test_an_output_that_is_not_finite(llama: Path, words: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data.fill_(3e38)
    model.save_pretrained(tmp_path / "large")
    tiny.add_tokenizer(tmp_path / "large")
    with pytest.raises(ModelError, match=r"its output is not finite.*float32"):
        costs(prepare(str(tmp_path / "large"), tiny.recipe(words)))


def test_no_room_is_said_with_what_helps(llama: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is journalled yet: there is nothing to resume, and --out is not where it lies."""
    recipe = override(load_recipe("balanced"), [f"calibration.text={words}", *TRELLIS])
    prepared = prepare(str(llama), recipe, Settings(spill_bytes=0))

    def fails(error: Exception) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        return fail

    with monkeypatch.context() as patched:
        patched.setattr("quant.calibration.activations.save_file", fails(OSError(28, "No space left on device")))
        with pytest.raises(ResourceError) as raised:
            _ = prepared.plan
    assert "bitwright-scratch-" in str(raised.value)
    assert re.search(
        r"No space left.* choose another TMPDIR, or --set mixed=false --set widths=\[\]", str(raised.value)
    )
    assert "--resume" not in str(raised.value)
    monkeypatch.setattr("quant.planning.information", fails(MemoryError("out of memory")))
    with pytest.raises(
        ResourceError, match=r"while the cost.*sequence_length=16, or --set mixed=false --set widths=\[\]"
    ):
        _ = prepared.plan
    monkeypatch.setattr("quant.planning.information", fails(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        _ = prepared.plan
    even = prepare(str(llama), override(recipe, ["mixed=false", "widths=[]"])).plan  # what helps needs no measuring
    assert len({spec.core.to_dict()["bits"] for spec in even.specs.values() if spec is not None}) == 1


def test_gradients_have_their_own_memory() -> None:
    """One tensor for two inputs, or one number for many, could not be stored or added to."""
    a, b, c, d = (torch.ones(3, requires_grad=True) for _ in range(4))
    found = fisher._back([(a + b).square().sum() + c.sum()], [torch.ones(())], [a, b, c, d])
    assert [gradient.tolist() for gradient in found] == [[4.0] * 3, [4.0] * 3, [1.0] * 3, [0.0] * 3]
    assert len({gradient.data_ptr() for gradient in found}) == 4
    for gradient in found:
        gradient.add_(torch.arange(3.0))
    assert [gradient.tolist() for gradient in found[:3]] == [[4, 5, 6], [4, 5, 6], [1, 2, 3]]


def test_labels_are_drawn_as_the_model_says() -> None:
    chances = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25, 0.0])
    drawn = fisher._drawn(chances.log().expand(40_000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.bincount(minlength=6) / 40_000, chances, rtol=0, atol=0.01)
    assert not drawn.bincount(minlength=6)[chances == 0].any()
    again = fisher._drawn(chances.log().expand(40_000, -1), torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


def test_without_a_vocabulary_it_is_the_squared_error() -> None:
    """Of a direction drawn for each token half the squared slope, which `information` takes, has it for a mean."""
    generator, error = torch.Generator().manual_seed(0), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    slopes: list[float] = []
    for _ in range(4000):
        said = torch.zeros(1, 3, 5, requires_grad=True)
        fisher._surprise(torch.nn.Linear(5, 5), said, generator).backward()
        assert said.grad is not None
        slopes.append(float((said.grad[0] * error).sum()))
    assert torch.tensor(slopes).square().mean() / 2 == pytest.approx(float(error.square().sum()), rel=0.1)
