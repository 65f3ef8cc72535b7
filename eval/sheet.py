"""Pictures of the comparison: a contact sheet, original above quantized, and the error of every timestep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from quant.errors import ResourceError, SettingsError
from quant.eval.picture import Picture
from quant.eval.plot import blank, save

_SIDE, _GAP, _LINE = 64, 4, 16  # pixels: the least side of an image, the space between, a line of text
_BANDS = 2


def sheet(rows: Sequence[tuple[str, torch.Tensor]], path: Path, columns: int = 10) -> None:
    """Draws one row per model (name, images `[N, C, H, W]` in [0, 1]), the same seed below itself, in two bands.

    Raises:
        ResourceError: the file cannot be written; `SettingsError` for a name of no picture.
    """
    count = min(len(images) for _, images in rows)
    columns = max(1, min(columns, count))
    bands = min(_BANDS, -(-count // columns))
    high, wide = rows[0][1].shape[-2:]
    scale = max(1, -(-_SIDE // min(high, wide)))
    high, wide = high * scale, wide * scale
    font = ImageFont.load_default()
    left = max(int(font.getlength(name)) for name, _ in rows) + 2 * _GAP
    tall = len(rows) * (high + _GAP) + _LINE
    canvas = Image.new("RGB", (left + columns * (wide + _GAP), bands * tall), "white")
    draw = ImageDraw.Draw(canvas)
    for band in range(bands):
        for row, (name, images) in enumerate(rows):
            y = band * tall + row * (high + _GAP)
            draw.text((_GAP, y + high // 2 - _LINE // 2), name, fill="black", font=font)
            for column in range(min(columns, count - band * columns)):
                x = left + column * (wide + _GAP)
                canvas.paste(_image(images[band * columns + column], scale), (x, y))
    try:
        canvas.save(path)
    except (OSError, ValueError) as error:  # ValueError: an ending Pillow does not know
        kind = ResourceError if isinstance(error, OSError) else SettingsError
        raise kind(f"sheet {path}: cannot be written ({error}).") from error


def _image(image: torch.Tensor, scale: int) -> Image.Image:
    """`[C, H, W]` in [0, 1] as a picture, every pixel a square: small images stay what they are."""
    grey = image.clamp(0, 1).mul(255).round().to(torch.uint8)
    grey = grey.expand(3, -1, -1) if grey.shape[0] == 1 else grey[:3]
    big = grey.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (big.shape[1], big.shape[0]), bytes(big.flatten().tolist()))


def plot_steps(pictures: Sequence[Picture], path: Path) -> None:
    """Draws the error of each timestep, a line per model: of the noise on the original's inputs, of the latents drawn.

    Raises:
        SettingsError: nothing was compared.
        ResourceError: the file cannot be written.
    """
    shown = [picture for picture in pictures if picture.steps]
    if not shown:
        raise SettingsError("the plot shows each timestep's error to the original; give --against ORIGINAL.")
    figure = blank(10, 4.5)
    alone, drawn = figure.subplots(1, 2)
    for picture in shown:
        times = [step.timestep for step in picture.steps]
        noise = [float("nan") if step.noise is None else step.noise for step in picture.steps]
        alone.plot(times, noise, marker=".", label=picture.model)
        drawn.plot(times, [step.latent for step in picture.steps], marker=".", label=picture.model)
    for axes, title in ((alone, "predicted noise, on the original's inputs"), (drawn, "latents, each on its own way")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("timestep (drawn from left to right)")
        axes.set_ylabel("squared error over the original's square")
        axes.invert_xaxis()
        if any(value > 0 for line in axes.lines for value in line.get_ydata()):
            axes.set_yscale("log")
        axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    drawn.legend(fontsize=8)
    settings = shown[0].settings
    figure.suptitle(f"{settings.traced} images, {settings.said}", fontsize=9)
    save(figure, path)
