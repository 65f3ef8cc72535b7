"""`quant-eval` on diffusion transformers as a user calls it, and the judges that it opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from quant.errors import ModelError, SettingsError
from quant.eval import cli
from quant.eval.judge import open_judge
from quant.eval.lpips import open_lpips
from quant.eval.show import prompts_of, real_images

NOISE = torch.Generator().manual_seed(0)
LAYERS = "conv/2+1 relu flatten linear relu linear"


@pytest.fixture(autouse=True)
def _no_side_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_calm", lambda: None)


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 2, 3, 2, 1)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(32, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def judge(network: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_file(network.state_dict(), path, {"layers": LAYERS})
    return path


def test_a_judge_is_the_network_it_was_saved_from(judge: Path, network: nn.Sequential, tmp_path: Path) -> None:
    images = torch.rand(7, 1, 8, 8, generator=NOISE)
    seen = open_judge(judge).look(images, batch=3)
    torch.testing.assert_close(seen.classes, network(2 * images - 1))
    torch.testing.assert_close(seen.features, network[:5](2 * images - 1))
    plain = tmp_path / "plain.safetensors"
    save_file(network.state_dict(), plain)
    assert open_judge(f"{plain}:{LAYERS}").look(images).classes.equal(open_judge(judge).look(images).classes)
    assert seen.accuracy(seen.classes.argmax(1)) == 1
    assert seen.accuracy((seen.classes.argmax(1) + 1) % 3) == 0
    colours = images.expand(-1, 3, -1, -1)
    torch.testing.assert_close(open_judge(judge).look(colours).classes, seen.classes)


def test_a_judge_that_does_not_fit_says_so(judge: Path, network: nn.Sequential, tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file(network.state_dict(), plain)
    with pytest.raises(SettingsError, match="nothing says which layers"):
        open_judge(plain)
    with pytest.raises(SettingsError, match="'konv' is unknown"):
        open_judge(f"{plain}:konv")
    with pytest.raises(ModelError, match="no weight that fits"):
        open_judge(f"{plain}:linear")
    with pytest.raises(ModelError, match="do not fit"):
        open_judge(f"{plain}:conv/2+1 relu flatten linear")
    with pytest.raises(ModelError, match="cannot look at images"):
        open_judge(judge).look(torch.rand(1, 1, 9, 9))
    with pytest.raises(SettingsError, match="no such file"):
        open_judge(tmp_path / "none.safetensors")
    plain.write_bytes(b"no")
    with pytest.raises(ModelError, match="not a readable"):
        open_judge(f"{plain}:linear")


def test_a_classifier_of_transformers_judges(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8,
        num_channels=3, num_labels=4,
    )  # fmt: skip
    network = ViTForImageClassification(config).eval()
    network.save_pretrained(tmp_path)
    said = {"size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    images = torch.rand(2, 3, 16, 16, generator=NOISE)
    seen = open_judge(tmp_path).look(images)
    with torch.no_grad():
        logits = network((images - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)) / 0.5).logits
    torch.testing.assert_close(seen.classes, logits)
    assert seen.features.shape == (2, 8)


def test_prompts_and_real_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \n")
    assert prompts_of(str(tmp_path / "prompts.txt")) == ("a cat", "a dog")
    with pytest.raises(SettingsError, match="one in each line"):
        prompts_of("python-docs")
    for name, colour in (("b", (255, 0, 0)), ("a", (0, 51, 0))):
        Image.new("RGB", (3, 2), colour).save(tmp_path / f"{name}.png")
    images = real_images(tmp_path)
    assert images.shape == (2, 3, 2, 3)
    assert images[0, :, 0, 0].tolist() == pytest.approx([0, 0.2, 0])
    save_file({"images": torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)}, tmp_path / "real.safetensors")
    assert real_images(tmp_path / "real.safetensors").tolist() == [[[[1, 1], [1, 1]]]]
    Image.new("RGB", (4, 2)).save(tmp_path / "c.png")
    with pytest.raises(SettingsError, match="2 sizes"):
        real_images(tmp_path)


def test_lpips_is_its_formula(tmp_path: Path) -> None:
    """Random weights under the names of lpips.LPIPS, against torch's own layers in AlexNet's order."""
    torch.manual_seed(0)
    sizes = ((3, 4, 11, 4, 2), (4, 5, 5, 1, 2), (5, 6, 3, 1, 1), (6, 5, 3, 1, 1), (5, 4, 3, 1, 1))
    layers = [nn.Conv2d(*size) for size in sizes]
    weights = [torch.rand(1, size[1], 1, 1) for size in sizes]
    names = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")
    state = {
        f"net.{name}.{key}": value
        for name, each in zip(names, layers, strict=True)
        for key, value in each.state_dict().items()
    }
    save_file(
        state | {f"lin{i}.model.1.weight": weight for i, weight in enumerate(weights)}, tmp_path / "l.safetensors"
    )
    a, b = torch.rand(3, 3, 64, 64, generator=NOISE), torch.rand(3, 3, 64, 64, generator=NOISE)
    far = torch.zeros(3)
    shift, scale = torch.tensor([-0.03, -0.088, -0.188]).view(3, 1, 1), torch.tensor([0.458, 0.448, 0.45]).view(3, 1, 1)
    x, y = ((2 * each - 1 - shift) / scale for each in (a, b))
    with torch.no_grad():
        for index, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
            pool = nn.MaxPool2d(3, 2) if index in (1, 2) else nn.Identity()
            x, y = layer(pool(x)).relu(), layer(pool(y)).relu()
            unit = x / x.square().sum(1, keepdim=True).sqrt().add(1e-10) - y / y.square().sum(
                1, keepdim=True
            ).sqrt().add(1e-10)
            far += (unit.square() * weight).sum(1).mean((1, 2))
    distance = open_lpips(tmp_path / "l.safetensors", batch=2)
    torch.testing.assert_close(distance(a, b), far)
    assert distance(a, a).tolist() == [0, 0, 0]
    with pytest.raises(ModelError, match="cannot look"):
        distance(a[..., :8, :8], b[..., :8, :8])
    with pytest.raises(ModelError, match="not a state dict"):
        open_lpips(tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random pipeline that draws pixels, and the same with noise on its weights."""
    diffusers = pytest.importorskip(
        "diffusers", reason="diffusers is not installed; pip install 'bitwright[diffusers]'"
    )
    made = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3, norm_elementwise_affine=False,
    )  # fmt: skip
    for name in ("original", "damaged"):
        model.save_pretrained(made / name / "transformer")
        diffusers.DDIMScheduler().save_pretrained(made / name / "scheduler")
        index = {
            "_class_name": "DiTPipeline",
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "vae": [None, None],
        }
        (made / name / "model_index.json").write_text(json.dumps(index))
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=NOISE)
    return made / "original", made / "damaged"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_table_sheet_plot_and_json(folders: tuple[Path, Path], judge: Path, tmp_path: Path) -> None:
    original, damaged = folders
    paths = [tmp_path / name for name in ("sheet.png", "steps.png", "figures.json")]
    options = zip(("--sheet", "--plot", "--json"), paths, strict=True)
    result = call(
        damaged, original, "--against", original, "--images", 8, "--steps", 3, "--judge", judge,
        *(item for pair in options for item in pair),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for heading in ("PSNR", "worst", "SSIM", "Fréchet", "prec.", "right", "s/image", "RAM MB"):
        assert heading in result.stdout
    for said in ("8 images", "DDIMScheduler 3 steps", "no guidance", "against original", "judge.safetensors"):
        assert said in " ".join(result.stdout.split())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[:2])
    with Image.open(paths[0]) as sheet:
        shown = {sheet.getpixel((x, y)) for x in range(0, sheet.width, 3) for y in range(0, sheet.height, 3)}
    assert len(shown) > 20  # more than the background and letters

    figures: dict[str, Any] = json.loads(paths[2].read_text())
    worse, same = figures["models"]
    assert figures["original"]["psnr"] is None
    assert same["psnr"] is None  # infinite
    assert (same["ssim"], same["frechet"], same["precision"]) == (pytest.approx(1), pytest.approx(0, abs=1e-6), 1)
    assert 0 < worse["psnr"] < 100
    assert worse["ssim"] < 1
    assert worse["frechet"] > same["frechet"]
    assert worse["psnr_worst"] <= worse["psnr"]
    assert len(worse["steps"]) == 3
    assert all(step["noise"] > 0 and step["cosine"] < 1 for step in worse["steps"])
    assert worse["accuracy"] in [i / 8 for i in range(9)]
    stated = worse["settings"]
    assert (stated["images"], stated["steps"], stated["guidance"], stated["seed"]) == (8, 3, 1.0, 0)
    assert stated["real"] == "8 samples of original"
    assert len(stated["judge_sha256"]) == 64
    assert "diffusers" in stated["versions"]


def test_a_hub_name_is_drawn(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folders[0]))
    figures = tmp_path / "figures.json"
    result = call("me/dit", "--images", 1, "--steps", 1, "--json", figures)
    assert result.exit_code == 0, result.output
    assert json.loads(figures.read_text())["models"][0]["model"] == "me/dit"


def test_what_goes_wrong_is_one_sentence(folders: tuple[Path, Path], tmp_path: Path) -> None:
    original, _ = folders
    kept, one = tmp_path / "kept.json", ("--images", 1, "--steps", 1)
    for arguments, code, said in (
        ((original, "--plot", tmp_path / "s.png", *one, "--json", kept), 2, "give --against ORIGINAL"),
        ((tmp_path, original, "--plot", tmp_path / "s.nonsense"), 2, "no known kind of picture"),
        ((tmp_path, original, "--sheet", tmp_path / "s.nonsense"), 2, "end its name in .png"),
        ((original, "--sheet", tmp_path / "none" / "s.png"), 2, "its folder does not exist"),
        ((original, "--card"), 2, "keep these with --json"),
        ((original, "--guidance", 5000), 2, "guidance is 5000"),
        ((original, "--steps", 5000), 2, "steps is 5000: the scheduler takes fewer"),
        ((original, "--seed", 2**64), 2, "9223372036854775808"),
        ((original, "--judge", tmp_path / "none.safetensors"), 2, "no such file"),
        ((original, "--against", tmp_path), 3, "no model_index.json"),
    ):
        result = call(*arguments)
        assert result.exit_code == code, result.output
        assert said in " ".join(result.stderr.split())
    assert len(json.loads(kept.read_text())["models"]) == 1
