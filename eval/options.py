"""What `quant-eval` can be told: the options of one command for language models and diffusion transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

_DRAWN = "Diffusion transformers"

Models = Annotated[list[str], Argument(metavar="MODEL...", help="Folders or hub names; packed or not.")]
Against = Annotated[
    str | None,
    Option(metavar="ORIGINAL", help="The original: adds KL divergence, agreement, cosines; PSNR, SSIM of images."),
]
TextName = Annotated[
    str,
    Option(
        metavar="NAME|FILE",
        help="python-docs or wikitext2 (:train and such for another split), or a file; for images one prompt a line.",
    ),
]
Window = Annotated[int | None, Option(help="Tokens per window.", show_default="min(512, model maximum)")]
Stride = Annotated[int | None, Option(help="Tokens from window to window.", show_default="non-overlapping")]
MaxWindows = Annotated[int | None, Option(help="At most so many windows (for encoders, lines).")]
Bos = Annotated[
    bool | None, Option(help="Begin windows with the token that begins a text.", show_default="if needed, as by Gemma")
]
Device = Annotated[str, Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, Option(help="float32, bfloat16, float16, or auto: the checkpoint's own.")]
Prompts = Annotated[int, Option(help="How many prompts from the text to continue greedily.", min=1)]
NoGenerate = Annotated[bool, Option("--no-generate", help="Continue no prompts.")]
Images = Annotated[int, Option(help="Images to draw, each from a seed of its own.", min=1, rich_help_panel=_DRAWN)]
Steps = Annotated[int, Option(help="Steps of the pipeline's own scheduler.", min=1, rich_help_panel=_DRAWN)]
Guidance = Annotated[float, Option(help="Classifier-free guidance; 1 is none.", rich_help_panel=_DRAWN)]
Seed = Annotated[int, Option(help="Of the first image; the others count up.", min=0, max=2**63, rich_help_panel=_DRAWN)]
Batch = Annotated[int, Option(help="Images drawn at a time.", min=1, rich_help_panel=_DRAWN)]
JudgeFile = Annotated[
    str | None,
    Option(
        "--judge",
        metavar="FILE|FOLDER",
        help="An image classifier: accuracy, Fréchet distance, precision, recall. FILE.safetensors[:LAYERS], a folder "
        "of transformers, torchvision:NAME:FILE, timm:NAME:FILE.",
        rich_help_panel=_DRAWN,
    ),
]
Real = Annotated[
    Path | None,
    Option(
        metavar="FOLDER|FILE",
        help="Real images to compare features with: a folder of pictures, or `images` [M, C, H, W] in a safetensors.",
        show_default="the original's samples",
        rich_help_panel=_DRAWN,
    ),
]
Clip = Annotated[
    Path | None, Option(metavar="FOLDER", help="A CLIP model: how well images fit prompts.", rich_help_panel=_DRAWN)
]
Reward = Annotated[
    Path | None,
    Option(metavar="FOLDER", help="ImageReward: how people would rate images for prompts.", rich_help_panel=_DRAWN),
]
Lpips = Annotated[
    Path | None, Option(metavar="FILE.safetensors", help="LPIPS weights: adds that distance.", rich_help_panel=_DRAWN)
]
Sheet = Annotated[
    Path | None, Option(metavar="FILE.png", help="Contact sheet, original above quantized.", rich_help_panel=_DRAWN)
]
Json = Annotated[str | None, Option("--json", metavar="FILE|-", help="All figures and settings; - is stdout.")]
Plot = Annotated[
    Path | None, Option("--plot", metavar="FILE.png", help="Size against perplexity; for images each timestep's error.")
]
Card = Annotated[bool, Option("--card", help="Put the figures into each packed checkpoint's README.md.")]
Quiet = Annotated[bool, Option("--quiet", help="Print the table alone: no progress, no continuations.")]
