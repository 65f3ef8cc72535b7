"""What an error of each matrix costs, from gradients: as the whole model's gradient has it, and as errors show it."""

from __future__ import annotations

import json
import math
import re
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
from quant.errors import CalibrationError, ModelError, ResourceError, SettingsError
from quant.eval.evaluate import evaluate
from quant.eval.subject import open_subject
from quant.models.walk import Site
from quant.planning import measured, widths
from quant.prepare import Prepared, prepare
from quant.recipe import override, with_spec
from quant.recovery.placed import oriented
from tests import tiny

SMALL = ["calibration.samples=16", "calibration.sequence_length=256"]
QUICK = [*SMALL, "spec.base.window=8", "solver.sweeps=0"]


def costs(prepared: Prepared, spill: int = 1 << 30) -> dict[str, float]:
    return fisher.information(prepared.skeleton, prepared.walk, prepared.samples.batches, spill, lambda _: None)


def whole(prepared: Prepared) -> dict[str, float]:
    """The same by the whole model's gradient, without factors."""
    skeleton = prepared.skeleton
    skeleton.load(skeleton.names_under(""))
    model: Any = skeleton.model
    parameters = {site.name: model.get_parameter(site.parameter).requires_grad_() for site in prepared.walk.sites}
    generator, wanted, tokens = torch.Generator().manual_seed(0), dict.fromkeys(parameters, 0.0), 0
    for batch in prepared.samples.batches:
        said = model(**batch)[0]
        gradients = torch.autograd.grad(fisher._surprise(model, said, generator), list(parameters.values()))
        tokens += said[..., 0].numel()
        for site, gradient in zip(prepared.walk.sites, gradients, strict=True):
            weight = oriented(parameters[site.name], site)
            rows = oriented(gradient, site).square().sum(-1) * weight.square().mean(-1)
            wanted[site.name] += float(rows.sum())
    return {site: cost / 2 / tokens for site, cost in wanted.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "gemma3"])
@pytest.mark.parametrize("spill", [0, 1 << 30], ids=["on disk", "in memory"])
def test_streamed_gradients_are_those_of_the_whole_model(
    name: str, spill: int, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(str(tiny.model(name, tmp_path / "model")), tiny.recipe(words))
    monkeypatch.setattr(fisher, "_factors", lambda *_: {site.name: {} for site in prepared.walk.sites})
    found = costs(prepared, spill)
    assert found == pytest.approx(whole(prepared), rel=1e-3)
    assert min(found.values()) > 0


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
    assert found == pytest.approx(whole(prepared), rel=1e-3)


def test_errors_cost_what_the_gradients_say(demo: Path) -> None:
    """Errors of 3 bits as feedback leaves them, put into one matrix of a trained model after another."""
    recipe = replace(override(load_recipe("balanced"), SMALL), only=("*.1.*", "*.3.mlp.*"))
    prepared = prepare(str(demo), recipe)
    said, skeleton = costs(prepared), prepared.skeleton
    skeleton.load(skeleton.names_under(""))
    seen = sensitivities(skeleton.model, prepared.walk, prepared.samples.batches, [1.0, 1.0], (3,))
    ratios = {name: said[name] / 64 / seen[name][0] for name in said}
    assert all(0.75 < ratio < 1.25 for ratio in ratios.values()), ratios
    assert max(said.values()) > 4 * min(said.values())  # there is something to choose


def test_bits_where_they_count_beat_as_many_spread_evenly(demo: Path, tmp_path: Path) -> None:
    """A trained model, the same bytes, another text than the calibration's."""
    mixed = override(load_recipe("balanced"), QUICK)
    found = list[float]()
    for name, recipe in (("mixed", mixed), ("even", replace(mixed, mixed=False))):
        result = quant.quantize(str(demo), tmp_path / name, recipe, settings=Settings(threads=1))
        assert result.report["bits"]["promised"] <= 2.07
        divergence = evaluate(result.out, against=open_subject(demo), max_windows=16).divergence
        assert divergence is not None
        found.append(divergence.kl)
    assert found[0] < 0.93 * found[1]


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


def test_enough_tokens() -> None:
    batch = {"input_ids": torch.zeros((4, 512), dtype=torch.int64)}
    site = lambda inputs: Site("x", "linear", 8, inputs)  # noqa: E731
    assert len(fisher.enough([batch] * 32, [site(64)])) == 8  # 32 windows
    assert len(fisher.enough([batch] * 32, [site(2048), site(64)])) == 8
    assert len(fisher.enough([batch] * 32, [site(4096)])) == 16
    assert len(fisher.enough([batch] * 32, [site(14336)])) == 32
    assert len(fisher.enough([batch] * 2, [site(64)])) == 2


TRELLIS = ["spec.base.window=8", "spec.base.length=32", "calibration.samples=4", "calibration.sequence_length=32"]


def test_sites_of_a_plan_file_are_left_out_of_the_choice(
    llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average holds with them, others get what they leave, and with none left nothing is measured."""
    called = list[int]()

    def known(_skeleton: Any, found: Any, *_: Any) -> dict[str, float]:
        called.append(1)
        return {site.name: float(number**2) for number, site in enumerate(found.sites)}

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
    file.write_text(json.dumps({"*": quant.Uniform(bits=4, group_size=32).to_dict()}))
    grids = prepare(str(llama), recipe, Settings(plan=file)).plan.specs.values()
    assert {spec.core.layout for spec in grids if spec is not None} == {"uniform"}
    assert called == [1]
    with pytest.raises(SettingsError, match="cannot be read"):
        prepare(str(llama), recipe, Settings(plan=tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("cost", "words_"), [(0.0, "no gradient reaches it"), (math.inf, "the cost of an error is not finite")]
)
def test_costs_that_say_nothing(
    cost: float, words_: str, llama: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "_cost", lambda *_: cost)
    with pytest.raises(CalibrationError, match=rf"q_proj: {words_}.*widths=\[\]"):
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
    assert "bitwright-costs-" in str(raised.value)
    assert re.search(r"No space left.* choose another TMPDIR, or --set widths=\[\]", str(raised.value))
    assert "--resume" not in str(raised.value)
    monkeypatch.setattr("quant.planning.information", fails(MemoryError("out of memory")))
    with pytest.raises(ResourceError, match=r"while the cost.*sequence_length=16, or --set widths=\[\]"):
        _ = prepared.plan
    monkeypatch.setattr("quant.planning.information", fails(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        _ = prepared.plan
    even = prepare(str(llama), override(recipe, ["widths=[]"])).plan  # what helps needs no measuring
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
