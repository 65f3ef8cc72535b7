"""Rotations folded into weights: the same function for every architecture that they are folded into, and a reason for
every one that they are not; a packed checkpoint like any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quant
from quant import Recipe, quantize
from quant.calibration.samples import noise
from quant.errors import SettingsError
from quant.estimate import estimate
from quant.kernels.spec import LowRank, Rotated, Trellis, Uniform
from quant.models.foldable import STREAM, find
from quant.models.folding import Folded, Folding
from quant.models.skeleton import Skeleton
from quant.models.source import Source
from quant.models.walk import walk
from quant.prepare import prepare
from quant.progress import Progress
from quant.recipe import override, recipe_from_dict
from quant.recovery.distillation import Distillation
from quant.solvers.nearest import Nearest
from tests import tiny
from tests.architectures import batch, checkpoint
from tests.test_recovery import Killed

FOLDING = Folding(untie=True)


def folded(folder: Path, folding: Folding = FOLDING) -> tuple[Folded, Skeleton, list[torch.Tensor]]:
    """What is found, a skeleton that loads it, and the logits of the model without and with it on other tokens than
    those that it was proven on."""
    alone, skeleton = (Skeleton(Source(folder, str(folder))) for _ in range(2))
    chain = walk(skeleton.model, {"input_ids": torch.zeros((1, 8), dtype=torch.int64)}).chain
    found = find(alone, chain, noise(alone.model, 16).batches[0], folding)
    logits: list[torch.Tensor] = []
    for change in (None, found):
        skeleton.change = change
        if change is not None and found.untied:
            skeleton.untie()
        skeleton.load(skeleton.names_under(""))
        found.packed = frozenset(found.changes)  # nothing is rounded
        logits.append(skeleton.model(**batch(2, 24)).logits)
    return found, skeleton, logits


# pairs of linears; whether the stream is folded, or a part of the reason why not
@pytest.mark.parametrize(
    ("name", "pairs", "stream"),
    [
        ("llama", 2, True),
        ("llama-tied", 2, True),
        ("qwen2", 2, True),  # q, k and v have biases
        ("qwen3", 2, True),  # heads of 24
        ("phi3", 2, True),  # q, k and v are one matrix
        ("gemma3", 4, "model.layers.0: its output changes by"),  # norms behind the writers
        ("mixtral", 2, "model.layers.0: its output changes by"),  # experts read the stream
        ("opt-projected", 2, "model.decoder.layers.0: its output changes by"),  # norms behind each sum
        ("opt", 2, True),  # LayerNorm with a bias
        ("gpt2", 2, True),  # q, k and v are one matrix, transposed
        ("gpt-neox", 2, True),  # q, k and v of each head side by side
        ("falcon", 2, True),  # one head of keys and values
    ],
)
def test_a_folded_model_is_the_same_function(name: str, pairs: int, stream: bool | str) -> None:
    found, skeleton, (before, after) = folded(checkpoint(name))
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4
    assert len([key for key in found.said if "->" in key]) == pairs
    assert (STREAM in found.said) == (stream is True)
    assert isinstance(stream, bool) or stream in found.left[STREAM]
    assert all(name in dict(skeleton.model.named_parameters()) for name in found.changes)
    plain = Skeleton(Source(checkpoint(name), name))
    plain.load(plain.names_under(""))
    state = plain.model.state_dict()
    for key in found.changes:
        assert not torch.equal(skeleton.model.get_parameter(key), state[key]), key


def test_the_trained_model_is_the_same_function_too(demo: Path) -> None:
    found, _, (before, after) = folded(demo)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4
    assert found.left == {}
    assert found.untied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_tied_head_stands_in_the_way(demo: Path) -> None:
    found, _, (before, after) = folded(demo, Folding())
    assert "folding.untie=true" in found.left[STREAM]
    assert found.untied == {}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found.changes} == {"v_proj", "o_proj"}
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4


def test_a_tied_head_behind_equal_gains_does_not(tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama-tied"))
    model.model.norm.weight.data.fill_(1.5)
    model.save_pretrained(tmp_path)
    found, _, (before, after) = folded(tmp_path, Folding())
    assert STREAM in found.said
    assert "model.norm.weight" not in found.changes
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4


@pytest.mark.parametrize("gain", [0.0, 1e-3])
def test_gains_too_small_to_divide_a_bias_by(gain: float, tmp_path: Path) -> None:
    """A channel switched off, and one whose bias, divided and rounded to bfloat16, would be off by more than it was."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("opt"))
    norm = model.model.decoder.layers[1].final_layer_norm
    norm.weight.data[3], norm.bias.data[3] = gain, 0.5
    model.save_pretrained(tmp_path)
    found, _, (before, after) = folded(tmp_path)
    assert found.left[STREAM].endswith("final_layer_norm (LayerNorm): its gains are too small to divide its bias by")
    assert len(found.said) == 2
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4


def test_heads_of_values_are_those_of_the_keys() -> None:
    """Four heads of queries read two of values."""
    found, _, _ = folded(checkpoint("llama"))
    assert set(found.said.values()) >= {"heads of 16"}
    turn: Any = found.changes["model.layers.0.self_attn.v_proj.weight"][0]
    assert (turn.block, len(turn.signs)) == (16, 32)
    read: Any = found.changes["model.layers.0.self_attn.o_proj.weight"][0]
    assert read.signs.view(4, 16).tolist() == turn.signs.view(2, 1, 16).expand(2, 2, 16).reshape(4, 16).tolist()


def short(text: Path, *settings: str, **changes: Any) -> Recipe:
    return replace(tiny.recipe(text, *settings), **{"folding": FOLDING, **changes})


def test_end_to_end(words: Path, tmp_path: Path) -> None:
    """A tied model with values and outputs of attention left float; verified by the run itself, loaded by both."""
    model, out = tiny.model("qwen2", tmp_path / "model"), tmp_path / "out"
    recipe = short(words, skip=("*.0.self_attn.[vo]_proj",))
    predicted = estimate(prepare(str(model), recipe))
    result = quantize(str(model), out, recipe)
    assert predicted.weight_files == result.written.files
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert STREAM in result.report["folding"]["folded"]
    assert "rotations folded" in (out / "README.md").read_text()
    stored, source = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    gains = [tensor for name, tensor in stored.items() if name.endswith("norm.weight")]
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in gains)
    for name in ("model.layers.0.self_attn.v_proj.bias", "model.layers.0.self_attn.o_proj.weight"):
        assert stored[name].shape == source[name].shape
        assert not torch.equal(stored[name], source[name])
    given, load = batch(1, 24), transformers.AutoModelForCausalLM.from_pretrained
    ours, theirs, original = (m(**given).logits.detach() for m in (quant.load(out), load(out), load(model)))
    assert torch.equal(ours, theirs)
    assert float((ours - original).norm() / original.norm()) < 0.2


def test_killed_and_resumed(words: Path, llama: Path, tmp_path: Path) -> None:
    class Dying(Progress):
        def advanced(self, index: int, weights: int) -> None:
            raise Killed

    recipe = short(words, distillation=Distillation(steps=2))
    quantize(str(llama), tmp_path / "whole", recipe)
    quantize(str(llama), tmp_path / "twice", recipe)
    assert tiny.contents(tmp_path / "twice") == tiny.contents(tmp_path / "whole")
    with pytest.raises(Killed):
        quantize(str(llama), tmp_path / "out", recipe, progress=Dying())
    report = quantize(str(llama), tmp_path / "out", recipe, mode="resume").report
    assert report["resumed_blocks"] == 1
    assert tiny.contents(tmp_path / "out") == tiny.contents(tmp_path / "whole")


def test_outliers_of_the_trained_model_are_spread(demo: Path, tmp_path: Path) -> None:
    """Gains that are small where the weights behind them are large, as in large models: a grid of a whole row suffers
    from them, and nothing is rotated at run time."""
    model = shutil.copytree(demo, tmp_path / "model")
    state = load_file(model / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, 7::32] *= 8
        elif name.endswith("layernorm.weight"):
            tensor[7::32] /= 8
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    given = batch(2, 24)
    expected = transformers.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)(**given).logits.detach()
    plain = Recipe(spec=Uniform(bits=4, group_size=-1), solver=Nearest(), calibration=None)
    lost: list[float] = []
    for folding in (None, FOLDING):
        quantize(str(model), tmp_path / str(folding), replace(plain, folding=folding))
        lost.append(float((quant.load(tmp_path / str(folding))(**given).logits.detach() - expected).norm()))
    assert lost[1] < 0.7 * lost[0]


def test_inputs_that_come_rotated_need_not_be_rotated_again(words: Path, llama: Path) -> None:
    recipe = short(words, spec=LowRank(Rotated(Trellis(length=32)), rank=4), folding=Folding(online=False))
    specs = prepare(str(llama), recipe).plan.specs
    assert {name.rpartition(".")[2] for name, spec in specs.items() if isinstance(spec.base, Rotated)} == {"down_proj"}  # type: ignore[union-attr]
    again = prepare(str(llama), replace(recipe, folding=Folding())).plan.specs
    assert all(spec == recipe.spec for spec in again.values())


def test_recipes_keep_it_and_refuse_what_makes_no_sense(words: Path) -> None:
    recipe = short(words)
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert override(Recipe(), ["folding={}"]).folding == Folding()
    with pytest.raises(SettingsError, match=r"set folding\.stream too"):
        override(Recipe(), ['folding={"stream": false, "untie": true}'])
