"""A folder of images in place of samples on their own way: what the transformer is given, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_dit
import tiny
import tiny_dit
import torch

import quant
from quant.calibration import pictures
from quant.errors import CalibrationError
from quant.prepare import prepare
from quant.recipe import Calibration, Recipe, Trajectory

PIL = pytest.importorskip("PIL.Image", reason="Pillow is not installed: it comes with diffusers")


def draw(folder: Path, count: int, side: int = 16, mode: str = "L", labels: bool = False) -> Path:
    """Seeded noise as files, half of them JPEG; with `labels`, in subfolders named by the number modulo three."""
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(exist_ok=True)
    for n in range(count):
        pixels = torch.randint(0, 256, (side, side, len(mode)), generator=generator, dtype=torch.uint8)
        place = folder / str(n % 3) if labels else folder
        place.mkdir(parents=True, exist_ok=True)
        image = PIL.frombytes(mode, (side, side), pixels.numpy().tobytes())
        image.save(place / f"{n:02d}{('.png', '.JPG')[n % 2]}")
    return folder


def asked(folder: Path, samples: int = 6, **way: Any) -> Recipe:
    calibration = Calibration(str(folder), samples=samples, batch_size=4)
    return Recipe(
        spec=quant.Uniform(3, 64), calibration=calibration, trajectory=Trajectory(**{"steps": 6, "keep": 2} | way)
    )


def test_noise_is_added_as_the_scheduler_adds_it_and_all_timesteps_alike(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "demo" / "dit"
    prepared = prepare(str(source), asked(draw(tmp_path / "images", 6)))
    samples = prepared.samples
    times = torch.cat([batch["timestep"] for batch in samples.batches])
    assert sorted(times.bincount()[times.unique()].tolist()) == [2] * 6
    schedule = tiny_dit.library().DDIMScheduler.from_pretrained(source / "scheduler")
    image = PIL.open(tmp_path / "images" / "00.png")
    pixels = torch.tensor(list(image.tobytes())).view(1, 1, 16, 16) / 127.5 - 1
    noise = torch.randn((1, 16, 16), generator=torch.Generator().manual_seed(0))[None]
    found = 0
    for batch in samples.batches:
        wanted = schedule.add_noise(pixels, noise, batch["timestep"][:1])[0]
        found += sum(torch.allclose(row, wanted, atol=1e-5) for row in batch["hidden_states"])
    assert found == 2  # the steps kept of it
    assert "6 images of images, random class labels; 6 steps of DDIMScheduler" in samples.text
    again = prepare(str(source), asked(tmp_path / "images")).samples
    assert again.tokens_sha256() == samples.tokens_sha256()


def test_numbered_folders_are_labels(tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "dit", "DDIMScheduler", in_channels=3, sample_size=16)
    prepared = prepare(str(source), asked(draw(tmp_path / "images", 6, mode="RGB", labels=True), keep=6))
    assert prepared.samples.batches[0]["class_labels"].tolist() == [0, 0, 1, 1]  # sorted by folder
    assert "6 images of images with their labels" in prepared.samples.text
    quant.quantize(str(source), tmp_path / "out", asked(tmp_path / "images"))


def test_a_pipeline_s_autoencoder_makes_latents_of_them(tmp_path: Path) -> None:
    test_dit.pipeline(tmp_path / "float")
    recipe = asked(draw(tmp_path / "images", 4, 8, "RGB"), samples=4, steps=2, keep=1)
    prepared = prepare(str(tmp_path / "float"), recipe)
    assert "4 images of images, random class labels; 2 steps of DiTPipeline" in prepared.samples.text
    batch = prepared.samples.batches[0]["hidden_states"]
    assert len(batch) == 4
    assert torch.equal(batch[:2], batch[2:])  # the half without a condition sees the same
    first, second = (
        quant.quantize(str(tmp_path / "float"), tmp_path / name, recipe).out for name in ("first", "second")
    )
    assert tiny.contents(first / "transformer", people=False) == tiny.contents(second / "transformer", people=False)


def test_latents_are_normalised_as_the_autoencoder_says() -> None:
    class Doubles:
        device = torch.device("cpu")

        def __init__(self, **config: Any) -> None:
            self.config = config

        def encode(self, x: torch.Tensor) -> Any:
            return SimpleNamespace(latent=2 * x)

    x, here = torch.randn(2, 3, 4, 4), Path("image.png")
    encoded = pictures._encoded  # pyright: ignore[reportPrivateUsage]
    plain = encoded(Doubles(shift_factor=0.5, scaling_factor=0.25), x, here)
    torch.testing.assert_close(plain, (2 * x - 0.5) * 0.25)
    own = encoded(Doubles(latents_mean=[1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0]), x, here)
    torch.testing.assert_close(own[:, 2], (2 * x[:, 2] - 3) / 4)


def test_what_cannot_be_used_is_refused_in_words(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "demo" / "dit"
    folder = draw(tmp_path / "images", 6)

    def said(recipe: Recipe, model: Path = source) -> str:
        with pytest.raises(CalibrationError) as caught:
            _ = prepare(str(model), recipe).samples
        return str(caught.value)

    assert "6 images (.png, .jpg, .jpeg), and 8 samples are asked for; give more, or --samples 6" in said(
        asked(folder, samples=8)
    )
    assert said(asked(draw(tmp_path / "none", 0), samples=4)).endswith("4 samples are asked for; give more")
    assert "20 x 20 pixels make latents [1, 20, 20], and the model takes [1, 16, 16]: resize them to 16 x 16" in said(
        asked(draw(tmp_path / "large", 6, 20))
    )
    draw(folder / "zz", 1, 20)
    assert "20 x 20 pixels, and 00.png has 16 x 16 pixels: resize them alike" in said(asked(folder, samples=7))
    (folder / "zz" / "00.png").write_bytes(b"\x89PNG nothing")
    assert "00.png: cannot be read as an image" in said(asked(folder, samples=7))
    packed = tiny_dit.folder("FluxTransformer2DModel", tmp_path / "flux", "FlowMatchEulerDiscreteScheduler")
    assert "takes latents as packed, not as images" in said(asked(folder, samples=4), packed)
    latent = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "latent", "DDIMScheduler")
    assert "no autoencoder lies beside it" in said(asked(folder, samples=4), latent)
    bare = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "bare")
    assert "noise is added by a scheduler" in said(asked(folder, samples=4), bare)
