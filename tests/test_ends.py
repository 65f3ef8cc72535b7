"""The embedding and the head in a grid: what they are, that they load as anything else does, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import quant
from quant import ends, pipeline
from quant.budget import sized
from quant.embedding import PackedEmbedding, PackedHead
from quant.errors import CheckpointError, ModelError, ResumeError, SettingsError
from quant.estimate import estimate
from quant.eval.evaluate import evaluate
from quant.eval.footprint import size_of
from quant.eval.subject import open_subject
from quant.inspect import look
from quant.kernels import order
from quant.kernels.spec import Trellis, Uniform
from quant.linear import PackedLinear
from quant.models.stream import first_tensor
from quant.models.walk import walk
from quant.prepare import Settings, prepare
from quant.progress import Progress
from quant.recipe import Recipe, load_recipe, override, recipe_from_dict
from tests import tiny
from tests.architectures import make
from tests.processes import Start, quiet, wait_for
from tests.test_kernels import some_packed

IDS = torch.arange(4, 24)[None]
SMALL = Uniform(bits=5, group_size=24)  # groups that do not divide the width


def recipe(words: Path, *settings: str) -> Recipe:
    return replace(tiny.recipe(words, *settings), embeddings=SMALL)


@pytest.fixture(scope="module")
def tied(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama whose head is its embedding. Never write into it."""
    folder = tmp_path_factory.mktemp("tied")
    quant.quantize(str(tiny.model("llama-tied", folder / "float")), folder / "packed", recipe(words))
    return folder / "packed"


@pytest.fixture(scope="module")
def untied(llama: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("untied") / "packed"
    quant.quantize(str(llama), out, recipe(words))
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_are_those_of_the_whole_weight_in_either_order(bits: int, symmetric: bool) -> None:
    packed = some_packed(Uniform(bits=bits, group_size=48, symmetric=symmetric), (37, 300), seed=bits)
    index = torch.tensor([36, 0, 5, 5, 17])
    expected = packed.dequantize()[index]
    assert torch.equal(packed.rows(index).dequantize(), expected)
    arranged = order.arrange(packed)
    assert torch.equal(order.plain(arranged.rows(index)).dequantize(), expected)
    assert arranged.rows(index[:0]).shape == (0, 300)
    for weight in (packed, arranged):  # as of a float embedding: -1 is not the last
        with pytest.raises((IndexError, RuntimeError)):
            weight.rows(torch.tensor([-1]))


@pytest.mark.parametrize(
    ("name", "kinds", "scaled"),
    [
        ("llama", ["embedding", "head"], False), ("gpt2", ["both"], False), ("gemma3", ["both"], True),
        ("opt-projected", ["both"], False), ("gpt-neox", ["embedding", "head"], False), ("bert", ["embedding"], False),
        ("qwen3-moe", ["embedding", "head"], False), ("gemma4", ["both", "embedding"], True),
    ],
)  # fmt: skip
def test_ends_of_any_architecture(name: str, kinds: list[str], scaled: bool, words: Path, tmp_path: Path) -> None:
    """Gemma's embedding scales what it looks up; the fourth has another, for all layers. BERT's of token types, which
    are 0 as the tokens are in the traced pass, is none. The run's own verification compares logits on the way."""
    made = quant.quantize(str(tiny.model(name, tmp_path / name)), tmp_path / "out", recipe(words))
    assert [end["end"] for end in made.report["ends"]] == kinds
    model, whole = quant.load(tmp_path / "out"), quant.load(tmp_path / "out", dequantize=True)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(embedding, nn.Embedding)
    assert type(whole.get_input_embeddings()) is (nn.Embedding if not scaled else type(embedding).__bases__[1])
    head = next((kind for end, kind in (("both", PackedHead), ("head", PackedLinear)) if end in kinds), type(None))
    assert isinstance(model.get_output_embeddings(), head)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS)[0], whole(IDS)[0], rtol=1e-5, atol=1e-5)
        rows = whole.get_input_embeddings()(IDS)
    assert torch.equal(embedding(IDS), rows)


def test_the_float_path_is_the_float_model(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a Gemma 4 is given rows of a second table: float ones on this path, beyond the first block too."""
    source, ran = tiny.model("gemma4", tmp_path / "float"), pipeline._advance_float
    batch, outputs = dict[str, Tensor](), list[Tensor]()

    def advance(replay: Any, index: int, batches: Any, wanted: Any, store: Any, originals: Any) -> None:
        ran(replay, index, batches, wanted, store, originals)
        batch.update(batches[-1])
        outputs.append(first_tensor(store[len(batches) - 1]))

    monkeypatch.setattr(pipeline, "_advance_float", advance)
    made = replace(recipe(words, "match=float"), embeddings=Uniform(bits=2, group_size=32))
    quant.quantize(str(source), tmp_path / "out", made)
    with torch.no_grad():
        seen = AutoModelForCausalLM.from_pretrained(source)(**batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(outputs[:-1], [*seen[1:4]])


def test_they_are_counted_apart(tied: Path, words: Path, tmp_path: Path) -> None:
    """The bits of the linears are those of a run that leaves the ends float, in every place that tells them."""
    source = tied.parent / "float"
    plain = quant.quantize(str(source), tmp_path / "plain", tiny.recipe(words)).report
    report = json.loads((tied / "report.json").read_text())
    assert report["bits"] == plain["bits"]
    assert "ends" not in plain
    assert [site["site"] for site in report["sites"]] == [site["site"] for site in plain["sites"]]
    [end] = report["ends"]
    assert end["nbytes"] == SMALL.nbytes((128, 64))
    assert end["bits_per_weight"] < 7
    assert not any("embed" in name or "head" in name for name in report["left_float"])
    assert sum(plain["files"].values()) - sum(report["files"].values()) > 128 * 64 * 4 - end["nbytes"] - 500
    seen = look(tied)
    assert seen["bits"]["measured"] == report["bits"]["measured"]
    assert seen["ends"][0]["nbytes"] == end["nbytes"]
    size, whole = size_of(open_subject(tied)), size_of(open_subject(source))
    assert size.linear_bits == pytest.approx(report["bits"]["measured"])
    assert size.parameters == whole.parameters
    assert size.total_bits < 8 * size.bytes / whole.parameters < whole.total_bits / 2  # those have a header too
    assert "embedding and head" in (tied / "README.md").read_text()
    assert "--embedding-bits 5 " in report["command"]
    assert "--set embeddings.group_size=24" in report["command"]
    assert "plan.json" not in report["command"]
    assert end["site"] in (tied / "README.md").read_text()
    config = json.loads((tied / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    assert config["sites"][end["site"]]["end"] == "both"
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]["format_version"] == 2


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_packed_model_does_what_a_model_does(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    model = quant.load(folder)
    expected = logits(model)
    generated = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == IDS.shape[1] + 3
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(again), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(quant.load(tmp_path / "saved")), expected)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    if kind == "tied":
        assert other.get_output_embeddings().embedding is other.get_input_embeddings()
    torch.save(model, tmp_path / "module")
    assert torch.equal(logits(torch.load(tmp_path / "module", weights_only=False)), expected)
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    assert any("lm_head" in name for name in model.state_dict()) == (kind == "untied")
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(base(IDS)[0], model.model(IDS)[0])
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    assert half.get_input_embeddings()(IDS).dtype == torch.bfloat16


def test_a_dequantized_model_is_tied_again(tied: Path, tmp_path: Path) -> None:
    whole = quant.load(tied, dequantize=True)
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    whole.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(whole))


def test_transformers_alone_refuses_it(tied: Path, tmp_path: Path) -> None:
    """Codes have a shape that no embedding has."""
    for file in tied.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_eight_bits_cost_nothing_and_four_less_with_the_heads_inputs(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained weights, held-out text; all linears at 8 bits. Beside it what either half of the Hessian gives alone."""
    original, mixed = open_subject(demo), ends._statistics

    def divergence(bits: int, name: str) -> float:
        few = ["spec.bits=8", "calibration.samples=16", "calibration.sequence_length=128"]
        made = replace(override(load_recipe("gptq"), few), embeddings=Uniform(bits=bits, group_size=64))
        quant.quantize(str(demo), tmp_path / name, made)
        found = evaluate(tmp_path / name, against=original, window=256, max_windows=16).divergence
        assert found is not None
        return found.kl

    assert divergence(8, "eight") < 3e-4
    four = divergence(4, "four")
    monkeypatch.setattr(ends, "_statistics", lambda site, _, device: mixed(site, None, device))
    assert four < 0.9 * divergence(4, "identity") < 0.05


def test_a_head_of_its_own_is_solved_by_its_inputs(llama: Path, words: Path, tmp_path: Path) -> None:
    """Its error is relative to the outputs that it has in the float model; rounding to nearest loses more of them."""
    errors = {}
    for name in ("gptq", "rtn"):
        made = override(load_recipe(name), ["spec.group_size=32"])
        if made.calibration is not None:
            made = tiny.recipe(words)
        made = replace(made, embeddings=Uniform(bits=3, group_size=32))
        [embedding, head] = quant.quantize(str(llama), tmp_path / name, made).report["ends"]
        errors[name] = embedding["error"], head["error"]
    assert errors["gptq"][1] < 0.8 * errors["rtn"][1]
    assert errors["gptq"][0] < 1.05 * errors["rtn"][0]


def test_blocks_make_up_for_what_the_embedding_lost(demo: Path, tmp_path: Path) -> None:
    """They see the packed one, and aim at what the float one gives. Trained weights, held-out text."""
    original, lost = open_subject(demo), dict[str, float]()
    for match in ("quantized", "float"):
        few = ["spec.bits=8", "calibration.samples=32", "calibration.sequence_length=256", f"match={match}"]
        made = replace(override(load_recipe("gptq"), few), embeddings=Uniform(bits=3, group_size=64))
        quant.quantize(str(demo), tmp_path / match, made)
        found = evaluate(tmp_path / match, against=original, window=256, max_windows=16).divergence
        assert found is not None
        lost[match] = found.kl
    assert lost["float"] < 0.92 * lost["quantized"]


def test_tuned_end_to_end(words: Path, tmp_path: Path) -> None:
    """The student has the packed ends, the teacher its own: what is lost in them is part of the loss."""
    source, before = tiny.model("llama-tied", tmp_path / "float"), list[float]()
    for end in (None, Uniform(bits=8, group_size=16), Uniform(bits=2, group_size=16)):
        few = ["calibration.samples=8", "calibration.sequence_length=32", "distillation.samples=8"]
        few += [f"calibration.text={words}", "mixed=false", "distillation.steps=2", "spec.base.bits=3"]
        made = replace(override(load_recipe("best"), few), embeddings=end)
        report = quant.quantize(str(source), tmp_path / str(end), made).report
        before.append(report["distillation"]["before"])
        assert report["verification"]["worst_difference"] < 1e-4 * report["verification"]["largest_logit"]
    assert before[1] == pytest.approx(before[0], rel=0.1)
    assert before[2] > 2 * before[0]


def test_killed_it_resumes_to_the_same_bytes(
    llama: Path, words: Path, tied: Path, tmp_path: Path, started: Start
) -> None:
    source, out, entry = (
        tied.parent / "float",
        tmp_path / "out",
        "00003.json",
    )  # two blocks, the tuning's place, the ends
    child = started(quiet, quant.quantize, str(source), out, recipe(words))
    wait_for(lambda: (out / ".bitwright" / entry).exists() or (out / "config.json").exists(), child)
    child.kill()
    child.join()
    if not (out / "config.json").exists():
        assert look(out)["kind"] == "unfinished"
        assert look(out)["sites_done"] >= 1
    quant.quantize(str(source), out, recipe(words), mode="resume")
    assert tiny.contents(out) == tiny.contents(tied)


def test_the_dry_run_knows_their_bytes(tied: Path, words: Path) -> None:
    predicted = estimate(prepare(str(tied.parent / "float"), recipe(words), Settings(threads=1)))
    report = json.loads((tied / "report.json").read_text())
    assert predicted.weight_files == report["files"]
    assert predicted.promised_bits == report["bits"]["promised"]


def test_a_size_that_only_packed_ends_meet(demo: Path) -> None:
    def made(bits: float, embeddings: Uniform | None) -> Recipe:
        small = override(load_recipe("gptq"), [f"spec.bits={int(bits)}", "calibration=null"])
        return replace(small, embeddings=embeddings)

    ready = lambda recipe: prepare(str(demo), recipe, Settings(threads=1))  # noqa: E731
    with pytest.raises(SettingsError, match="--embedding-bits 8"):
        sized("300KB", lambda bits: made(bits, None), ready, Progress())
    chosen = sized("300KB", lambda bits: made(bits, Uniform(bits=4)), ready, Progress())
    assert sum(estimate(chosen).weight_files.values()) <= 300_000


def test_a_plan_may_leave_one_float(llama: Path, words: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"lm_head": None, "*": Uniform(bits=6).to_dict()}))
    report = quant.quantize(str(llama), tmp_path / "out", recipe(words), settings=Settings(plan=plan)).report
    assert [end["site"] for end in report["ends"]] == ["model.embed_tokens"]
    assert report["ends"][0]["spec"] == SMALL.to_dict()  # `*` stands for the linears
    assert report["left_float"]["lm_head"] == "the plan keeps it float"
    assert type(quant.load(tmp_path / "out").lm_head) is nn.Linear
    with pytest.raises(SettingsError, match=r"lm_head is no site .* where --embedding-bits is given"):
        quant.quantize(str(llama), tmp_path / "none", tiny.recipe(words), settings=Settings(plan=plan))
    plan.write_text(json.dumps({"lm_head": Trellis().to_dict()}))
    with pytest.raises(SettingsError, match="lm_head: the head of a model takes a uniform grid"):
        quant.quantize(str(llama), tmp_path / "none", recipe(words), settings=Settings(plan=plan))


@pytest.mark.parametrize("name", ["rtn", "gptq", "balanced", "best"])
@pytest.mark.parametrize("by_plan", [False, True])
def test_they_alone(llama: Path, words: Path, tmp_path: Path, name: str, by_plan: bool) -> None:
    """Every linear is skipped, or a plan keeps it float; the dry run knows what that takes, whatever the recipe."""
    made = replace(load_recipe(name), embeddings=SMALL, skip=() if by_plan else ("model.layers*",))
    if made.calibration is not None:
        few = ["calibration.samples=4", "calibration.sequence_length=32", f"calibration.text={words}"]
        made = override(made, [*few, *(["distillation.steps=1", "distillation.samples=4"] if name == "best" else [])])
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"*": None} if by_plan else {}))
    place = Settings(threads=1, plan=plan)
    predicted = estimate(prepare(str(llama), made, place))
    report = quant.quantize(str(llama), tmp_path / "out", made, settings=place).report
    assert [end["site"] for end in report["ends"]] == ["model.embed_tokens", "lm_head"]
    assert (report["sites"], predicted.weight_files) == ([], report["files"])
    assert 0 < predicted.seconds < 5 + 10 * report["seconds"]
    model = quant.load(tmp_path / "out")
    assert {type(one).__name__ for one in model.modules()} >= {"PackedEmbedding", "PackedLinear", "Linear"}
    assert "# `llama`, its embedding and head packed" in (tmp_path / "out" / "README.md").read_text()


def test_a_pattern_that_no_linear_has_stands_for_ends(llama: Path, words: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"*embed*": None, "lm_*": Uniform(bits=6).to_dict(), "*": Uniform(bits=7).to_dict()}))
    specs = prepare(str(llama), recipe(words), Settings(plan=plan)).plan.specs
    assert (specs["model.embed_tokens"], specs["lm_head"]) == (None, Uniform(bits=6))
    assert {spec for name, spec in specs.items() if name.startswith("model.layers")} == {Uniform(bits=7)}


def test_one_may_be_skipped(llama: Path, words: Path, tmp_path: Path) -> None:
    report = quant.quantize(str(llama), tmp_path / "out", replace(recipe(words), skip=("model.embed*",))).report
    assert [end["site"] for end in report["ends"]] == ["lm_head"]
    assert report["left_float"]["model.embed_tokens.weight"] == "skipped by --skip model.embed*"


def test_what_cannot_be_packed_stays_float_with_a_reason() -> None:
    class Looking(transformers.LlamaForCausalLM):
        """Asks its embedding's weight for a dtype, which a packed one has not."""

        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            assert self.model.embed_tokens.weight.dtype.is_floating_point
            return super().forward(input_ids, **options)

    class Asking(transformers.LlamaForCausalLM):
        """Asks the model, as many do; a packed one finds another parameter's."""

        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            assert self.dtype.is_floating_point
            assert self.model.dtype.is_floating_point
            return super().forward(input_ids, **options)

    class Tripled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    def ends_of(change: Any) -> tuple[list[str], dict[str, str]]:
        model: Any = make("llama")
        change(model)
        found = walk(model, {"input_ids": IDS}, ends=True)
        return [site.end for site in found.ends], found.left

    def become(kind: type[nn.Module]) -> Any:
        return lambda model: setattr(model, "__class__", kind)

    kinds, left = ends_of(become(Looking))
    assert kinds == ["head"]
    assert left["model.embed_tokens.weight"] == "its weight is read from outside its own forward"
    assert ends_of(become(Asking))[0] == ["embedding", "head"]
    assert ends_of(lambda model: setattr(model, "get_input_embeddings", lambda: None))[0] == ["head"]
    kinds, left = ends_of(lambda model: setattr(model.lm_head, "__class__", Tripled))
    assert kinds == ["embedding"]
    assert left["lm_head.weight"] == "a Tripled, which no packed head stands for"
    kinds, left = ends_of(lambda model: setattr(model.model.embed_tokens, "max_norm", 1.0))
    assert kinds == ["head"]
    assert "no packed embedding stands for" in left["model.embed_tokens.weight"]


def test_what_is_refused(llama: Path, words: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no embedding or head that could be packed"):
        quant.quantize(str(llama), tmp_path / "a", replace(recipe(words), skip=("model.embed*", "lm_head")))
    with pytest.raises(SettingsError, match="is not rounded"):
        replace(recipe(words), embeddings=Uniform(bits=8, activations=8))
    with pytest.raises(SettingsError, match="set embeddings or folding to null"):
        recipe_from_dict({"embeddings": SMALL.to_dict(), "folding": {}})
    with pytest.raises(SettingsError, match="embeddings"):
        recipe_from_dict({"embeddings": Trellis().to_dict()})
    with pytest.raises(ModelError, match="matches no site"):
        quant.quantize(str(llama), tmp_path / "b", replace(tiny.recipe(words), skip=("lm_head",)))
    assert recipe_from_dict(recipe(words).to_dict()) == recipe(words)


@pytest.mark.parametrize(
    "damage",
    [{"end": "tail"}, {"end": "both", "experts": 2}, {"end": "both", "transposed": True}, {"end": 1}, {"end": ["both"]},
     {"end": "both", "spec": Trellis().to_dict()}],
)  # fmt: skip
def test_a_damaged_entry_is_refused(damage: dict[str, Any], tied: Path, tmp_path: Path) -> None:
    for file in tied.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["sites"]["model.embed_tokens"] |= damage
    del config["quantization_config"]["checksums"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        quant.load(tmp_path)


def test_ends_of_a_tied_config_that_are_stored_apart(words: Path, tmp_path: Path) -> None:
    """transformers ties no two stored tensors that differ; each is packed for itself."""
    source = tiny.model("llama-tied", tmp_path / "float")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)) / 8
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = quant.quantize(str(source), tmp_path / "out", recipe(words)).report
    assert [end["end"] for end in report["ends"]] == ["embedding", "head"]
    model, whole = quant.load(tmp_path / "out"), quant.load(tmp_path / "out", dequantize=True)
    torch.testing.assert_close(logits(model), logits(whole))
    assert type(model.lm_head) is PackedLinear
    assert whole.lm_head.weight is not whole.model.embed_tokens.weight
    whole.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert torch.equal(logits(again), logits(whole))
    plan = tmp_path / "plan.json"
    for name, kind in (("lm_head", nn.Linear), ("model.embed_tokens", PackedLinear)):
        plan.write_text(json.dumps({name: None}))
        quant.quantize(str(source), tmp_path / name, recipe(words), settings=Settings(plan=plan))
        assert type(quant.load(tmp_path / name).lm_head) is kind


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_a_base_without_a_head_is_saved_and_loads(
    auto: Any, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = auto.from_pretrained(request.getfixturevalue(kind), dtype=torch.float32)
    base.config.pad_token_id = 0
    base.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], base(IDS)[0])


def test_a_single_token_of_an_embedding_that_scales_and_pads(words: Path, tmp_path: Path) -> None:
    """torch wants the padding's number below that of the rows, which here are those that are looked up."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}
    config = transformers.XGLMConfig(vocab_size=128, bos_token_id=0, eos_token_id=2, pad_token_id=1, **sizes)
    transformers.XGLMForCausalLM(config).save_pretrained(tmp_path / "float")
    quant.quantize(str(tiny.add_tokenizer(tmp_path / "float")), tmp_path / "out", recipe(words))
    model, whole = quant.load(tmp_path / "out"), quant.load(tmp_path / "out", dequantize=True)
    for ids in (IDS, IDS[:, :1], torch.tensor([[1]])):
        assert torch.equal(model.get_input_embeddings()(ids), whole.get_input_embeddings()(ids))
    assert model.generate(IDS, max_new_tokens=3).shape[1] == IDS.shape[1] + 3


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_rows_cannot_be_added(kind: str, request: pytest.FixtureRequest) -> None:
    """To as many as there are is no change, and is often asked for; a float model can have more."""
    loaded = quant.load(request.getfixturevalue(kind))
    for model in (loaded, copy.deepcopy(loaded), AutoModel.from_pretrained(loaded.name_or_path)):
        embedding = model.get_input_embeddings()
        assert model.resize_token_embeddings(128) is embedding
        assert model.resize_token_embeddings() is embedding
        assert model.resize_token_embeddings(new_num_tokens=100, pad_to_multiple_of=64) is embedding
        for given in ({"new_num_tokens": 130}, {"pad_to_multiple_of": 100}, {"new_num_tokens": 120}):
            with pytest.raises(SettingsError, match=r"keeps its 128 rows.*without --embedding-bits.*dequantize=True"):
                model.resize_token_embeddings(**given, mean_resizing=False)
    whole = loaded.dequantize()
    whole.resize_token_embeddings(130, mean_resizing=False)
    assert logits(whole).shape[-1] == 130


def test_tokens_that_are_none_are_refused(tied: Path) -> None:
    embedding = quant.load(tied).get_input_embeddings()
    for token in (-1, 128):
        with pytest.raises(IndexError):
            embedding(torch.tensor([[token]]))


def test_no_pass_for_a_head_that_stays_float(
    llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[Any]()
    monkeypatch.setattr(ends, "streamed", lambda *args: seen.append(args))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"lm_head": None}))
    quant.quantize(str(llama), tmp_path / "out", recipe(words), settings=Settings(plan=plan))
    assert not seen


def test_an_unfinished_run_counts_its_blocks(
    llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_blocks", stop)
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(llama), tmp_path, recipe(words))
    assert (tmp_path / ".bitwright" / "00003.json").exists()
    with pytest.raises(ResumeError, match="blocks done: 0"):
        quant.quantize(str(llama), tmp_path, recipe(words))


def test_tuning_of_nothing_but_an_end_is_refused_before_any_work(llama: Path, words: Path, tmp_path: Path) -> None:
    few = [f"calibration.text={words}", "calibration.samples=4", "calibration.sequence_length=32", "mixed=false"]
    for name in ("lm_head", "lm_head.weight"):
        made = override(load_recipe("best"), [*few, "spec.base.bits=3", f'distillation.only=["{name}"]'])
        with pytest.raises(SettingsError, match="matches no linear and no parameter"):
            prepare(str(llama), replace(made, embeddings=SMALL), Settings(threads=1))
