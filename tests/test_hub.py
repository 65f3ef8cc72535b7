"""Packed checkpoints of a hub name: loaders download config and weights, verifying needs the rest.

A folder stands in for the hub. What `from_pretrained` would have downloaded lies in a cache already, since tests run
offline; what bitwright asks for is copied there from the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_dit
import torch
import transformers
from typer.testing import CliRunner

import quant
from quant.checkpoint import hub
from quant.errors import CheckpointError
from quant.eval import cli
from quant.recipe import load_recipe, with_spec

NAME, COMMIT = "me/q4", "0123456789" * 4
Serve = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Gives a folder out as `NAME`, and lists what is asked of it then."""

    def made(folder: Path) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def download(repo: str, name: str, **settings: Any) -> str:
            assert (repo, settings["revision"], settings["cache_dir"]) == (NAME, COMMIT, tmp_path)
            asked.append({"name": name, **settings})
            return str(shutil.copyfile(folder / name, snapshot(tmp_path) / name))

        monkeypatch.setattr(hub, "hf_hub_download", download)
        monkeypatch.setattr("transformers.modeling_utils.is_offline_mode", lambda: False)
        return asked

    return made


def snapshot(cache: Path) -> Path:
    return cache / "models--me--q4" / "snapshots" / COMMIT


def cached(folder: Path, cache: Path, inside: str = ".") -> Path:
    """A cache after `from_pretrained` of a folder on the hub."""
    place = snapshot(cache) / inside
    place.mkdir(parents=True)
    for file in (folder / inside).iterdir():
        if file.name in ("config.json", "generation_config.json") or ".safetensors" in file.name:
            shutil.copyfile(file, place / file.name)
    (snapshot(cache).parent.parent / "refs").mkdir()
    (snapshot(cache).parent.parent / "refs" / "main").write_text(COMMIT)
    return place


def opened(cache: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(NAME, cache_dir=cache)


def test_from_pretrained_fetches_what_verifying_needs(packed_llama: Path, tmp_path: Path, serve: Serve) -> None:
    asked, place = serve(packed_llama), cached(packed_llama, tmp_path)
    assert not (place / "checksums.json").exists()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(opened(tmp_path)(ids).logits, quant.load(packed_llama)(ids).logits)
    listed = json.loads((packed_llama / "checksums.json").read_text())["files"]
    assert asked[0]["name"] == "checksums.json"
    assert {file["name"] for file in asked[1:]} == {name for name in listed if "safetensors" not in name} - {
        "config.json", "generation_config.json",
    }  # fmt: skip
    asked.clear()
    opened(tmp_path)
    assert asked == [], "all of it is there"


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # diffusers gives it to the hub's library
def test_a_component_of_a_pipeline(tmp_path: Path, serve: Serve) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float")
    out = tmp_path / "packed"
    quant.quantize(str(source), out / "transformer", with_spec(load_recipe("rtn"), group_size=16))
    asked, place = serve(out), cached(out, tmp_path, "transformer")
    found = tiny_dit.library().DiTTransformer2DModel.from_pretrained(NAME, subfolder="transformer", cache_dir=tmp_path)
    assert (place / "checksums.json").is_file()
    assert all(file["name"].startswith("transformer/") for file in asked)
    stored = quant.load(out / "transformer").state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found.state_dict().items())


def test_a_hub_that_must_not_be_asked(packed_llama: Path, tmp_path: Path) -> None:
    cached(packed_llama, tmp_path)
    said = rf"me/q4: checksums.json is not in the hub's cache.*be online.*hf download me/q4 --revision {COMMIT}"
    with pytest.raises(CheckpointError, match=said):  # HF_HUB_OFFLINE
        opened(tmp_path)


def test_what_the_hub_gives_is_verified(packed_llama: Path, tmp_path: Path, serve: Serve) -> None:
    altered = Path(shutil.copytree(packed_llama, tmp_path / "altered"))
    (altered / "plan.json").write_text("{}")
    serve(altered)
    place = cached(altered, tmp_path)
    with pytest.raises(CheckpointError, match=r"plan.json: its content is not what was written"):
        opened(tmp_path)
    shutil.copyfile(packed_llama / "plan.json", place / "plan.json")
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"model.safetensors: its content is not what was written"):
        opened(tmp_path)
    (place / "checksums.json").write_text('{"files": {}}')
    with pytest.raises(CheckpointError, match=r"checksums.json: altered"):
        opened(tmp_path)


@pytest.mark.parametrize("where", ["q4", "snapshots/q4", "models--me--q4/q4"])
def test_nothing_is_fetched_into_a_folder_of_ones_own(
    where: str, packed_llama: Path, tmp_path: Path, serve: Serve
) -> None:
    asked, folder = serve(packed_llama), tmp_path / where
    shutil.copytree(packed_llama, folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"checksums.json: missing; copy the checkpoint again, whole"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert asked == []


def test_quant_eval_takes_a_hub_name(
    packed_llama: Path, words: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(packed_llama)

    def download(name: str, **settings: Any) -> str:
        assert name == NAME
        return str(shutil.copytree(packed_llama, snapshot(tmp_path), dirs_exist_ok=True))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(cli, "_calm", lambda: None)
    options = ["--text", str(words), "--max-windows", "1", "--no-generate", "--json", "-"]
    done = CliRunner().invoke(cli.app, [NAME, *options])
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.stdout)["models"]
    assert (report["model"], report["path"]) == (NAME, str(snapshot(tmp_path)))
