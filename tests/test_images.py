"""Figures of images against formulas written out, and pictures of models that are equal, damaged, or not comparable."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from quant.errors import ModelError, SettingsError
from quant.eval import pixels
from quant.eval.features import frechet, precision_recall

NOISE = torch.Generator().manual_seed(0)


def images(count: int, channels: int = 1, side: int = 16) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=NOISE)


def test_psnr_is_ten_log_of_the_mean_square() -> None:
    a, b = images(3, 2), images(3, 2)
    for index, value in enumerate(pixels.psnr(a, b).tolist()):
        squares = [(float(x) - float(y)) ** 2 for x, y in zip(a[index].flatten(), b[index].flatten(), strict=True)]
        assert value == pytest.approx(10 * math.log10(len(squares) / sum(squares)), rel=1e-6)
    assert pixels.psnr(a, a).tolist() == [math.inf] * 3
    with pytest.raises(SettingsError, match="cannot be compared"):
        pixels.psnr(a, b[:, :1])


@pytest.mark.parametrize("side", [16, 8, 7])
def test_ssim_is_the_formula_at_every_position(side: int) -> None:
    a, b = images(2, 1, side), images(2, 1, side)
    width = 11 if side > 11 else 7
    line = [math.exp(-((i - (width - 1) / 2) ** 2) / 4.5) for i in range(width)]
    window = torch.tensor([[x * y for x in line] for y in line], dtype=torch.float64)
    window /= window.sum()
    for index, value in enumerate(pixels.ssim(a, b).tolist()):
        found = []
        for top in range(side - width + 1):
            for left in range(side - width + 1):
                x, y = (each[index, 0, top : top + width, left : left + width].double() for each in (a, b))
                mx, my = float((window * x).sum()), float((window * y).sum())
                vx, vy = float((window * (x - mx) ** 2).sum()), float((window * (y - my) ** 2).sum())
                c = float((window * (x - mx) * (y - my)).sum())
                top_part = (2 * mx * my + 1e-4) * (2 * c + 9e-4)
                found.append(top_part / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
        assert value == pytest.approx(sum(found) / len(found), rel=1e-9)
    assert pixels.ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_steps_are_compared_one_by_one() -> None:
    a, b = (torch.randn(3, 4, 2, 5, generator=NOISE) for _ in range(2))
    for step, (cosine, error) in enumerate(zip(pixels.step_cosines(a, b), pixels.step_errors(a, b), strict=True)):
        x, y = a[step].flatten(1).double(), b[step].flatten(1).double()
        by_hand = [float(x[i] @ y[i] / (x[i].norm() * y[i].norm())) for i in range(4)]
        assert float(cosine) == pytest.approx(sum(by_hand) / 4, rel=1e-9)
        assert float(error) == pytest.approx(float((x - y).norm() ** 2 / y.norm() ** 2), rel=1e-9)


def test_frechet_distance_of_known_gaussians() -> None:
    a = torch.randn(500, 3, generator=NOISE, dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov()).T)  # mean 0, covariance 1
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a + torch.tensor([3.0, 0, 4]), a) == pytest.approx(25, rel=1e-9)
    assert frechet(a * torch.tensor([2.0, 1, 0.5]), a) == pytest.approx(1 + 0 + 0.25, rel=1e-9)  # (s - s')² each


def test_frechet_distance_with_the_square_root_of_the_product() -> None:
    a, b = (torch.randn(200, 4, generator=NOISE) @ torch.randn(4, 4, generator=NOISE) for _ in range(2))
    s, t = a.double().T.cov(), b.double().T.cov()
    values, vectors = torch.linalg.eig(s @ t)
    root = (vectors * values.sqrt()) @ torch.linalg.inv(vectors)
    by_hand = (a.double().mean(0) - b.double().mean(0)).square().sum() + (s + t).trace() - 2 * root.real.trace()
    assert frechet(a, b) == pytest.approx(float(by_hand), rel=1e-6)


def test_precision_and_recall_by_counting() -> None:
    real, made = torch.randn(30, 2, generator=NOISE), 2 * torch.randn(25, 2, generator=NOISE)

    def share(these: torch.Tensor, balls: torch.Tensor) -> float:
        reach = [sorted(float((x - y).double().norm()) for y in balls)[3] for x in balls]
        inside = [any(float((x - y).double().norm()) <= r for y, r in zip(balls, reach, strict=True)) for x in these]
        return sum(inside) / len(inside)

    found = precision_recall(made, real)
    assert found == pytest.approx((share(made, real), share(real, made)), abs=1e-9)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, made[:3]) is None


diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; pip install 'bitwright[diffusers]'")

from quant.eval.draw import Drawn, Rule, draw, predict  # noqa: E402
from quant.eval.gallery import judge_images  # noqa: E402
from quant.eval.hang import markdown, picture_table  # noqa: E402
from quant.eval.painter import Painter, is_diffusion, open_painter  # noqa: E402

RULE = Rule(images=6, steps=4, batch=4)


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    """A random transformer of two blocks for three classes, opened from the bare layout."""
    folder = tmp_path_factory.mktemp("painter") / "tiny"
    torch.manual_seed(0)
    diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3, norm_elementwise_affine=False,
    ).save_pretrained(folder)  # fmt: skip
    diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "scheduler")
    assert is_diffusion(folder)
    return open_painter(folder)


def damaged(painter: Painter, bits: int, name: str) -> Painter:
    """A copy whose attention and MLP weights are rounded to nearest, symmetric per output."""
    transformer = copy.deepcopy(painter.transformer)
    for path, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (".attn1." in path or ".ff." in path):
            step = module.weight.data.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
            module.weight.data = ((module.weight.data / step - 0.5).round() + 0.5) * step
    return replace(painter, transformer=transformer, name=name, folder=None)


def test_an_equal_model_has_no_error(painter: Painter) -> None:
    hung = judge_images([replace(painter, name="same")], against=painter, rule=RULE)
    (same,) = hung.pictures
    assert (same.psnr, same.psnr_pooled, same.psnr_worst) == (math.inf, math.inf, math.inf)
    assert same.ssim == pytest.approx(1, abs=1e-12)
    assert same.cosine == pytest.approx(1, abs=1e-12)
    assert [(step.latent, step.noise) for step in same.steps] == [(0, 0)] * 4
    assert same.to_dict()["psnr"] is None  # no infinity in JSON
    assert hung.original is not None
    assert hung.original.psnr is None
    assert (same.settings.images, same.settings.traced, same.settings.scheduler) == (6, 6, "DDIMScheduler")


def test_fewer_bits_are_farther_away(painter: Painter) -> None:
    models = [damaged(painter, bits, f"{bits}bit") for bits in (8, 4, 2)]
    fine, middle, coarse = judge_images(models, against=painter, rule=RULE).pictures
    for better, worse in ((fine, middle), (middle, coarse)):
        assert better.psnr is not None
        assert worse.psnr is not None
        assert better.psnr > worse.psnr
        assert better.ssim is not None
        assert worse.ssim is not None
        assert better.ssim > worse.ssim
        for left, right in zip(better.steps, worse.steps, strict=True):
            assert left.noise is not None
            assert right.noise is not None
            assert 0 < left.noise < right.noise
            assert left.cosine > right.cosine


def test_a_narrow_table_goes_on_below(painter: Painter) -> None:
    console = Console(width=60)
    with console.capture() as captured:
        hung = judge_images([damaged(painter, 4, "4bit")], against=painter, rule=RULE)
        console.print(picture_table(hung, console.width))
    lines = captured.get().splitlines()
    assert sum("model" in line for line in lines) == 2
    assert sum(line.strip().startswith("4bit") for line in lines) == 2
    assert "…" not in captured.get()
    assert "| 4bit |" in markdown(hung)


def test_images_depend_on_their_seed_alone(painter: Painter) -> None:
    whole = draw(painter, RULE)
    parts = draw(painter, replace(RULE, batch=1))
    assert whole.asked.tolist() == [0, 1, 2, 0, 1, 2]
    # another batch size changes the order of sums inside matrix products, nothing else
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-4)
    later = draw(painter, replace(RULE, images=3, seed=3))
    torch.testing.assert_close(whole.images[3:], later.images, rtol=0, atol=1e-4)


def test_guidance_pushes_away_from_no_class(painter: Painter) -> None:
    x, y = torch.randn(2, 1, 8, 8, generator=NOISE), torch.tensor([0, 2])
    with torch.no_grad():
        plain, none = (predict(painter, x, 500.0, labels, 1.0) for labels in (y, torch.tensor([3, 3])))
        guided = predict(painter, x, 500.0, y, 3.0)
    torch.testing.assert_close(guided, none + 3 * (plain - none), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, none)


def test_the_way_of_diffusers_own_pipeline(painter: Painter) -> None:
    """DiTPipeline with a VAE that hands pixels through draws the same images from the same noise."""

    class Through(nn.Module):
        config = diffusers.configuration_utils.FrozenDict(scaling_factor=1.0)
        dtype, device = torch.float32, torch.device("cpu")

        def decode(self, x: torch.Tensor) -> object:
            return diffusers.models.autoencoders.vae.DecoderOutput(sample=x)

    pipeline = diffusers.DiTPipeline(painter.transformer, None, painter.scheduler)
    pipeline.vae = Through()
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [0, 1, 2], guidance_scale=1.0, num_inference_steps=4, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
    ).images  # fmt: skip
    ours = draw(painter, replace(RULE, images=3)).images
    torch.testing.assert_close(ours, torch.from_numpy(theirs) if not torch.is_tensor(theirs) else theirs)
    assert draw(replace(painter, vae=Through()), replace(RULE, images=3)).images.equal(ours)


def test_a_learned_variance_is_dropped(painter: Painter) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = painter.transformer, painter.transformer.config

        def forward(self, x: torch.Tensor, **kwargs: torch.Tensor) -> object:
            made = self.inner(x, **kwargs)
            made.sample = torch.cat([made.sample, torch.full_like(made.sample, 7)], 1)
            return made

    assert draw(replace(painter, transformer=Twice()), RULE).images.equal(draw(painter, RULE).images)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2
def test_a_euler_scheduler_scales_its_inputs(painter: Painter) -> None:
    euler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    drawn = draw(replace(painter, scheduler=euler), RULE)
    first = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    # x = noise sigma, and the input x / sqrt(sigma² + 1): the noise again, but for 1 / (2 sigma²) = 0.00037 of it
    torch.testing.assert_close(drawn.trace.inputs[0], first, rtol=5e-4, atol=1e-6)
    assert drawn.images.isfinite().all()


def test_what_cannot_be_compared(painter: Painter, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="takes no prompts"):
        draw(painter, replace(RULE, prompts=("a cat",)))
    other = replace(painter, scheduler=diffusers.DDIMScheduler(beta_schedule="linear"), name="other")
    with pytest.raises(SettingsError, match="different schedulers"):
        judge_images([other], against=painter, rule=RULE)
    with pytest.raises(SettingsError, match="steps is 0"):
        Rule(steps=0)
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        open_painter(tmp_path)
    broken = copy.deepcopy(painter.transformer)
    broken.proj_out_2.weight.data[0, 0] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        draw(replace(painter, transformer=broken), RULE)


def test_missing_weights_and_foreign_classes_are_refused(painter: Painter, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert painter.folder is not None
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((painter.folder / name).read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": None}))
    assert open_painter(tmp_path, original=painter).scheduler is painter.scheduler
    with pytest.raises(ModelError, match="no scheduler folder"):
        open_painter(tmp_path)
    tensors = load_file(tmp_path / name)
    del tensors["proj_out_1.bias"]
    save_file(tensors, tmp_path / name)
    with pytest.raises(ModelError, match=r"proj_out_1\.bias"):
        open_painter(tmp_path, original=painter)
    config = (tmp_path / "config.json").read_text().replace("DiTTransformer2DModel", "Path")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match="no ModelMixin"):
        open_painter(tmp_path, original=painter)


def test_a_trace_stops_at_its_limit(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.eval.draw.TRACED", 5)
    drawn: Drawn = draw(painter, RULE)
    assert drawn.trace.latents.shape == (4, 5, 1, 8, 8)
    assert drawn.trace.noise.shape == (4, 5, 1, 8, 8)


def test_a_pipeline_draws_its_prompts(painter: Painter) -> None:
    """Flux with random weights, its text encoders replaced by noise that the prompt seeds."""
    from diffusers.image_processor import VaeImageProcessor

    class Wordless(diffusers.FluxPipeline):
        def encode_prompt(self, prompt: list[str], **_: object) -> tuple[torch.Tensor, ...]:
            seeds = [torch.Generator().manual_seed(sum(each.encode())) for each in prompt]
            long = torch.stack([torch.randn(4, 8, generator=each) for each in seeds])
            short = torch.stack([torch.randn(8, generator=each) for each in seeds])
            return long, short, torch.zeros(4, 3)

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=1, block_out_channels=(8,), norm_num_groups=2, shift_factor=0.0
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = Wordless(scheduler, vae, None, None, None, None, transformer.eval())
    pipeline.default_sample_size, pipeline.vae_scale_factor = 8, 1
    pipeline.image_processor = VaeImageProcessor(vae_scale_factor=2)
    pipeline.set_progress_bar_config(disable=True)
    flux = Painter("flux", transformer, scheduler, None, pipeline)
    with pytest.raises(SettingsError, match="wants prompts"):
        draw(flux, RULE)
    rule = replace(RULE, images=3, batch=2, prompts=("a cat", "a dog"))
    drawn = draw(flux, rule)
    assert drawn.asked.tolist() == [0, 1, 0]
    assert drawn.images.shape == (3, 3, 8, 8)
    assert drawn.trace.latents.shape[:2] == (4, 3)
    coarse = copy.deepcopy(transformer)
    for parameter in coarse.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=NOISE)
    other = replace(flux, pipeline=Wordless(scheduler, vae, None, None, None, None, coarse), name="coarse")
    for name in ("default_sample_size", "vae_scale_factor", "image_processor"):
        setattr(other.pipeline, name, getattr(pipeline, name))
    other.pipeline.set_progress_bar_config(disable=True)
    far = {"far": lambda a, b: (a - b).abs().flatten(1).mean(1)}
    (picture,) = judge_images([other], against=flux, rule=rule, distances=far).pictures
    assert picture.psnr is not None
    assert 0 < picture.psnr < 100
    assert picture.distances["far"] > 0
    assert [step.noise for step in picture.steps] == [None] * 4
    assert all(step.latent > 0 for step in picture.steps)
    with pytest.raises(SettingsError, match="nothing to compare"):
        judge_images([painter], against=flux, rule=rule)
