"""`quant-eval` on diffusion transformers: opens what its options name, draws, writes table, sheet, plot and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from quant.errors import SettingsError
from quant.eval.draw import Rule
from quant.eval.gallery import judge_images
from quant.eval.hang import picture_table
from quant.eval.judge import open_judge
from quant.eval.lpips import open_lpips
from quant.eval.painter import Painter, open_painter
from quant.eval.picture import Hung
from quant.eval.report import write_json
from quant.eval.sheet import plot_steps, sheet
from quant.eval.table import bars, console_for

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Showing:
    """What beside the models and the rule was asked for; see `quant.eval.options`."""

    text: str
    judge: str | None
    real: Path | None
    clip: Path | None
    reward: Path | None
    lpips: Path | None
    sheet: Path | None
    plot: Path | None
    json: str | None
    device: str
    dtype: str
    card: bool
    quiet: bool


def show(models: Sequence[str], against: str | None, rule: dict[str, Any], showing: Showing) -> None:
    """Judges the models by what they draw, and prints and writes what was asked for.

    Raises:
        BitwrightError: as `judge_images`.
    """
    if showing.card:
        raise SettingsError("--card: a model card takes the figures of language models; keep these with --json.")
    device, dtype = showing.device, "float32" if showing.dtype == "auto" else showing.dtype
    original = None if against is None else open_painter(against, device, dtype)
    painters = [open_painter(name, device, dtype, original=original) for name in models]
    wants = any(painter.pipeline is not None for painter in painters)
    made = Rule(**rule, prompts=prompts_of(showing.text) if wants else ())
    hung = _judged(painters, original, made, showing)
    out = console_for(stderr=showing.json == "-")
    if showing.json:
        first = None if hung.original is None else hung.original.to_dict()
        write_json(showing.json, {"original": first, "models": [picture.to_dict() for picture in hung.pictures]})
    out.print(picture_table(hung, out.width))
    if showing.sheet:
        classes = painters[0].classes
        sheet(hung.rows, showing.sheet, columns=classes if 1 < classes <= 16 else 10)
        out.print(f"contact sheet: {showing.sheet}", soft_wrap=True)
    if showing.plot:
        plot_steps(hung.pictures, showing.plot)
        out.print(f"plot: {showing.plot}", soft_wrap=True)


def _judged(painters: Sequence[Painter], original: Painter | None, rule: Rule, showing: Showing) -> Hung:
    clip = reward = None
    if showing.clip:
        from quant.eval.clip import open_clip  # transformers' CLIP is read only when asked for

        clip = open_clip(showing.clip)
    if showing.reward:
        from quant.eval.reward import open_reward  # and so is its BLIP

        reward = open_reward(showing.reward)
    with bars(showing.quiet) as bar:
        return judge_images(
            painters,
            against=original,
            rule=rule,
            judge=open_judge(showing.judge) if showing.judge else None,
            real=real_images(showing.real) if showing.real else None,
            clip=clip,
            reward=reward,
            distances={"LPIPS": open_lpips(showing.lpips)} if showing.lpips else None,
            device=showing.device,
            progress=bar,
        )


def prompts_of(name: str) -> tuple[str, ...]:
    """The lines of a prompt file.

    Raises:
        SettingsError: no such file, or nothing in it.
    """
    try:
        lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--text {name}: this model draws for prompts; give a UTF-8 text file with one in each line."
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise SettingsError(f"--text {name}: no prompt in it; write one in each line.")
    return prompts


def real_images(path: Path) -> torch.Tensor:
    """Real images `[M, C, H, W]` float32 in [0, 1]: the pictures of a folder in order of their names, or a tensor
    `images` of a safetensors file (uint8 is divided by 255).

    Raises:
        SettingsError: nothing there, or pictures of different sizes.
    """
    if path.is_file():
        try:
            images = load_file(path)["images"]
        except (SafetensorError, KeyError) as error:
            raise SettingsError(f"--real {path}: not a safetensors file with a tensor `images`.") from error
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()
    files = sorted(file for file in path.glob("*") if file.suffix.lower() in _PICTURES)
    if not files:
        raise SettingsError(f"--real {path}: no pictures there ({', '.join(_PICTURES)}).")
    read = [_read(file) for file in files]
    sizes = {tuple(image.shape) for image in read}
    if len(sizes) > 1:
        raise SettingsError(f"--real {path}: pictures of {len(sizes)} sizes; make them one size.")
    return torch.stack(read)


def _read(file: Path) -> torch.Tensor:
    try:
        with Image.open(file) as image:
            picture = image.convert("RGB")
    except OSError as error:
        raise SettingsError(f"--real {file}: cannot be read as a picture ({error}).") from error
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255
