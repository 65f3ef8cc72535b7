"""A pipeline's text encoder beside its transformer: packed as a language model, loaded with the whole pipeline."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_dit
import torch
from test_pictures import draw
from typer.testing import CliRunner

import quant
from quant.cli import app
from quant.errors import ModelError, ResumeError, SettingsError
from quant.inspect import app as inspect
from quant.inspect import look
from quant.linear import PackedLinear
from quant.prepare import Settings, prepare
from quant.progress import Progress
from quant.recipe import Calibration, Recipe, Trajectory, override

BOTH = ("transformer", "text_encoder_3")
QUICK = ["solver.search.steps=4", "solver.sweeps=0", "solver.search.stretches=[]"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3 with its three text encoders, of two blocks each, and a tokenizer of characters."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )

    diffusers = tiny_dit.library()
    place = tmp_path_factory.mktemp("components")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), latent_channels=4, norm_num_groups=4, layers_per_block=1,
        shift_factor=0.0,
    ).eval()  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=128, hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=20, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    larger = T5Config(vocab_size=128, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    folder = tiny.add_tokenizer(place / "tokenizer")
    tokenizers = [PreTrainedTokenizerFast.from_pretrained(folder, model_max_length=16) for _ in range(3)]
    made = diffusers.StableDiffusion3Pipeline(
        tiny_dit.transformer("SD3Transformer2DModel"), diffusers.FlowMatchEulerDiscreteScheduler(), vae,
        encoders[0], tokenizers[0], encoders[1], tokenizers[1], T5EncoderModel(larger).eval(), tokenizers[2],
    )  # fmt: skip
    made.save_pretrained(place / "float")
    return place / "float"


def recipe(source: Path) -> Recipe:
    few = Calibration(str(tiny.text(source.parent, 600)), samples=3, sequence_length=8, batch_size=2)
    quick = override(Recipe(), QUICK)
    way = Trajectory(steps=2, keep=1)
    return replace(quick, spec=quant.Uniform(bits=8, group_size=-1), calibration=few, trajectory=way)


def paint(folder: Path) -> torch.Tensor:
    pipe: Any = tiny_dit.library().DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a red car", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    return torch.from_numpy(made.images)


class Said(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, what: str) -> None:
        self.lines.append(what)


class StopIn(Progress):
    """Ctrl-C after the first block of a component, counted from 1."""

    def __init__(self, which: int) -> None:
        self.left = which

    def begin(self, blocks: int, weights: int, done: int) -> None:
        self.left -= 1

    def advanced(self, index: int, weights: int) -> None:
        if not self.left:
            raise KeyboardInterrupt


def rounded(bits: int = 4) -> Recipe:
    return override(quant.load_recipe("rtn"), ["spec.group_size=4", f"spec.bits={bits}"])


def test_an_embedding_is_packed_where_a_component_has_one(source: Path, tmp_path: Path) -> None:
    """T5's is one with another module's, a transformer has none: both are said, and all else is packed."""
    told = Said()
    made = replace(rounded(8), embeddings=quant.Uniform(bits=8, group_size=4))
    parts = ("transformer", "text_encoder", "text_encoder_3")
    result = quant.quantize(str(source), tmp_path / "packed", made, components=parts, progress=told)
    clip, t5 = result.others
    assert "ends" not in result.report
    assert [end["site"].endswith("token_embedding") for end in clip.report["ends"]] == [True]
    assert "ends" not in t5.report
    assert t5.report["sites"]
    said = next(line for line in told.lines if "text_encoder_3" in line)
    assert "no embedding or head that could be packed (encoder.embed_tokens.weight: tied to shared.weight)" in said
    assert "they stay float" in said
    paint(tmp_path / "packed")


def test_a_pipeline_of_a_variant_alone_says_what_to_do(source: Path, tmp_path: Path) -> None:
    tiny_dit.library().DiffusionPipeline.from_pretrained(source).save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(ModelError, match=r"cannot load this pipeline .*fp16\.safetensors is a variant's.* `variant`"):
        quant.quantize(str(tmp_path / "half"), tmp_path / "packed", recipe(source))


def test_both_are_packed_and_load_as_one_pipeline(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    result = quant.quantize(str(source), out, recipe(source), components=BOTH)
    assert result.report["source"]["component"] == "transformer"
    assert [one.report["source"]["component"] for one in result.others] == ["text_encoder_3"]
    assert "prompts" not in result.others[0].report["calibration"]["text"]
    assert "--components text_encoder_3" in result.others[0].report["command"]
    pipe: Any = tiny_dit.library().DiffusionPipeline.from_pretrained(out)
    for part in (pipe.transformer, pipe.text_encoder_3):
        assert any(isinstance(module, PackedLinear) for module in part.modules())
    assert float((paint(out) - paint(source)).abs().mean()) < 0.05
    found = look(out)
    assert (found["kind"], found["damage"]) == ("packed", None)
    assert found["components"]["text_encoder_3"]["kind"] == "packed"
    card = (out / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained" in card
    assert "text_encoder_3/README.md" in card
    assert "T5EncoderModel.from_pretrained" in (out / "text_encoder_3" / "README.md").read_text()
    weights = out / "text_encoder_3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "model.safetensors" in look(out)["damage"]


def test_a_text_encoder_packed_alone_is_found_and_checked(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    quant.quantize(str(source), packed, rounded(), components=BOTH[1:])
    found = look(packed)
    assert (found["kind"], found["damage"], found["architectures"]) == ("packed", None, ["T5EncoderModel"])
    for card in (packed / "README.md", packed / "text_encoder_3" / "README.md"):
        code = [line for line in card.read_text().splitlines() if "from_pretrained(" in line or "quant.load(" in line]
        assert 'quant.load("path/to/the/pipeline/text_encoder_3"' in code[0]
        assert 'AutoTokenizer.from_pretrained("path/to/the/pipeline/tokenizer_3")' in code[1]
        assert "T5EncoderModel.from_pretrained" in code[2]
        assert "AutoModel" not in card.read_text()
    config = packed / "text_encoder_3" / "config.json"
    for file, old, new in ((config, b'"bitwright"', b'"bitwrighu"'), (config.with_name("model.safetensors"), b"", b"")):
        whole = file.read_bytes()
        file.write_bytes(whole.replace(old, new) if old else whole[:-1] + bytes([whole[-1] ^ 1]))
        result = CliRunner().invoke(inspect, [str(packed)])
        assert (result.exit_code, "text_encoder_3" in result.stderr) == (6, True)
        file.write_bytes(whole)
    assert CliRunner().invoke(inspect, [str(packed)]).exit_code == 0


def test_killed_in_the_second_component_it_resumes_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(source), tmp_path / "stopped", recipe(source), components=BOTH, progress=StopIn(2))
    resumed = quant.quantize(str(source), tmp_path / "stopped", recipe(source), components=BOTH, mode="resume")
    assert resumed.others[0].report["resumed_blocks"] == 1
    quant.quantize(str(source), tmp_path / "straight", recipe(source), components=BOTH)
    assert tiny.contents(tmp_path / "stopped") == tiny.contents(tmp_path / "straight")


def test_resumed_without_its_plan_file_the_second_component_has_its_plan_too(source: Path, tmp_path: Path) -> None:
    """A plan file may be a pipe, so what it said is kept, and it is read once."""
    reading, writing = os.pipe()
    os.write(writing, json.dumps({"*q*": None}).encode())
    os.close(writing)
    told = Settings(plan=Path(f"/dev/fd/{reading}"))
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(source), tmp_path / "out", rounded(), settings=told, components=BOTH, progress=StopIn(1))
    os.close(reading)
    assert (tmp_path / "out" / "text_encoder_3" / ".bitwright" / "told.json").exists()
    quant.quantize(str(source), tmp_path / "out", rounded(), components=BOTH, mode="resume")
    (tmp_path / "plan.json").write_text(json.dumps({"*q*": None}))
    again = Settings(plan=tmp_path / "plan.json")
    quant.quantize(str(source), tmp_path / "straight", rounded(), settings=again, components=BOTH)
    assert tiny.contents(tmp_path / "out") == tiny.contents(tmp_path / "straight")


def test_a_restart_forgets_the_plan_file_of_the_run_before(source: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"*q*": None}))
    told = Settings(plan=tmp_path / "plan.json")
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(source), tmp_path / "out", rounded(), settings=told, components=BOTH, progress=StopIn(1))
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(source), tmp_path / "out", rounded(), components=BOTH, mode="restart", progress=StopIn(1))
    quant.quantize(str(source), tmp_path / "out", rounded(), components=BOTH, mode="resume")
    quant.quantize(str(source), tmp_path / "straight", rounded(), components=BOTH)
    assert tiny.contents(tmp_path / "out") == tiny.contents(tmp_path / "straight")


@pytest.mark.parametrize("before", [BOTH[:1], BOTH[1:]])
def test_a_restart_packs_what_was_float(before: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    """And is refused before any work where it finds more there than the copied float component."""
    out, new = tmp_path / "out", next(part for part in BOTH if part not in before)
    quant.quantize(str(source), out, rounded(), components=before)
    kept = tiny.contents(out)
    with pytest.raises(ResumeError, match=f"out/{new}: holds the float component; pack it with --restart"):
        quant.quantize(str(source), out, rounded(), components=(new, *before))
    (out / new / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match=f"out/{new}: holds files that are not bitwright's"):
        quant.quantize(str(source), out, rounded(8), components=BOTH, mode="restart")
    (out / new / "notes.txt").unlink()
    assert tiny.contents(out) == kept
    quant.quantize(str(source), out, rounded(), components=BOTH, mode="restart")
    quant.quantize(str(source), tmp_path / "straight", rounded(), components=BOTH)
    assert tiny.contents(out) == tiny.contents(tmp_path / "straight")


def test_a_restart_with_fewer_components_leaves_nothing_of_the_others(source: Path, tmp_path: Path) -> None:
    for parts in (BOTH[1:], BOTH[:1]):
        out, straight = tmp_path / f"out {parts}", tmp_path / f"straight {parts}"
        quant.quantize(str(source), straight, rounded(), components=parts)
        quant.quantize(str(source), out, rounded(), components=BOTH)
        for part in BOTH:
            (out / part / "notes.txt").write_text("mine")
        quant.quantize(str(source), out, rounded(), components=parts, mode="restart")
        assert all((out / part / "notes.txt").read_text() == "mine" for part in BOTH)
        for part in BOTH:
            (out / part / "notes.txt").unlink()
        assert tiny.contents(out) == tiny.contents(straight)
        assert not (out / next(part for part in BOTH if part not in parts) / "report.json").exists()


def test_a_restart_that_was_killed_resumes_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """What the earlier run made of the second component does not stand in the way, nor does it stay."""
    out, straight = tmp_path / "out", tmp_path / "straight"
    quant.quantize(str(source), out, rounded(8), components=BOTH)
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(source), out, rounded(), components=BOTH, mode="restart", progress=StopIn(1))
    quant.quantize(str(source), out, rounded(), components=BOTH, mode="resume")
    quant.quantize(str(source), straight, rounded(), components=BOTH)
    assert tiny.contents(out) == tiny.contents(straight)


def test_a_resumed_run_makes_no_packed_component_float(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(source), out, rounded(), components=BOTH, progress=StopIn(2))
    before = tiny.contents(out)
    with pytest.raises(ResumeError, match=r"out/transformer: would become float; name it in --components too"):
        quant.quantize(str(source), out, rounded(), components=BOTH[1:], mode="resume")
    assert tiny.contents(out) == before
    quant.quantize(str(source), out, rounded(), components=BOTH, mode="resume")


def test_the_command_predicts_what_it_then_writes(source: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(source).to_dict()))
    given = [
        "--model",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--components",
        ",".join(BOTH),
        "--json",
        "--quiet",
    ]
    given += ["--recipe", str(tmp_path / "recipe.json"), "--device", "cpu", "--threads", "1"]
    predicted = json.loads(CliRunner().invoke(app, [*given, "--dry-run"]).stdout.splitlines()[-1])
    made = json.loads(CliRunner().invoke(app, given).stdout.splitlines()[-1])
    assert predicted["transformer"]["weight_files"] == made["files"]
    assert predicted["text_encoder_3"]["weight_files"] == made["components"]["text_encoder_3"]["files"]


def test_a_text_encoder_may_be_left_out(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "float")
    index = tmp_path / "float" / "model_index.json"
    left = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    index.write_text(json.dumps(json.loads(index.read_text()) | left))
    for name in left:
        shutil.rmtree(tmp_path / "float" / name)
    samples = prepare(str(tmp_path / "float"), recipe(source)).samples
    assert "2 steps of StableDiffusion3Pipeline" in samples.text


def test_prompts_go_with_real_images(source: Path, tmp_path: Path) -> None:
    images = draw(tmp_path / "images", 3, 8, "RGB")
    own = replace(recipe(source), calibration=Calibration(str(images), samples=3, batch_size=2))
    samples = prepare(str(source), own).samples
    assert "3 images of images, built-in prompts; 2 steps of StableDiffusion3Pipeline" in samples.text
    assert samples.batches[0]["hidden_states"].shape[1:] == (4, 8, 8)


def test_what_cannot_be_quantized_is_refused(source: Path, tmp_path: Path) -> None:
    for wrong, error, said in (
        ("vae", ModelError, "bitwright quantizes transformers and text encoders"),
        ("text_encoder_4", ModelError, "a diffusers pipeline without a text_encoder_4"),
        ("text_encoder", SettingsError, "name each once"),
    ):
        with pytest.raises(error, match=said):
            quant.quantize(str(source), tmp_path / "out", recipe(source), components=("text_encoder", wrong))
    with pytest.raises(ModelError, match="it has no components"):
        quant.quantize(str(source / "transformer"), tmp_path / "out", recipe(source), components=("text_encoder",))


@pytest.mark.parametrize("name", ["../leak", "/leak", "a/b", "..", "", ".bitwright", 300 * "x"])
def test_a_component_that_leads_out_of_the_folder(name: str, source: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "in" / "model"))
    (tmp_path / "in" / "leak").mkdir()
    (tmp_path / "in" / "leak" / "secret.json").write_text("{}")
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "X"]}))
    with pytest.raises(ModelError, match=f"component {name!r} is no plain name"):
        quant.quantize(str(copied), tmp_path / "out" / "packed", recipe(source))
    assert not (tmp_path / "out").exists()
