"""Diffusion transformers from end to end: every architecture is walked, quantized, saved, loaded and run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_dit
import torch

import quant
from quant.calibration.samples import moved
from quant.checkpoint.manifest import verify
from quant.errors import CalibrationError, ModelError, SettingsError
from quant.estimate import estimate
from quant.linear import PackedLinear
from quant.models.arguments import Form, build, find_form, translate
from quant.models.stream import first_tensor
from quant.models.walk import walk
from quant.prepare import prepare
from quant.progress import Progress
from quant.recipe import Calibration, Recipe, Trajectory, load_recipe
from quant.recovery.distillation import Distillation

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")  # which diffusers' own Chroma imports

SMALL = Calibration(samples=3, batch_size=2)
WAY = Trajectory(steps=3, keep=2)


def one_step(model: Any, form: Form, rows: int = 2) -> torch.Tensor:
    """One step of denoising."""
    if not model._forward_pre_hooks:
        translate(model)
    with torch.no_grad():
        return first_tensor(model(**build(model, form.layout, form.traced, rows)))


@pytest.mark.parametrize("name", list(tiny_dit.CONFIGS))
def test_every_architecture(name: str, tmp_path: Path) -> None:
    diffusers = tiny_dit.library()
    source = tiny_dit.folder(name, tmp_path / "float", "FlowMatchEulerDiscreteScheduler")
    recipe = Recipe(spec=quant.Uniform(bits=8, group_size=16), calibration=SMALL, trajectory=WAY)
    result = quant.quantize(str(source), tmp_path / "packed", recipe)
    assert result.report["sites"]
    loaded = quant.load(tmp_path / "packed")
    assert any(isinstance(part, PackedLinear) for part in loaded.modules())
    model = getattr(diffusers, name).from_pretrained(source)
    translate(model)
    form = find_form(model)
    expected, got = one_step(model, form), one_step(loaded, form)
    assert float((got - expected).norm() / expected.norm()) < 0.05
    again = getattr(diffusers, name).from_pretrained(tmp_path / "packed")
    torch.testing.assert_close(one_step(again, form), got, rtol=0, atol=0)
    plain = quant.load(tmp_path / "packed", dequantize=True)
    torch.testing.assert_close(one_step(plain, form), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_narrow_dtypes(name: str, dtype: str, tmp_path: Path) -> None:
    source = tiny_dit.folder(name, tmp_path / "float", "FlowMatchEulerDiscreteScheduler")
    recipe = Recipe(spec=quant.Uniform(bits=8, group_size=16), calibration=SMALL, trajectory=WAY)
    quant.quantize(str(source), tmp_path / "packed", recipe, settings=quant.Settings(dtype=dtype))
    model = getattr(tiny_dit.library(), name).from_pretrained(source)
    form = find_form(model)
    expected, got = one_step(model, form), one_step(quant.load(tmp_path / "packed"), form)
    assert float((got - expected).norm() / expected.norm()) < 0.05


MODULATIONS = {
    "DiTTransformer2DModel": {"norm1.linear"},
    "SD3Transformer2DModel": {"norm1.linear", "norm1_context.linear"},
    "FluxTransformer2DModel": {"norm1.linear", "norm1_context.linear", "norm.linear"},
    "QwenImageTransformer2DModel": {"img_mod.1", "txt_mod.1"},
    "CogVideoXTransformer3DModel": {"norm1.linear", "norm2.linear"},
    "WanTransformer3DModel": set[str](),
}


@pytest.mark.parametrize("name", list(MODULATIONS))
def test_roles_are_found_without_lists_of_names(name: str) -> None:
    model = tiny_dit.transformer(name)
    form = find_form(model)
    found = walk(model, build(model, form.layout, form.traced, 2))
    ends = {site.name.partition("blocks.")[2].partition(".")[2] for site in found.sites if site.modulation}
    assert ends == MODULATIONS[name]
    assert all("proj_out" not in site.name or "single" in site.name for site in found.sites)
    if name == "DiTTransformer2DModel":
        embedders = [reason for left, reason in found.left.items() if "timestep_embedder" in left]
        assert len(embedders) == 4
        assert all("embedders stay float" in reason for reason in embedders)
    assert "an embedder: multiplied by before the first block" in found.left.values() or name.startswith("DiT")


def test_modulations_keep_at_least_four_bits(tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float", "DDIMScheduler")
    for bits, wanted in ((2, 4), (3, 4), (5, 5)):
        recipe = Recipe(spec=quant.Uniform(bits=bits), solver=load_recipe("rtn").solver, calibration=None)
        plan = prepare(str(source), recipe).plan.to_dict()
        assert {spec["bits"] for name, spec in plan.items() if spec and name.endswith("norm1.linear")} == {wanted}
        assert {spec["bits"] for name, spec in plan.items() if spec and not name.endswith("norm1.linear")} == {bits}


def test_calibration_follows_the_model_and_sees_all_timesteps_alike(tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float", "DDIMScheduler")
    recipe = Recipe(calibration=Calibration(samples=8, batch_size=4), trajectory=Trajectory(steps=4, keep=2))
    samples = prepare(str(source), recipe).samples
    seen = torch.cat([batch["timestep"] for batch in samples.batches]).tolist()
    assert len(seen) == 16
    assert {seen.count(time) for time in set(seen)} == {4}
    assert "random class labels; 4 steps of DDIMScheduler" in samples.text
    again = prepare(str(source), recipe).samples
    assert again.tokens_sha256() == samples.tokens_sha256()

    model = tiny_dit.library().DiTTransformer2DModel.from_pretrained(source)  # the same way, by hand
    schedule = tiny_dit.library().DDIMScheduler.from_pretrained(source / "scheduler")
    schedule.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((8, 4, 8, 8), generator=generator)
    labels = torch.randint(0, 10, (8,), generator=generator)
    torch.testing.assert_close(samples.batches[0]["hidden_states"], x[[0, 2, 4, 6]])
    with torch.no_grad():
        said = model(x, timestep=schedule.timesteps[0].expand(8), class_labels=labels).sample[:, :4]
    x = schedule.step(said, schedule.timesteps[0], x).prev_sample
    second = next(batch for batch in samples.batches if batch["timestep"][0] == schedule.timesteps[1])
    torch.testing.assert_close(second["hidden_states"], x[[1, 3, 5, 7]], rtol=1e-4, atol=1e-5)


def test_the_streamed_model_calibrates_as_the_resident_one(tmp_path: Path) -> None:
    source = tiny_dit.folder("FluxTransformer2DModel", tmp_path / "float", "FlowMatchEulerDiscreteScheduler")
    recipe = Recipe(calibration=SMALL, trajectory=WAY)
    whole = prepare(str(source), recipe).samples
    streamed = prepare(str(source), recipe, quant.Settings(spill_bytes=0)).samples
    assert streamed.tokens_sha256() == whole.tokens_sha256()


def test_guidance_doubles_the_batch(tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float", "DDIMScheduler")
    recipe = Recipe(calibration=SMALL, trajectory=Trajectory(steps=2, keep=1, guidance=4.0))
    batch = prepare(str(source), recipe).samples.batches[0]
    rows = len(batch["hidden_states"])
    assert torch.equal(batch["hidden_states"][: rows // 2], batch["hidden_states"][rows // 2 :])
    assert batch["class_labels"][rows // 2 :].tolist() == [10] * (rows // 2)
    assert batch["class_labels"][: rows // 2].max() < 10


def test_labels_and_tensors_from_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    labels = tmp_path / "labels.txt"
    labels.write_text("7\n3\n")
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "dit", "DDIMScheduler")
    recipe = Recipe(calibration=Calibration(str(labels), samples=3, batch_size=3), trajectory=Trajectory(2, 2))
    assert prepare(str(source), recipe).samples.batches[0]["class_labels"].tolist() == [7, 3, 7]
    labels.write_text("a red car\n")
    with pytest.raises(CalibrationError, match="one a line"):
        _ = prepare(str(source), recipe).samples

    text = tmp_path / "text.safetensors"
    save_file({"encoder_hidden_states": torch.ones(2, 6, 24)}, text)
    source = tiny_dit.folder("PixArtTransformer2DModel", tmp_path / "pixart", "DDIMScheduler")
    recipe = Recipe(calibration=Calibration(str(text), samples=3, batch_size=3), trajectory=Trajectory(2, 2))
    samples = prepare(str(source), recipe).samples
    assert samples.batches[0]["encoder_hidden_states"].shape == (3, 6, 24)
    assert "tensors of text.safetensors" in samples.text
    save_file({"encoder_hidden_states": torch.ones(2, 6, 25)}, text)
    with pytest.raises(CalibrationError, match="none of the model's arguments"):
        _ = prepare(str(source), recipe).samples


def test_a_transformer_alone_is_calibrated_on_noise_and_says_so(tmp_path: Path) -> None:
    source = tiny_dit.folder("SD3Transformer2DModel", tmp_path / "float")
    samples = prepare(str(source), Recipe(calibration=SMALL, trajectory=WAY)).samples
    assert "noise at all timesteps" in samples.text
    assert moved(samples.batches[0], "cpu")["timestep"].tolist() == [999, 999]


AURA = {
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
}


@pytest.mark.parametrize(
    ("name", "first", "guidance"),
    [
        ("FluxTransformer2DModel", 1.0, 3.5),
        ("AuraFlowTransformer2DModel", 1.0, None),
        ("HunyuanVideoTransformer3DModel", 1000.0, 3500.0),
        ("SD3Transformer2DModel", 1000.0, None),
    ],
)
def test_timestep_and_guidance_are_what_the_pipeline_gives(
    name: str, first: float, guidance: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some models multiply both by 1000 themselves."""
    monkeypatch.setitem(tiny_dit.CONFIGS, "AuraFlowTransformer2DModel", AURA)
    source = tiny_dit.folder(name, tmp_path / "float", "FlowMatchEulerDiscreteScheduler")
    batch = prepare(str(source), Recipe(calibration=SMALL, trajectory=WAY)).samples.batches[0]
    assert batch["timestep"].tolist() == [first] * 2
    assert guidance is None or batch["guidance"].tolist() == [guidance] * 2


def test_what_says_too_little_of_its_latents_is_refused(tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float")
    config = {"_class_name": "Kandinsky5Transformer3DModel", "num_text_blocks": 1, "num_visual_blocks": 1}
    (source / "config.json").write_text(json.dumps(config))  # which calls its channels something else
    with pytest.raises(ModelError, match=r"in none of the layouts known here.*in_channels"):
        prepare(str(source), Recipe(calibration=None))


def test_code_and_models_that_are_not_diffusers_are_refused(tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float")
    config = json.loads((source / "config.json").read_text())
    for name in ("MyTransformer", "DDIMScheduler", "logging"):
        (source / "config.json").write_text(json.dumps(config | {"_class_name": name}))
        with pytest.raises(ModelError, match="no ModelMixin of diffusers"):
            prepare(str(source), Recipe(calibration=None))


def autoencoder(levels: int) -> Any:
    """One that halves the sides of an image `levels - 1` times."""
    torch.manual_seed(0)
    return tiny_dit.library().AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8,) * levels, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
    ).eval()  # fmt: skip


def pipeline(path: Path) -> Any:
    """A whole class-conditional pipeline: transformer, scheduler and an autoencoder."""
    diffusers = tiny_dit.library()
    made = diffusers.DiTPipeline(
        tiny_dit.transformer("DiTTransformer2DModel", num_embeds_ada_norm=1000),
        autoencoder(1),
        diffusers.DDIMScheduler(),
    )
    made.save_pretrained(path)
    return made


def paint(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    return torch.from_numpy(images)


def test_a_pipeline_comes_out_as_a_pipeline(tmp_path: Path) -> None:
    diffusers = tiny_dit.library()
    before = paint(pipeline(tmp_path / "float"))
    recipe = Recipe(spec=quant.Uniform(bits=8, group_size=16), calibration=SMALL, trajectory=WAY)
    out = tmp_path / "packed"
    result = quant.quantize(str(tmp_path / "float"), out, recipe)
    assert result.out == out
    verify(out / "transformer")
    assert (out / "README.md").is_file()
    loaded = diffusers.DiTPipeline.from_pretrained(out)
    assert any(isinstance(part, PackedLinear) for part in loaded.transformer.modules())
    assert float((paint(loaded) - before).abs().mean()) < 0.05
    swapped = diffusers.DiTPipeline.from_pretrained(tmp_path / "float", transformer=quant.load(out))
    torch.testing.assert_close(paint(swapped), paint(loaded), rtol=0, atol=0)
    for name in ("vae", "scheduler"):
        assert sorted(p.name for p in (out / name).iterdir()) == sorted(
            p.name for p in (tmp_path / "float" / name).iterdir()
        )
    with pytest.raises(quant.BitwrightError, match="already holds a checkpoint"):
        quant.quantize(str(tmp_path / "float"), out, recipe)
    again = quant.quantize(str(tmp_path / "float"), tmp_path / "again", recipe)
    files = [f"transformer/{name}" for name in again.report["files"]] + ["transformer/config.json"]
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, what: str) -> None:
        self.lines.append(what)


def test_a_second_transformer_is_not_forgotten(tmp_path: Path) -> None:
    """Wan 2.2 has one for the first steps and one for the last."""
    pipeline(tmp_path / "float")
    index = tmp_path / "float" / "model_index.json"
    more = {"transformer_2": ["diffusers", "DiTTransformer2DModel"], "transformer_3": [None, None]}
    index.write_text(json.dumps(json.loads(index.read_text()) | more))
    shutil.copytree(tmp_path / "float" / "transformer", tmp_path / "float" / "transformer_2")
    said = Said()
    prepare(str(tmp_path / "float"), Recipe(calibration=SMALL), progress=said)
    note = "note: its transformer_2 stays float; --components transformer,transformer_2 packs both"
    assert [line for line in said.lines if "stays float" in line] == [note]
    said.lines.clear()
    prepare(str(tmp_path / "float"), Recipe(calibration=SMALL), progress=said, part="transformer")
    assert not said.lines


def test_a_transformer_that_its_pipeline_does_not_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline(tmp_path / "float")
    monkeypatch.setattr(tiny_dit.library().DiTPipeline, "__call__", lambda self, class_labels, **_: None)
    with pytest.raises(CalibrationError, match="did not call its transformer in the steps kept of 3 samples"):
        _ = prepare(str(tmp_path / "float"), Recipe(calibration=SMALL)).samples


def test_a_pipeline_is_calibrated_as_it_paints(tmp_path: Path) -> None:
    pipeline(tmp_path / "float")
    recipe = Recipe(calibration=Calibration(samples=4, batch_size=4), trajectory=Trajectory(steps=4, keep=2))
    samples = prepare(str(tmp_path / "float"), recipe).samples
    assert "random class labels; 4 steps of DiTPipeline with DDIMScheduler" in samples.text
    assert "its own guidance" in samples.text
    assert [len(batch["hidden_states"]) for batch in samples.batches] == [4, 4, 4, 4]  # half of them without a label
    assert all(1000 in batch["class_labels"].tolist() for batch in samples.batches)
    weighed = replace(recipe, trajectory=replace(recipe.trajectory, weighting="image"))
    whole = prepare(str(tmp_path / "float"), weighed).samples
    streamed = prepare(str(tmp_path / "float"), weighed, quant.Settings(spill_bytes=0)).samples
    assert whole.tokens_sha256() == streamed.tokens_sha256() == samples.tokens_sha256()
    assert whole.weights == streamed.weights
    (tmp_path / "float" / "vae").rename(tmp_path / "elsewhere")
    alone = prepare(str(tmp_path / "float"), recipe).samples
    assert "the pipeline was not run: its vae is missing" in alone.text


def text_pipeline(path: Path) -> None:
    """A pipeline from prompts: PixArt's, with a text encoder and a tokenizer of characters."""

    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    diffusers = tiny_dit.library()
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.add_tokenizer(path.with_name("tokenizer")))
    transformer = tiny_dit.transformer("PixArtTransformer2DModel", sample_size=32)
    made = diffusers.PixArtAlphaPipeline(
        tokenizer, T5EncoderModel(config).eval(), autoencoder(4), transformer, diffusers.DPMSolverMultistepScheduler()
    )
    made.save_pretrained(path)


def test_prompts_go_through_the_pipeline_s_text_encoder(tmp_path: Path) -> None:
    text_pipeline(tmp_path / "float")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red car\na blue bird on a branch\n")
    way = Trajectory(steps=2, keep=1, guidance=2.0, weighting="image")
    samples = prepare(str(tmp_path / "float"), Recipe(calibration=SMALL, trajectory=way)).samples
    assert "built-in prompts; 2 steps of PixArtAlphaPipeline" in samples.text
    assert len(set(samples.weights or ())) == 2
    own = Recipe(calibration=Calibration(str(prompts), samples=2, batch_size=2), trajectory=way)
    out = quant.quantize(str(tmp_path / "float"), tmp_path / "packed", own).out
    assert (
        "prompts.txt; 2 steps of PixArtAlphaPipeline"
        in json.loads((out / "transformer" / "report.json").read_text())["calibration"]["text"]
    )
    loaded = tiny_dit.library().DiffusionPipeline.from_pretrained(out)
    assert type(loaded.text_encoder).__name__ == "T5EncoderModel"


def test_a_pipeline_draws_in_the_size_that_is_asked(tmp_path: Path) -> None:
    text_pipeline(tmp_path / "float")

    def asked(**size: int) -> torch.Size:
        recipe = Recipe(calibration=SMALL, trajectory=Trajectory(steps=2, keep=1, **size))  # pyright: ignore[reportArgumentType]
        return prepare(str(tmp_path / "float"), recipe).samples.batches[0]["hidden_states"].shape[-2:]

    assert asked() == (32, 32)
    tall = asked(height=300, width=200)
    assert tall[0] > 1.4 * tall[1]  # PixArt takes the nearest of the sizes that it was trained on
    with pytest.raises(SettingsError, match="PixArtAlphaPipeline takes no num_frames"):
        asked(frames=5)
    with pytest.raises(SettingsError, match="positive"):
        Trajectory(width=-1)
    alone = Recipe(calibration=SMALL, trajectory=Trajectory(height=16))
    with pytest.raises(SettingsError, match="a transformer alone has its own"):
        _ = prepare(str(tmp_path / "float" / "transformer"), alone).samples


class Stop(Progress):
    """Ends a run after its first block, or inside its end-to-end tuning."""

    def __init__(self, tuning: bool) -> None:
        self.tuning = tuning

    def advanced(self, index: int, weights: int) -> None:
        if not self.tuning:
            raise KeyboardInterrupt

    def distilling(self, done: int, steps: int, loss: float) -> None:
        if done == 3:
            raise KeyboardInterrupt


SOLVED = Recipe(
    spec=quant.Uniform(bits=3, group_size=16),
    calibration=SMALL,
    trajectory=replace(WAY, weighting="image"),
    match="float",
)
MIXED = replace(SOLVED, spec=quant.Uniform(bits=2, group_size=16), average=4.3)
TUNED = replace(MIXED, distillation=Distillation(steps=6))


@pytest.mark.parametrize(
    ("recipe", "tuning"),
    [(SOLVED, False), (MIXED, False), (TUNED, False), (TUNED, True)],
    ids=["solved", "mixed", "tuned", "while tuning"],
)
def test_a_stopped_run_resumes_to_the_same_bytes(
    recipe: Recipe, tuning: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline(tmp_path / "float")
    monkeypatch.setattr("quant.finish.PAUSE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(tmp_path / "float"), tmp_path / "stopped", recipe, progress=Stop(tuning))
    resumed = quant.quantize(str(tmp_path / "float"), tmp_path / "stopped", recipe, mode="resume")
    blocks = len(resumed.report["blocks"])
    assert resumed.report["resumed_blocks"] == (blocks if tuning else 1)
    if recipe.average is not None:
        assert len({site["spec"]["bits"] for site in resumed.report["sites"]}) > 1
    if recipe.distillation is not None:
        assert resumed.report["distillation"]["after"] < resumed.report["distillation"]["before"]
    quant.quantize(str(tmp_path / "float"), tmp_path / "straight", recipe)
    assert tiny.contents(tmp_path / "stopped", people=False) == tiny.contents(tmp_path / "straight", people=False)
    done = quant.quantize(str(tmp_path / "float"), tmp_path / "stopped", recipe, mode="resume")  # nothing left to do
    assert done.report["resumed_blocks"] == resumed.report["resumed_blocks"]


def test_a_dry_run_knows_the_bytes(tmp_path: Path) -> None:
    source = tiny_dit.folder("HunyuanVideoTransformer3DModel", tmp_path / "float", "FlowMatchEulerDiscreteScheduler")
    recipe = Recipe(calibration=SMALL, trajectory=WAY)
    prepared = prepare(str(source), recipe)
    predicted = estimate(prepared)
    assert prepared.outline[1] == len(prepared.samples.batches)
    assert quant.quantize(str(source), tmp_path / "packed", recipe).written.files == predicted.weight_files


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    pipeline(tmp_path / "float")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(quant.BitwrightError, match="files that are not bitwright's"):
        quant.quantize(str(tmp_path / "float"), tmp_path / "out", load_recipe("rtn"))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_dry_run_of_a_pipeline_is_of_the_size_that_it_draws(batch_size: int, tmp_path: Path) -> None:
    """With both halves under its own guidance, and no larger than was asked."""
    text_pipeline(tmp_path / "float")
    few = Calibration(samples=5, batch_size=batch_size)
    recipe = Recipe(calibration=few, trajectory=Trajectory(steps=3, keep=2, height=300, width=200))
    prepared = prepare(str(tmp_path / "float"), recipe)
    batch, count, rows = prepared.outline
    made = prepared.samples.batches
    assert (count, rows) == (len(made), 2)
    largest = max(made, key=lambda one: len(one["hidden_states"]))
    assert {key: x.shape for key, x in batch.items() if isinstance(x, torch.Tensor)} == {
        key: x.shape for key, x in largest.items() if isinstance(x, torch.Tensor)
    }
    assert estimate(prepared).sites == len(prepared.walk.sites)


def test_a_model_that_takes_lists_is_calibrated_in_its_pipeline(tmp_path: Path) -> None:
    """Z-Image: texts of several lengths, other names of the arguments, time that runs backwards."""
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    diffusers = tiny_dit.library()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.add_tokenizer(tmp_path / "tokenizer"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    transformer = tiny_dit.transformer("ZImageTransformer2DModel")
    parts = diffusers.FlowMatchEulerDiscreteScheduler(), autoencoder(4), Qwen3Model(config).eval(), tokenizer
    diffusers.ZImagePipeline(*parts, transformer).save_pretrained(tmp_path / "float")
    way = Trajectory(steps=3, keep=2, height=64, width=64)
    recipe = Recipe(quant.Uniform(bits=4, group_size=16), calibration=SMALL, trajectory=way)
    prepared = prepare(str(tmp_path / "float"), recipe)
    batch, count, rows = prepared.outline
    assert (count, rows, len(batch["encoder_hidden_states"])) == (len(prepared.samples.batches), 2, 4)
    assert len({len(text) for text in prepared.samples.batches[0]["encoder_hidden_states"]}) > 1
    out = quant.quantize(str(tmp_path / "float"), tmp_path / "out", recipe).out

    def drawn(**parts: Any) -> torch.Tensor:
        pipe = diffusers.DiffusionPipeline.from_pretrained(out, **parts)
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        return pipe("a car", 64, 64, num_inference_steps=2, generator=seed, output_type="latent").images

    plain = quant.load(out, dequantize=True)
    torch.testing.assert_close(drawn(), drawn(transformer=plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "schedule", "noted", "first"),
    [("ZImageTransformer2DModel", "FlowMatchEulerDiscreteScheduler", True, 1),
     ("ZImageTransformer2DModel", "", False, 1),
     ("Lumina2Transformer2DModel", "FlowMatchEulerDiscreteScheduler", True, 1000),
     ("DiTTransformer2DModel", "DDIMScheduler", False, 1000)],
)  # fmt: skip
def test_which_way_time_runs_is_only_known_to_a_pipeline(
    name: str, schedule: str, noted: bool, first: float, tmp_path: Path
) -> None:
    """Where it matters that is said. Z-Image's config tells that its time is a share of 1."""
    told = list[str]()

    class Said(Progress):
        def say(self, what: str) -> None:
            told.append(what)

    source = tiny_dit.folder(name, tmp_path / "float", schedule)
    prepared = prepare(str(source), Recipe(calibration=SMALL, trajectory=WAY), progress=Said())
    times = torch.cat([batch["timestep"].float() for batch in prepared.samples.batches])
    assert first / 2 < float(times.max()) <= first
    assert any("counts backwards" in line and "it stands alone" in line for line in told) == noted


def test_lists_of_blocks_before_the_chain_stay_float() -> None:
    """Chroma makes all modulations from the timestep in one, Lumina refines text and noise in two."""
    for name, apart in (("ChromaTransformer2DModel", 4), ("Lumina2Transformer2DModel", 15)):
        model = tiny_dit.transformer(name)
        form = find_form(model)
        found = walk(model, build(model, form.layout, form.traced, 2))
        assert sum("comes before the blocks that form a chain" in reason for reason in found.left.values()) == apart
        assert not any("refiner" in site.name or "guidance" in site.name for site in found.sites)


def test_cosmos_is_told_which_places_are_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One mask for all rows; it is resized by torchvision, which need not be here."""
    tiny_dit.library()
    from diffusers.models.transformers import transformer_cosmos
    from torch.nn.functional import interpolate

    resize = SimpleNamespace(resize=lambda x, size, interpolation: interpolate(x, size))
    vision = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", vision, raising=False)
    source = tiny_dit.folder("CosmosTransformer3DModel", tmp_path / "float", concat_padding_mask=True)
    out = quant.quantize(str(source), tmp_path / "out", Recipe(calibration=SMALL, trajectory=WAY))
    assert out.report["verification"]["worst_difference"] < 1e-4
