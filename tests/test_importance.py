"""Token weights: attention as every architecture computes it, the weights and Hessians by their formulas, and recipes
that ask for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import quant
from quant.calibration.capture import Stage, collect
from quant.calibration.importance import Attention, Received
from quant.calibration.replay import Replay
from quant.calibration.statistics import HessianCollector
from quant.errors import CalibrationError, SettingsError
from quant.models.walk import walk
from quant.recipe import Recipe, override, recipe_from_dict
from tests import tiny
from tests.architectures import ARCHITECTURES, batch, make, make_from


def eager(model: Any) -> Any:
    """The same model with attention in plain torch."""
    twin = type(model)._from_config(model.config, attn_implementation="eager", dtype=torch.float32).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def attentions(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Each layer's probabilities `[B, heads, T, T]`, as the model itself returns them."""
    return list(eager(model)(**inputs, output_attentions=True).attentions)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_is_seen_in_every_architecture(name: str, plain: bool) -> None:
    model, inputs = make(name), batch(2, 12)
    expected = attentions(model, inputs)
    model = eager(model) if plain else model
    chain = walk(model, inputs).chain
    output, seen = None, list[Received]()
    with torch.no_grad(), Replay(model, chain) as replay:
        for index in range(len(chain)):
            with Received(2, 12) as received:
                output = replay.output(index, inputs, output)
            seen.append(received)
    assert len(seen) == len(expected)
    for received, probabilities in zip(seen, expected, strict=True):
        assert received.total is not None
        assert received.seen is not None
        assert torch.allclose(received.total, probabilities.sum((1, 2)), atol=1e-5)
        assert torch.equal(received.seen, (probabilities > 0).sum((1, 2)).float())


def test_weights_have_mean_one_a_floor_and_no_sink() -> None:
    received = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) + 0.1
    received[:, 0] = 1000
    weights = Attention(floor=0.2, clip=0.95).scaled(received)
    assert torch.allclose(weights.mean(1), torch.ones(3))
    assert torch.allclose(weights.amin(1) / weights.amax(1), torch.tensor(0.2))
    assert torch.equal(weights[:, 0], weights.amax(1))
    assert torch.equal(weights[:, 1:].argsort(1)[:, :30], received[:, 1:].argsort(1)[:, :30])
    assert float(weights.std(1).min()) > 0.2  # the sink did not push the others down to one floor
    assert float(Attention(floor=0.2, clip=1.0).scaled(received)[:, 1:].std(1).max()) < 0.01
    assert torch.equal(Attention().scaled(torch.full((1, 5), 0.3)), torch.ones(1, 5))
    assert torch.equal(Attention(floor=1.0).scaled(received), torch.ones(3, 40))


def test_the_collector_means_are_weighted() -> None:
    generator = torch.Generator().manual_seed(0)
    x, reference = torch.randn(2, 3, 9, 8, generator=generator)
    weights = torch.rand(3, 9, generator=generator)
    collector = HessianCollector(8, cross=True)
    collector.update(x, reference, weights)
    rows, others, r = (part.flatten(0, 1).double() for part in (x, reference, weights[..., None]))
    found = collector.finish()
    assert found.tokens == len(rows)
    naive = torch.stack([w * row.outer(row) for w, row in zip(r, rows, strict=True)]).mean(0)
    assert torch.allclose(found.hessian.double(), naive, atol=1e-5)
    assert found.cross is not None
    naive = torch.stack([w * a.outer(b) for w, a, b in zip(r, others, rows, strict=True)]).mean(0)
    assert torch.allclose(found.cross.double(), naive, atol=1e-5)


@torch.no_grad()
def test_hessians_of_a_trained_model_are_the_formula(demo: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, model.config.vocab_size, (2, 24), generator=generator)} for _ in "ab"]
    found = walk(model, batches[0])
    sites = [site for site in found.blocks[1].sites if site.name.endswith(("q_proj", "o_proj", "down_proj"))]
    wanted = Attention(floor=0.1, clip=0.9)
    with Replay(model, found.chain) as replay:
        previous = [replay.output(0, one, None) for one in batches]
        weights = wanted.weights(replay, 1, batches, previous)
        stages = [Stage(model, [site], cross=False) for site in sites]
        collect(stages, replay, 1, batches, previous, weights)
        hessians = [stage.finish()[0].hessian for stage in stages]
    inputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for site in sites:
        hook = lambda _, args, name=site.name: inputs[name].append(args[0].double())  # noqa: E731
        model.get_submodule(site.name).register_forward_pre_hook(hook)
    r = list[Tensor]()
    for one in batches:
        model(**one)
        for window in attentions(model, one)[1].double():  # [heads, queries, tokens]
            mean = window.sum((0, 1)) / (window > 0).sum((0, 1))
            part = mean.clamp_max(mean.sort().values[21])  # the 22nd of 24: 0.9 of them rounded up
            part = 0.1 + 0.9 * (part - part.min()) / (part.max() - part.min())
            r.append(part / part.mean())
    assert torch.allclose(torch.cat(weights).double(), torch.stack(r), atol=1e-4)
    for site, hessian in zip(sites, hessians, strict=True):
        x = torch.cat(inputs[site.name])  # [windows, tokens, in]
        naive = torch.einsum("wt,wti,wtj->ij", torch.stack(r), x, x) / (x.shape[0] * x.shape[1])
        assert float((hessian - naive).norm() / naive.norm()) < 1e-4
        plain = torch.einsum("wti,wtj->ij", x, x) / (x.shape[0] * x.shape[1])
        assert float((plain - naive).norm() / naive.norm()) > 1e-2


@pytest.mark.parametrize("match", ["quantized", "float"])
def test_a_recipe_with_importance(llama: Path, words: Path, tmp_path: Path, match: str) -> None:
    plain = tiny.recipe(words, f"match={match}", bits=2)
    recipe = replace(plain, importance=Attention())
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert override(recipe, ["importance.floor=0.1"]).importance == Attention(floor=0.1)
    for name, one in (("a", recipe), ("b", recipe), ("c", plain)):
        quant.quantize(str(llama), tmp_path / name, one)
    first, second, other = (tiny.contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


def test_experts_count_their_tokens_alike(words: Path, tmp_path: Path) -> None:
    recipe = replace(tiny.recipe(words), importance=Attention())
    result = quant.quantize(str(tiny.model("mixtral", tmp_path / "model")), tmp_path / "out", recipe)
    assert any(site["experts"] for site in result.report["sites"])


def test_a_model_without_attention_is_refused() -> None:
    model = make_from("MambaForCausalLM", vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    inputs = batch(1, 8)
    chain = walk(model, inputs).chain
    said = pytest.raises(CalibrationError, match=r"no attention among its 8 tokens.*set importance to null")
    with torch.no_grad(), Replay(model, chain) as replay, said:
        Attention().weights(replay, 0, [inputs], [None])


@pytest.mark.parametrize(("name", "value"), [("floor", 0.0), ("floor", 1.1), ("clip", 0.0), ("clip", float("nan"))])
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"importance.{name}"):
        Attention(**{name: value})
    with pytest.raises(SettingsError, match="importance"):
        recipe_from_dict({"importance": {"kind": "Gradient"}})
    with pytest.raises(SettingsError, match="give an Attention"):
        Recipe(importance="attention")
    with pytest.raises(SettingsError, match="weighs the calibration"):
        Recipe(importance=Attention(), calibration=None)
