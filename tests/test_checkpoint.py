"""A packed checkpoint on disk: transformers reads it with this package, refuses it without, and writes it again."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file

import quant
from quant.checkpoint.manifest import read_config, read_sites
from quant.errors import CheckpointError, ModelError, SettingsError
from quant.held import Holder
from quant.kernels.spec import Rotated, Trellis, Uniform
from quant.linear import PackedLinear
from quant.models.source import variant
from quant.recipe import with_spec
from tests import tiny
from tests.architectures import VOCABULARY, make

IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def sites(folder: Path) -> dict[str, Any]:
    return read_config(folder)["quantization_config"]["sites"]


def unseal(folder: Path) -> None:
    """Takes the checksums away, as somebody would who edits a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["checksums"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def copied(packed_llama: Path, tmp_path: Path) -> Path:
    """A packed Llama to be damaged."""
    return Path(shutil.copytree(packed_llama, tmp_path / "copied"))


# --- reading


def test_a_loaded_model_writes_text(packed_llama: Path) -> None:
    model, plain = quant.load(packed_llama), quant.load(packed_llama, dequantize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(packed_llama)
    prompt = tokenizer("a text", return_tensors="pt").input_ids
    texts = [
        tokenizer.decode(m.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0])
        for m in (model, plain)
    ]
    assert texts[0] == texts[1]
    assert prompt.shape == (1, 6)
    assert not model.training


def test_from_pretrained_reads_it_once_quant_is_imported(packed_llama: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(packed_llama, dtype=torch.float32)
    ours = quant.load(packed_llama)
    assert torch.equal(logits(theirs), logits(ours))
    assert sum(isinstance(module, PackedLinear) for module in theirs.modules()) == 14
    headless = transformers.AutoModel.from_pretrained(packed_llama, dtype=torch.float32)
    with torch.no_grad():
        hidden = ours.model(input_ids=IDS).last_hidden_state
        assert torch.equal(headless(input_ids=IDS).last_hidden_state, hidden)


def test_threads_load_one_after_another(packed_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads at once make transformers skip what it fills, and forget tied weights in whatever is loaded later."""
    load, here, most = transformers.LlamaForCausalLM.from_pretrained, list[None](), list[int]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        here.append(None)
        most.append(len(here))
        time.sleep(0.02)
        try:
            return load(*args, **kwargs)
        finally:
            here.pop()

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", counted)
    expected = logits(quant.load(packed_llama))
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(quant.load, [packed_llama] * 3))
    assert most == [1] * 4
    assert all(torch.equal(logits(model), expected) for model in models)


def test_adapters_can_be_trained_on_it(packed_llama: Path) -> None:
    """The Trainer takes a PEFT model only where the quantizer says that training works."""
    model = quant.load(packed_llama)
    assert model.hf_quantizer.is_trainable
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.square().sum().backward()
    plain = quant.load(packed_llama, dequantize=True)
    again = inputs.detach().requires_grad_()
    plain(inputs_embeds=again).logits.square().sum().backward()
    torch.testing.assert_close(inputs.grad, again.grad)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # between PEFT and transformers
def test_the_trainer_trains_lora(packed_llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(quant.load(packed_llama), config)
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-2
    )
    rows: Any = [{"input_ids": row, "labels": row} for row in IDS]
    transformers.Trainer(model, options, train_dataset=rows).train()
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # between PEFT and transformers
def test_all_linear_finds_packed_linears(packed_llama: Path) -> None:
    """All 14 but for the head, whether one is float or has an adapter already, as in a float model."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = quant.load(packed_llama)
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.up_proj.unpack(torch.float32)
    expected = logits(model)
    config = lambda modules: peft.LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM")  # noqa: E731
    adapted = peft.get_peft_model(model, config(["q_proj"]))
    adapted.add_adapter("all", config("all-linear"))
    adapted.set_adapter("all")
    named = {name for name, _ in adapted.named_parameters() if "lora_A.all" in name}
    assert len(named) == 14
    assert not any("lm_head" in name or "base_layer" in name for name in named)
    assert torch.equal(logits(adapted), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # between PEFT and transformers
def test_adapters_that_read_or_write_the_weight_are_refused(packed_llama: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for how in ({"use_dora": True}, *({"init_lora_weights": name} for name in ("pissa", "olora", "orthogonal"))):
        with pytest.raises(SettingsError, match=r"adapter on packed weights.*choose plain LoRA, or .*dequantize=True"):
            peft.get_peft_model(quant.load(packed_llama), peft.LoraConfig(**plain, **how))
    adapted = peft.get_peft_model(quant.load(packed_llama), peft.LoraConfig(**plain))
    with pytest.raises(SettingsError, match="cannot be merged into packed weights"):
        adapted.merge_and_unload()
    assert torch.equal(logits(adapted.unload()), logits(quant.load(packed_llama)))


def test_packed_weights_stay_packed_in_memory(packed_llama: Path, packed_moe: Path) -> None:
    for folder in (packed_llama, packed_moe):
        model = quant.load(folder)
        promised = sum(
            one.spec.nbytes(one.site.shape)
            for one in read_sites(read_config(folder)["quantization_config"], "").values()
        )
        kept = {name: b.nbytes for name, b in model.named_buffers() if name in tensors(folder)}
        assert sum(kept.values()) == promised
        names = {name.removesuffix(".weight") for name, _ in model.named_parameters()}
        assert names.isdisjoint(sites(folder))


def test_a_variant_is_said_to_be_one(packed_llama: Path, tmp_path: Path) -> None:
    quant.load(packed_llama).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing; model\.fp16\.safetensors is a variant's"):
        quant.load(tmp_path)


def test_a_variant_beside_what_is_looked_for_is_not_at_fault(tmp_path: Path) -> None:
    """As in many pipelines of the hub, which fail for other reasons."""
    shard, index = "b.fp16-00001-of-00002.safetensors", "b.safetensors.index.json"
    for name in ("a.fp16.safetensors", "a.safetensors", shard, index):
        (tmp_path / name).touch()
    assert variant(tmp_path) == ""
    (tmp_path / index).rename(tmp_path / "b.safetensors.index.fp16.json")
    assert f"{shard} is a variant's" in variant(tmp_path)


@pytest.mark.parametrize("kind", ["packed_llama", "packed_moe"])
def test_where_it_goes_and_what_it_computes_in(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    expected = logits(quant.load(folder))
    half = quant.load(folder, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert logits(half).dtype == torch.bfloat16
    spread = quant.load(folder, device="auto", dtype="float32")
    assert torch.equal(logits(spread), expected)
    mapped = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    apart = quant.load(folder, device=mapped | {"model.rotary_emb": "cpu"}, dtype="float32")
    assert torch.equal(logits(apart), expected)
    cpu_offload(spread, torch.device("cpu"), offload_buffers=True)  # packed tensors come and go with their module
    assert {b.device.type for m in spread.modules() if isinstance(m, Holder) for b in m.buffers(False)} == {"meta"}
    assert torch.equal(logits(spread), expected)
    for model in (half, quant.load(folder, device="auto")):  # eight bits of mantissa, two blocks deep
        assert float((logits(model).float() - expected).abs().max()) < 0.1 * float(expected.abs().max())
    with pytest.raises(SettingsError, match=r"device 'tpu': torch cannot use it .*choose cpu"):
        quant.load(folder, device="tpu")
    with pytest.raises(SettingsError, match="dtype 'float99' is unknown; give float32, float16, bfloat16 or auto"):
        quant.load(folder, dtype="float99")


@pytest.mark.parametrize("kind", ["packed_llama", "packed_moe"])
def test_casting_a_model_leaves_its_packed_tensors_alone(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    model = quant.load(folder)
    expected, stored = logits(model), tensors(folder)
    packed = {name for s in read_sites(read_config(folder)["quantization_config"], "").values() for name in s.stored()}
    casts: list[Any] = [
        lambda m: m.to(torch.bfloat16),
        torch.nn.Module.half,
        torch.nn.Module.double,
        lambda m: m.to("cpu"),
    ]
    for cast in casts:
        cast(model)
        state = model.state_dict()
        assert len(packed) > 20
        assert same_tensors({name: state[name] for name in packed}, {name: stored[name] for name in packed})
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()  # transformers' own refusal
    close = logits(quant.load(folder).to(torch.bfloat16)).float()
    assert float((close - expected).abs().max()) < 0.1 * float(expected.abs().max())
    assert torch.equal(logits(copy.deepcopy(quant.load(folder))), expected)


# --- without this package


def test_transformers_alone_refuses(packed_llama: Path, packed_moe: Path, words: Path, tmp_path: Path) -> None:
    """Eight bits and whole rows are where the codes have exactly as many elements as the float weight. A dequantized
    model is a plain one and loads to the same logits."""
    recipe = with_spec(quant.load_recipe("rtn"), bits=8, group_size=-1)
    refused = {"llama": packed_llama, "moe": packed_moe}
    for name in ("llama", "gpt2", "bert"):
        refused[f"{name}-8"] = tmp_path / f"{name}-8"
        quant.quantize(str(tiny.model(name, tmp_path / name)), refused[f"{name}-8"], recipe)
    refused["experts"] = tmp_path / "experts"
    only = quant.Recipe(recipe.spec, recipe.solver, None, only=("*.0.*.experts.*",))
    quant.quantize(str(tiny.model("qwen3-moe", tmp_path / "moe")), refused["experts"], only)
    assert len(sites(refused["experts"])) == 2  # the other block's experts lie on disk one by one, and are merged
    quant.load(refused["experts"]).save_pretrained(tmp_path / "experts-again")
    again = logits(quant.load(tmp_path / "experts-again"))
    assert torch.equal(again, logits(quant.load(refused["experts"])))
    plain = {}
    for name in ("llama", "moe", "gpt2-8", "experts"):
        model = quant.load(refused[name], dequantize=True)
        plain[name] = tmp_path / f"{name}-plain"
        model.save_pretrained(plain[name])
        save_file({"logits": logits(model)}, tmp_path / f"{name}-logits")
        assert "quantization_config" not in json.loads((plain[name] / "config.json").read_text())
    script = """
import json, sys, torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
refused, plain, folder, ids = json.loads(sys.argv[1])
out = {}
for name, path in refused.items():
    kind = transformers.AutoModel if name.startswith("bert") else transformers.AutoModelForCausalLM
    try:
        out[name] = str(kind.from_pretrained(path))
    except Exception as error:
        out[name] = f"{type(error).__name__}: {error}"
for name, path in plain.items():
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    expected = load_file(f"{folder}/{name}-logits")["logits"]
    with torch.no_grad():
        got = model(input_ids=torch.tensor(ids)).logits
    out[name + "-plain"] = float((got - expected).abs().max() / expected.abs().max())
print(json.dumps(out), "quant" in sys.modules)
"""
    folders = [{name: str(path) for name, path in group.items()} for group in (refused, plain)]
    paths = [*folders, str(tmp_path), IDS.tolist()]
    ran = subprocess.run(
        [sys.executable, "-c", script, json.dumps(paths)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    found, imported = ran.stdout.strip().rsplit(" ", 1)
    assert imported == "False"
    answers = json.loads(found)
    for name in refused:
        assert answers[name].startswith("RuntimeError"), (name, answers[name])
        assert "mismatch" in answers[name]
    for name in plain:
        assert answers[f"{name}-plain"] < 1e-5, name


# --- writing again


@pytest.mark.parametrize("kind", ["packed_llama", "packed_moe"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_save_pretrained_writes_the_same_checkpoint(
    kind: str, shard: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    model = quant.load(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    old, new = tensors(folder), tensors(tmp_path / "again")
    if kind == "packed_moe":  # the float tensors of a Mixtral are stored under names of old, and saved under today's
        old = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in old.items()}
    assert same_tensors(new, old)
    assert sites(tmp_path / "again") == sites(folder)
    assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert "checksums" not in read_config(tmp_path / "again")["quantization_config"]
    again = quant.load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(model.dequantize() or model), logits(quant.load(folder, dequantize=True)))
    again.save_pretrained(tmp_path / "third", max_shard_size=shard)
    assert tiny.contents(tmp_path / "third") == tiny.contents(tmp_path / "again")


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_variant_has_files_of_its_own(shard: str, packed_llama: Path, tmp_path: Path) -> None:
    """They are what is verified where they are what is loaded."""
    model = quant.load(packed_llama)
    model.save_pretrained(tmp_path, variant="q4", max_shard_size=shard)
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path, variant="q4", dtype="float32")  # noqa: E731
    assert torch.equal(logits(load()), logits(model))
    if shard == "5GB":  # else transformers clears the shards away
        model.save_pretrained(tmp_path)
    files = {file: load_file(file) for file in tmp_path.glob("model.q4*.safetensors")}
    file, name = next((file, name) for file, stored in files.items() for name in stored if name.endswith(".scales"))
    save_file({**files[file], name: files[file][name].float()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is F32"):
        load()


@pytest.mark.parametrize("kind", ["packed_llama", "packed_moe"])
def test_a_module_goes_through_pickle(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As `torch.save` of a model and processes that are given one do; a stack's class is made at run time."""
    model = quant.load(request.getfixturevalue(kind))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    plain = quant.load(request.getfixturevalue(kind), dequantize=True)
    assert torch.equal(logits(again.dequantize() or again), logits(plain))


def test_the_base_of_a_model_can_be_saved_and_loaded(packed_llama: Path, tmp_path: Path) -> None:
    """Its sites lose the prefix that they had inside the whole model."""
    base = transformers.AutoModel.from_pretrained(packed_llama, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    assert set(sites(tmp_path / "base")) == {name.removeprefix("model.") for name in sites(packed_llama)}
    again = transformers.AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(logits(again), logits(base))


def test_a_dequantized_model_is_plain(packed_moe: Path) -> None:
    model = quant.load(packed_moe, dequantize=True, dtype=torch.bfloat16)
    unpacked = [p for name, p in model.named_parameters() if name.removesuffix(".weight") in sites(packed_moe)]
    assert len(unpacked) == len(sites(packed_moe))
    assert {p.dtype for p in unpacked} == {torch.bfloat16}  # some versions of transformers keep a router in float32
    assert not any("acked" in type(module).__name__ for module in model.modules())
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert torch.isfinite(logits(model)).all()
    model.to(torch.float32)
    assert logits(model).dtype == torch.float32


# --- what is not quantized


def test_what_stays_float_keeps_its_bits_and_its_dtype(words: Path, tmp_path: Path) -> None:
    model = make("qwen3").to(torch.bfloat16)
    model.model.norm.weight.data = model.model.norm.weight.data.float()  # a stored dtype of its own
    model.save_pretrained(tmp_path / "model")
    tiny.add_tokenizer(tmp_path / "model")
    quant.quantize(str(tmp_path / "model"), tmp_path / "out", tiny.recipe(words))
    source, made = tensors(tmp_path / "model"), tensors(tmp_path / "out")
    kept = {name for name in source if name.removesuffix(".weight") not in sites(tmp_path / "out")}
    assert {str(source[name].dtype) for name in kept} == {"torch.bfloat16", "torch.float32"}
    assert len(kept) == 1 + 2 * 4 + 1
    for name in kept:
        assert made[name].dtype == source[name].dtype
        assert torch.equal(made[name].view(torch.uint8), source[name].view(torch.uint8)), name
    assert "lm_head.weight" not in made  # tied, and stored once
    for plain in (False, True):
        loaded = quant.load(tmp_path / "out", dequantize=plain)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert quant.load(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_sharded_model_makes_a_sharded_checkpoint(packed_llama: Path, words: Path, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    tiny.add_tokenizer(tmp_path / "model")
    limit = max(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    result = quant.quantize(str(tmp_path / "model"), tmp_path / "out", tiny.recipe(words, bits=8, group=-1))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert 1 < count < len(list((tmp_path / "model").glob("*.safetensors")))
    assert [file.name for file in files] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, 1 + count)]
    assert all(file.stat().st_size <= limit + 8192 for file in files)  # a header on top
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {name: load_file(tmp_path / "out" / file)[name].nbytes for name, file in index["weight_map"].items()} == {
        name: tensor.nbytes for name, tensor in tensors(tmp_path / "out").items()
    }
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    assert result.written.files == {
        name: (tmp_path / "out" / name).stat().st_size
        for name in [*(file.name for file in files), "model.safetensors.index.json"]
    }
    whole = tmp_path / "whole"
    quant.quantize(str(tiny.model("llama", tmp_path / "one")), whole, tiny.recipe(words, bits=8, group=-1))
    assert same_tensors(tensors(whole), tensors(tmp_path / "out"))
    assert torch.equal(logits(quant.load(whole)), logits(quant.load(tmp_path / "out")))


def test_folders_that_belong_to_the_model_go_along_sealed(llama: Path, tmp_path: Path) -> None:
    """Those of sentence-transformers' modules, and of a tokenizer's further chat templates."""
    model, out = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "out"
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "3_Normalize")]  # the last saved nothing
    (model / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin", "other/notes.txt"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    save_file({"linear.weight": torch.ones(2, 3)}, model / "2_Dense" / "model.safetensors")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    quant.quantize(str(model), out, quant.load_recipe("rtn"))
    inner = {str(path.relative_to(out)) for path in out.glob("*/*")}
    template = "additional_chat_templates/tool_use.jinja"
    assert inner == {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", template}
    assert inner < json.loads((out / "checksums.json").read_text())["files"].keys()
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == {"tool_use": "{{ messages }}"}
    quant.load(out)
    (out / "1_Pooling" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json: its content is not what was written"):
        quant.load(out)
    shutil.rmtree(out / "1_Pooling")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json: missing"):
        quant.load(out)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("mine")
    (out / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    quant.quantize(str(llama), out, quant.load_recipe("rtn"), mode="restart")
    assert [str(path.relative_to(out)) for path in out.glob("*/*")] == ["1_Pooling/config.json"]  # not ours
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "mine"


def test_tensors_lie_aligned_in_the_file(packed_llama: Path) -> None:
    with (packed_llama / "model.safetensors").open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    size = {"F32": 4, "F16": 2, "U8": 1}
    assert entries.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        assert begin % size[entry["dtype"]] == 0, name
        assert end - begin == math.prod(entry["shape"]) * size[entry["dtype"]]


# --- what is refused


def test_a_changed_file_is_refused_unless_it_was_meant(copied: Path) -> None:
    (copied / "generation_config.json").write_text('{"temperature": 0.5}')
    with pytest.raises(
        CheckpointError, match=r"generation_config\.json: its content is not what was written .* verify=False"
    ):
        quant.load(copied)
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        transformers.AutoModelForCausalLM.from_pretrained(copied)
    assert quant.load(copied, verify=False).generation_config.temperature == 0.5


def test_notes_beside_a_checkpoint_are_nobodys_business(copied: Path) -> None:
    (copied / "notes.txt").write_text("3.2 GB, made on Tuesday")
    (copied / "README.md").write_text("my own words")
    quant.load(copied)


def test_weights_laid_beside_a_checkpoint_are_refused(packed_moe: Path, packed_llama: Path, tmp_path: Path) -> None:
    """transformers prefers model.safetensors to an index, whatever the index's checksum says."""
    make("llama").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    quant.quantize(str(tmp_path / "model"), tmp_path / "out", quant.load_recipe("rtn"))
    shutil.copyfile(packed_llama / "model.safetensors", tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"/model\.safetensors: does not belong to this checkpoint.* remove it"):
        quant.load(tmp_path / "out")


FURTHER = (
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/a.jinja", "added_tokens.json",
    "special_tokens_map.json", "tokenizer.model", "tokenizer.1.0.json", "preprocessor_config.json",
    "generation_config.json", "adapter_config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FURTHER)
def test_what_would_change_a_checkpoint_is_refused_beside_it(name: str, llama: Path, tmp_path: Path) -> None:
    """A chat template above all: transformers takes it from where it lies, whatever the tokenizer's own checksum."""
    model, out = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "out"
    (model / "generation_config.json").unlink()
    quant.quantize(str(model), out, quant.load_recipe("rtn"))
    quant.load(out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    said = rf"{re.escape(name)}: does not belong to this checkpoint.* remove it, or, .* with verify=False"
    with pytest.raises(CheckpointError, match=said):
        quant.load(out)
    with pytest.raises(CheckpointError, match="does not belong to this checkpoint"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


def test_what_a_checkpoint_lacks_may_be_laid_beside_it(llama: Path, packed_llama: Path, tmp_path: Path) -> None:
    """The tokenizer of a model that was saved without; what people and the hub add."""
    make("llama").save_pretrained(tmp_path / "bare")
    quant.quantize(str(tmp_path / "bare"), tmp_path / "out", quant.load_recipe("rtn"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "out")
    again = Path(shutil.copytree(packed_llama, tmp_path / "again"))
    for folder in (tmp_path / "out", again):
        for name in (".gitattributes", "results.json", "notes.txt", "README.md"):
            (folder / name).write_text("{}")
        quant.load(folder)
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "..", "", "/etc/passwd", "a/b.safetensors", 7, None, "x\0"])
def test_an_index_that_leads_out_of_the_folder(copied: Path, name: Any) -> None:
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").rename(copied.parent / "other.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    unseal(copied)
    with pytest.raises(CheckpointError, match="which is not a file of this folder"):
        quant.load(copied)


@pytest.mark.parametrize("name", ["../outside", "sub/../../outside", "sub/./x", "sub//x", "/dev/null"])
def test_a_checksum_list_that_leads_out_of_the_folder(name: str, copied: Path) -> None:
    from quant.checkpoint.manifest import seal

    (copied.parent / "outside").write_text("x")
    (copied / "sub").mkdir()
    (copied / "sub" / "x").write_text("x")
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]["checksums"]
    manifest, sealed = seal(copied, config, ["model.safetensors", name])
    (copied / "checksums.json").write_text(manifest)
    (copied / "config.json").write_text(sealed)
    with pytest.raises(CheckpointError, match=rf"checksums\.json: names {name!r}, which is not a file of this folder"):
        quant.load(copied)


def test_not_a_checkpoint_of_ours(llama: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"not a bitwright checkpoint \(its config\.json has no quantization_config"
    ):
        quant.load(llama)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(No such file or directory\)"):
        quant.load(tmp_path)
    with pytest.raises(ModelError, match="not a folder; give the folder that holds config"):
        quant.load(tmp_path / "nowhere")
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["format_version"] = 4
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format version 4; this bitwright reads 1 to 3: upgrade it"):
        quant.load(copied)


def test_what_the_first_format_meant_otherwise_is_refused() -> None:
    """The trellis code `mac` had other numbers; all else is read."""
    config = {"quant_method": "bitwright", "format_version": 1, "sites": {}}
    for spec in (Uniform(), Rotated(Trellis(code="inst")), Rotated(Trellis(code="mac"))):
        config["sites"] = {"a.b": {"shape": [64, 64], "spec": spec.to_dict()}}
        if isinstance(spec.core, Trellis) and spec.core.code == "mac":
            with pytest.raises(CheckpointError, match=r"a\.b has the trellis code mac of format version 1"):
                read_sites(config, "here")
        else:
            assert read_sites(config, "here")["a.b"].spec == spec
    assert read_sites({**config, "format_version": 2}, "here")


def test_a_site_that_the_model_does_not_have(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]["checksums"]
    stored = load_file(copied / "model.safetensors")
    entry = config["quantization_config"]["sites"].pop("model.layers.1.mlp.up_proj")
    config["quantization_config"]["sites"]["model.layers.7.mlp.up_proj"] = entry
    for part in ("weight", "scales", "zeros"):
        stored[f"model.layers.7.mlp.up_proj.{part}"] = stored.pop(f"model.layers.1.mlp.up_proj.{part}")
    save_file(stored, copied / "model.safetensors", metadata={"format": "pt"})
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.mlp\.up_proj: .* the model has no such matrix"):
        quant.load(copied)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "model.embed_tokens"])
def test_a_site_that_is_no_such_layer(name: str, copied: Path) -> None:
    """A square matrix said to lie on its side, and an embedding said to be a linear layer."""
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]["checksums"]
    entries = config["quantization_config"]["sites"]
    if name.endswith("q_proj"):
        entries[name]["transposed"] = True
    else:
        entries[name] = {"shape": [VOCABULARY, 64], "spec": entries["model.layers.1.self_attn.q_proj"]["spec"]}
        stored = load_file(copied / "model.safetensors")
        stored[f"{name}.weight"] = torch.zeros(VOCABULARY * 32, dtype=torch.uint8)
        stored[f"{name}.scales"] = torch.ones(VOCABULARY, 2, dtype=torch.float16)
        stored[f"{name}.zeros"] = torch.zeros(VOCABULARY, 1, dtype=torch.uint8)
        save_file(stored, copied / "model.safetensors", metadata={"format": "pt"})
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"config\.json lists this (Linear as a transposed|Embedding as a plain) linear"
    ):
        quant.load(copied)


@pytest.mark.parametrize(
    ("bad", "said"), [(math.nan, "holds NaN or infinite numbers"), (None, "stored as torch.int32")]
)
def test_a_float_tensor_that_holds_no_numbers(bad: float | None, said: str, copied: Path) -> None:
    stored = load_file(copied / "model.safetensors")
    if bad is None:
        stored["model.norm.weight"] = stored["model.norm.weight"].to(torch.int32)
    else:
        stored["model.norm.weight"][3] = bad
    save_file(stored, copied / "model.safetensors", metadata={"format": "pt"})
    unseal(copied)
    with pytest.raises(CheckpointError, match=rf"model\.norm\.weight: {said}"):
        quant.load(copied)


def test_a_float_tensor_that_is_missing(copied: Path) -> None:
    """transformers would warn and run on random numbers."""
    stored = load_file(copied / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, copied / "model.safetensors", metadata={"format": "pt"})
    unseal(copied)
    with pytest.raises(CheckpointError, match=r"missing keys: \['model\.norm\.weight'\]; copy the checkpoint again"):
        quant.load(copied)


def test_an_architecture_that_transformers_does_not_know(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["architectures"] = ["MambaXForCausalLM"]
    del config["quantization_config"]["checksums"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"architectures \['MambaXForCausalLM'\] are unknown to transformers here"
    ):
        quant.load(copied)


def test_what_the_class_has_no_use_for_comes_along(llama: Path, words: Path, tmp_path: Path) -> None:
    """As heads for pretraining do that another class of the same model would use."""
    source = Path(shutil.copytree(llama, tmp_path / "float"))
    file = source / "model.safetensors"
    extra = {"model.pooler.weight": torch.randn(3, 4), "heads.bias": torch.randn(2)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    out = quant.quantize(str(source), tmp_path / "packed", tiny.recipe(words)).out
    assert torch.isfinite(logits(quant.load(out))).all()
    kept = load_file(out / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in extra.items())
