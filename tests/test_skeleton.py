"""A model filled part by part is the model that transformers loads, and whatever is wrong on disk is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES, batch, checkpoint, make_from
from quant.errors import ModelError
from quant.models.building import build
from quant.models.skeleton import Skeleton
from quant.models.source import find


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What from_pretrained makes of the folder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls: Any = getattr(transformers, config.architectures[0])  # pyright: ignore[reportOptionalSubscript]
    return cls.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def filled(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    skeleton = Skeleton(find(str(folder)), dtype=dtype)
    skeleton.load(skeleton.names_under(""))
    return skeleton.model


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def real(model: Any) -> set[str]:
    """The state that is not on meta."""
    return {name for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_filled_model_is_the_one_transformers_loads(name: str) -> None:
    model, expected = filled(checkpoint(name)), reference(checkpoint(name))
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        assert torch.equal(state[key], tensor), key
    with torch.no_grad():
        assert torch.equal(model(**batch(2))[0], expected(**batch(2))[0])
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_block_comes_alone_and_goes_again(name: str) -> None:
    skeleton = Skeleton(find(str(checkpoint(name))))
    buffers = real(skeleton.model)
    block = next(key for key, _ in skeleton.model.named_modules() if key.endswith(".1"))
    names = skeleton.names_under(block)
    skeleton.load(names)
    assert real(skeleton.model) - buffers == set(names) - buffers
    skeleton.unload(names)
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())
    skeleton.load(names)
    assert set(names) <= real(skeleton.model)


def test_experts_are_stored_one_by_one_and_merged() -> None:
    source = find(str(checkpoint("qwen3-moe")))
    skeleton = Skeleton(source)
    parts = [key for key in source.entries if ".layers.0.mlp.experts." in key]
    assert len(parts) == 9 * 3
    assert set(parts) <= skeleton.converted
    assert skeleton.targets[parts[0]][0].startswith("model.layers.0.mlp.experts.")
    assert "model.layers.0.self_attn.q_proj.weight" not in skeleton.converted


def test_what_is_split_from_one_tensor_does_not_stay_behind() -> None:
    """Loading one target of a split tensor reads the others too; they return to meta."""
    skeleton = Skeleton(find(str(checkpoint("llama"))))
    key, other = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    skeleton.targets[key] = (key, other)
    skeleton.load([key])
    assert real(skeleton.model) == {key}


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma3", "opt", "gpt2", "falcon"])
def test_tied_weights_are_one_tensor(name: str) -> None:
    skeleton = Skeleton(find(str(checkpoint(name))))
    ((target, origin),) = skeleton.tied.items()

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        return skeleton.model.get_parameter(target), skeleton.model.get_parameter(origin)

    assert pair()[0] is pair()[1]  # on meta as well, so that a walk sees it
    for asked in ([target], [origin], [target, origin]):
        skeleton.load(asked)
        assert pair()[0] is pair()[1]
        assert pair()[0].device.type == "cpu"
        skeleton.unload([target])
        assert [part.device.type for part in pair()] == ["meta", "cpu"]
        skeleton.unload([origin])
        assert pair()[0] is pair()[1]
        assert pair()[0].device.type == "meta"


@pytest.mark.parametrize("stored", ["head", "both", "both, different"])
def test_ties_follow_what_is_stored(stored: str, tmp_path: Path) -> None:
    """Older checkpoints hold the head, or both copies; transformers ties them only if they are equal."""
    folder = copied(checkpoint("llama-tied"), tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if stored == "head":
            del tensors["model.embed_tokens.weight"]
        if stored == "both, different":
            tensors["lm_head.weight"] += 1

    edit_weights(folder, change)
    model = filled(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (stored != "both, different")
    with torch.no_grad():
        assert torch.equal(model(**batch())[0], reference(folder)(**batch())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    make_from("LlamaForCausalLM", **_small()).to(torch.bfloat16).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"
    model = filled(tmp_path, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(model(**batch())[0], reference(tmp_path, dtype)(**batch())[0])


def test_parameters_that_an_architecture_keeps_in_float32_stay_so(tmp_path: Path) -> None:
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    make_from("T5EncoderModel", **settings).save_pretrained(tmp_path)
    model, expected = filled(tmp_path, torch.float16), reference(tmp_path, torch.float16)
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == {
        key: tensor.dtype for key, tensor in expected.state_dict().items()
    }


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    reference(checkpoint("qwen3-moe")).save_pretrained(tmp_path, max_shard_size="50kB")
    assert len(find(str(tmp_path)).files) > 3
    with torch.no_grad():
        assert torch.equal(filled(tmp_path)(**batch())[0], reference(checkpoint("qwen3-moe"))(**batch())[0])


def test_a_tensor_is_read_bit_for_bit() -> None:
    source = find(str(checkpoint("gpt2")))
    assert list(source.entries) == sorted(source.entries)
    stored = load_file(source.folder / "model.safetensors")
    for key, entry in source.entries.items():
        assert torch.equal(source.tensor(key), stored[key])
        assert entry.shape == tuple(stored[key].shape)
    assert source.nbytes() == (source.folder / "model.safetensors").stat().st_size


def test_the_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    first = find(str(folder)).fingerprint()
    assert first == find(str(checkpoint("llama"))).fingerprint()
    edit_weights(folder, lambda tensors: tensors["lm_head.weight"][0].zero_())
    assert find(str(folder)).fingerprint() != first


def test_building_allocates_nothing() -> None:
    """Two stacks of experts a layer, each larger than any machine's memory."""
    config = transformers.MixtralConfig(
        hidden_size=8192, intermediate_size=65536, num_local_experts=1024, num_hidden_layers=2
    )
    model = build(transformers.MixtralForCausalLM, config, torch.float32, "large")
    assert sum(parameter.numel() for parameter in model.parameters()) > 3e12
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())


def _small() -> dict[str, Any]:
    return {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "eos_token_id": 2,
    }


# what is refused, and how


def refusal(folder: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        filled(folder)
    message = str(caught.value)
    assert "Traceback" not in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/hostname", "sub/model.safetensors", "..", "absent", 300 * "x"]
)
def test_an_index_cannot_leave_its_folder(place: str, tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    message = refusal(folder)
    assert repr(place) in message
    assert "not a file of this folder" in message


@pytest.mark.parametrize("index", ["{}", "[]", "{", '{"weight_map": 3}', "[" * 100_000])
def test_a_damaged_index_is_named(index: str, tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    shutil.move(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(folder)


def test_a_tensor_stored_twice_is_refused(tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    shutil.move(folder / "model.safetensors", folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    assert "stored twice, in a.safetensors and in b.safetensors" in refusal(folder)


def test_other_layouts_beside_the_model_are_left_alone(tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    save_file({"layers.0.w": torch.zeros(2)}, folder / "consolidated.safetensors")
    assert find(str(folder)).files == ["model.safetensors"]


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "config.json: missing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no .safetensors weights" in refusal(tmp_path)


def test_a_file_instead_of_a_folder() -> None:
    assert "not a folder" in refusal(checkpoint("llama") / "model.safetensors")
    assert "not a folder" in refusal("./no/such/place")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_named(value: float, tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    edit_weights(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    message = refusal(folder)
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "NaN or infinite" in message


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    message = refusal(folder)
    assert "no stored weights for" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = copied(checkpoint("qwen3-moe"), tmp_path)
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.4.down_proj.weight"))
    message = refusal(folder)
    assert "model.layers.1.mlp.experts.down_proj" in message


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    edit_config(folder, intermediate_size=100)
    message = refusal(folder)
    assert "[96, 64]" in message or "[64, 96]" in message
    assert "do not belong together" in message


def test_experts_of_unequal_shape_are_named(tmp_path: Path) -> None:
    folder = copied(checkpoint("qwen3-moe"), tmp_path)
    key = "model.layers.1.mlp.experts.4.down_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({key: torch.zeros(64, 20)}))
    message = refusal(folder)
    assert "model.layers.1.mlp.experts" in message
    assert "do not fit together (" in message


@pytest.mark.parametrize("cut", [3, 200, 20_000])
def test_a_truncated_file_is_named(cut: int, tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    message = refusal(folder)
    assert "model.safetensors: not a readable safetensors file" in message


def test_a_file_that_goes_away_while_in_use(tmp_path: Path) -> None:
    skeleton = Skeleton(find(str(copied(checkpoint("llama"), tmp_path))))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="changed while it was being read"):
        skeleton.load(["lm_head.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no-such-model"},
        {"model_type": None},
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["Trainer"]},
        {"architectures": [None]},
        {"architectures": None},
        {"auto_map": {"AutoConfig": "x.Y"}, "model_type": "mine"},
    ],
    ids=str,
)
def test_a_config_that_transformers_cannot_use(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    edit_config(folder, **changes)
    assert str(folder) in refusal(folder)


def test_code_of_a_checkpoint_is_named_as_the_reason(tmp_path: Path) -> None:
    """transformers would say how to inspect the code, as if a flag could allow it."""
    folder = copied(checkpoint("llama"), tmp_path)
    edit_config(folder, auto_map={"AutoConfig": "mine.Config"}, model_type="mine")
    (folder / "mine.py").write_text("raise SystemExit('was run')\n")
    assert "auto_map asks for code of its own; bitwright runs no code from a checkpoint" in refusal(folder)


def test_code_that_is_not_needed_is_no_reason(tmp_path: Path) -> None:
    """Many models that transformers has by now still name the code that they came with."""
    folder = copied(checkpoint("llama"), tmp_path)
    edit_config(folder, auto_map={"AutoConfig": "mine.Config"}, hidden_size="wide")
    message = refusal(folder)
    assert "hidden_size" in message
    assert "auto_map" not in message


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000, '{"model_type": "llama"'])
def test_a_config_that_is_not_json(content: str, tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder)


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(folder)
    assert "already quantized (gptq)" in message
    assert "float model" in message


@pytest.mark.parametrize(
    "path", ["../outside", "..", "/etc", "a/../../outside", ".bitwright", "link", "links", "a\0", 300 * "x"]
)
def test_a_module_that_leads_out_of_the_folder(path: str, tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "links").mkdir()
    (folder / "links" / "config.json").symlink_to(tmp_path / "outside" / "config.json")
    (folder / "modules.json").write_text(json.dumps([{"path": path}]))
    assert f"{path!r} leads out of it" in refusal(folder)


@pytest.mark.parametrize("content", ["{}", "[1]", "null", "[{}]", '[{"path": null}]'])
def test_other_modules_than_those_of_sentence_transformers(content: str, tmp_path: Path) -> None:
    folder = copied(checkpoint("llama"), tmp_path)
    (folder / "modules.json").write_text(content)
    assert "modules.json" in find(str(folder)).copied


def test_the_links_of_the_hubs_cache_are_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And a module's own weights are downloaded too."""
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "models--a--b" / "snapshots" / "c0ffee"))
    (folder / "modules.json").write_text('[{"path": "1_Dense"}]')

    def download(name: str, **settings: Any) -> str:
        (folder / "1_Dense").mkdir(exist_ok=True)
        (tmp_path / "blobs").mkdir(exist_ok=True)
        (tmp_path / "blobs" / "1").write_text("x")
        if "*/*.safetensors" not in settings["ignore_patterns"]:
            (folder / "1_Dense" / "model.safetensors").symlink_to(tmp_path / "blobs" / "1")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "1_Dense/model.safetensors" in find("a/b").copied


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "a/b/c", "sp ace/x"])
def test_a_hub_that_cannot_be_reached(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(name)
    assert message.startswith(f"{name}: no folder of this name")
    assert "path of a local folder" in message


def test_a_hub_name_is_downloaded_without_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(checkpoint("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find("someone/llama").name == "someone/llama"
    assert asked["name"] == "someone/llama"
    assert "*.bin" not in asked["allow_patterns"]
    assert "consolidated*.safetensors" in asked["ignore_patterns"]


def test_a_block_s_names_are_not_looked_for_in_the_whole_model_again(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking a model of 64 blocks for its state, with every block twice, took a sixth of a small run."""
    skeleton = Skeleton(find(str(llama)))
    names = {name for name in skeleton.model.state_dict() if name.startswith("model.layers.1.")}
    monkeypatch.setattr(skeleton.model, "state_dict", lambda: pytest.fail("known since it was opened"))
    assert set(skeleton.names_under("model.layers.1")) == names
