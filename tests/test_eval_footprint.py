"""Bytes, bits, speed and memory, and how models are opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config, T5EncoderModel

import quant
from quant.errors import CheckpointError, ModelError, SettingsError
from quant.eval.evaluate import evaluate
from quant.eval.footprint import cost_of, read_header, size_of, weight_files
from quant.eval.memory import watch
from quant.eval.subject import open_subject
from quant.kernels.spec import spec_from_dict
from tests import tiny


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / folder.name))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# sizes


def test_a_float_model_has_the_bits_of_its_dtype(demo: Path) -> None:
    size = size_of(open_subject(demo))
    model: Any = AutoModelForCausalLM.from_pretrained(demo)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert (size.linear_bits, size.total_bits) == (16.0, 16.0)
    assert size.bytes == (demo / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["packed_llama", "packed_moe"])
def test_a_packed_model_has_the_bits_of_its_specs(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    subject = open_subject(folder)
    size = size_of(subject)
    sites = json.loads((folder / "config.json").read_text())["quantization_config"]["sites"].values()
    promised = sum(spec_from_dict(site["spec"]).nbytes(tuple(site["shape"])) for site in sites)
    weights = sum(site["shape"][0] * site["shape"][1] for site in sites)
    assert size.linear_bits == 8 * promised / weights
    plain: Any = type(subject.model)._from_config(subject.model.config)
    assert size.parameters == sum(p.numel() for p in plain.parameters())
    stored = [tensor for file in weight_files(folder) for tensor in load_file(file).values()]
    assert size.total_bits == 8 * sum(t.nbytes for t in stored) / size.parameters


def test_a_model_packed_by_somebody_else_is_counted_by_its_architecture(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    subject = open_subject(llama)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
    out, inputs = weight.shape
    name = "model.layers.0.mlp.up_proj"
    tensors |= {
        f"{name}.qweight": torch.zeros(inputs // 8, out, dtype=torch.int32),
        f"{name}.scales": torch.zeros(2, out),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    size = size_of(type(subject)("x", subject.model, subject.kind, folder))
    assert size.linear_bits == 4 + 2 * 32 / inputs
    assert size.parameters == size_of(subject).parameters


def test_a_model_built_in_memory_is_counted_there(llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_config(open_subject(llama).model.config)
    size = size_of(open_subject(model))
    assert size.measured == "parameters in memory"
    assert size.bytes == 4 * size.parameters


def test_shards_are_those_of_the_index(llama: Path, tmp_path: Path) -> None:
    open_subject(llama).model.save_pretrained(tmp_path, max_shard_size="100KB")
    shutil.copy(llama / "model.safetensors", tmp_path / "consolidated.safetensors")
    files = weight_files(tmp_path)
    assert len(files) > 1
    assert tmp_path / "consolidated.safetensors" not in files
    files[0].unlink()
    with pytest.raises(CheckpointError, match="is named in the index and not there"):
        weight_files(tmp_path)


def test_an_index_beside_the_whole_file_is_not_read(llama: Path, tmp_path: Path) -> None:
    """As by transformers, which loads model.safetensors then."""
    folder = Path(shutil.copytree(llama, tmp_path / "llama"))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert weight_files(folder) == [folder / "model.safetensors"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x05" + b"\0" * 7 + b"[1,2]", b"\x08" + b"\0" * 7 + b'{"a":[]}']
)
def test_a_header_that_is_none_is_an_error(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_header(file)


# speed and memory


def test_speed_and_memory(demo: Path) -> None:
    subject = open_subject(demo)
    speed, memory = cost_of(subject, torch.arange(100))
    assert speed.window == 100
    assert speed.prefill > 0
    assert speed.decode is not None
    assert speed.decode > 0
    assert memory.model >= 4 * 900_000
    assert memory.peak > memory.model + memory.running


def test_watch_sees_what_was_freed() -> None:
    with watch(torch.device("cpu")) as watched:
        block = torch.ones(64 << 20, dtype=torch.uint8)
        del block
    assert 60 << 20 < watched.result.rise < 100 << 20
    with watch(torch.device("cpu")) as watched:
        pass
    assert watched.result.rise < 30 << 20, "an earlier peak is forgotten"


# opening


def test_packed_models_stay_packed(packed_llama: Path, llama: Path, words: Path) -> None:
    report = evaluate(packed_llama, against=llama, text=words, max_windows=4)
    assert report.perplexity is not None
    assert report.divergence is not None
    assert report.divergence.kl > 0
    assert report.memory.model < evaluate(llama, text=words, max_windows=1).memory.model
    assert report.size.linear_bits is not None
    assert report.size.linear_bits < 5.1
    assert report.settings.dtype == "float32"


def test_dtypes_are_those_asked_for(packed_llama: Path, demo: Path) -> None:
    assert open_subject(demo, dtype="auto").model.dtype == torch.bfloat16
    assert open_subject(demo, dtype="float16").model.dtype == torch.float16
    assert open_subject(packed_llama, dtype="auto").model.dtype == torch.float32
    assert open_subject(packed_llama, dtype="bfloat16").model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_auto_is_the_same_for_a_packed_model_and_its_original(
    key: str, packed_llama: Path, llama: Path, tmp_path: Path
) -> None:
    for number, original in enumerate((llama, packed_llama)):
        folder = copied(original, tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype")
        config.get("quantization_config", {}).pop("checksums", None)
        (folder / "config.json").write_text(json.dumps({**config, key: "bfloat16"}))
        assert open_subject(folder, dtype="auto").model.dtype == torch.bfloat16


def test_a_float_model_may_say_that_it_is_not_quantized(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    edit(folder / "config.json", quantization_config=None)
    assert size_of(open_subject(folder)).linear_bits == 32


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"dtype": "int3"}, "dtype is 'int3'; give one of float32"), ({"device": "cuda:77"}, "torch cannot use it")],
)
def test_devices_and_dtypes_that_are_none(demo: Path, settings: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        open_subject(demo, **settings)


def test_models_that_are_none(tmp_path: Path, llama: Path, demo: Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        open_subject(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"no folder of this name here, and the hub.*path of a local folder"):
        open_subject("somebody/model")
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_subject(tmp_path)
    folder = copied(llama, tmp_path)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds a list, expected an object"):
        open_subject(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        open_subject(folder)
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="transformers could not load it"):
        open_subject(folder)


def test_missing_weights_are_not_made_up(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing from its files"):
        open_subject(folder)


def test_a_pickle_is_not_opened(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        open_subject(folder)


def test_no_tokenizer_says_what_to_copy(llama: Path, words: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match="Copy the tokenizer files of the original"):
        evaluate(folder, text=words)
    model = open_subject(folder).model
    model.config.name_or_path = model.name_or_path = ""
    with pytest.raises(ModelError, match="built in memory, it has no tokenizer"):
        evaluate(model, text=words)
    assert evaluate(model, against=llama, text=words, max_windows=1).ratio == 1, "the original's tokenizer will do"


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    with pytest.raises(ModelError, match="an encoder-decoder"):
        open_subject(tmp_path)


def test_the_encoder_of_an_encoder_decoder_is_opened_as_one(words: Path, tmp_path: Path) -> None:
    """AutoModel would make a whole T5, its decoder of random numbers; a pipeline's says that it is an encoder-decoder,
    too."""
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    tiny.add_tokenizer(tmp_path / "t5")
    for decoder in (False, True):
        edit(tmp_path / "t5" / "config.json", is_encoder_decoder=decoder)
        assert isinstance(open_subject(tmp_path / "t5").model, T5EncoderModel)
    packed = quant.quantize(str(tmp_path / "t5"), tmp_path / "out", tiny.recipe(words)).out
    report = evaluate(packed, against=tmp_path / "t5", text=words, window=16, max_windows=2)
    assert report.hidden is not None
    assert 0.9 < report.hidden.token < 1


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "falcon", "mixtral"])
def test_any_causal_model_is_judged(name: str, words: Path, tmp_path: Path) -> None:
    report = evaluate(tiny.model(name, tmp_path / name), text=words, window=32, max_windows=2, generate=2)
    assert report.perplexity is not None
    assert report.perplexity.windows == 2
    assert len(report.generations) == 2
