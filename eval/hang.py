"""The figures of diffusion transformers as a table, one row per model, what they depend on above it."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group

from quant.eval.columns import Column, filled, some, tables
from quant.eval.picture import Hung, Picture

_COLUMNS = (
    Column("MB", lambda p: some(p.size.bytes, ",.2f", 1e6), "weight files, 10^6 bytes"),
    Column("bits", lambda p: some(p.size.linear_bits, ".3f"), "per weight of the quantized linears, measured"),
    Column("PSNR", lambda p: some(p.psnr, ".2f"), "dB to the original's image of the same seed, mean"),
    Column("pooled", lambda p: some(p.psnr_pooled, ".2f"), "dB of the mean squared error"),
    Column("worst", lambda p: some(p.psnr_worst, ".2f"), "dB of the worst image"),
    Column("SSIM", lambda p: some(p.ssim, ".4f"), "to the original's image, mean"),
    Column("cos", lambda p: some(p.cosine, ".5f"), "of the final latents"),
    Column("Fréchet", lambda p: some(p.frechet, ".3f"), "distance of the judge's features"),
    Column("prec.", lambda p: some(p.precision, ".3f"), "share of samples among the others'"),
    Column("recall", lambda p: some(p.recall, ".3f"), "share of the others' among the samples"),
    Column("right", lambda p: some(p.accuracy, ".1%"), "judged as the class asked for"),
    Column("CLIP", lambda p: some(p.clip, ".2f"), "100 cos(image, prompt)"),
    Column("reward", lambda p: some(p.reward, ".3f"), "ImageReward of image and prompt, mean"),
    Column("s/image", lambda p: some(p.seconds, ".3g"), "drawn a batch at a time"),
    Column("RAM MB", lambda p: some(p.memory.rise, ",.0f", 1e6), "rise while drawing"),
)


def picture_table(hung: Hung, width: int) -> Group:
    """One row per model, the original first. A column that nobody fills is left out; what does not fit continues in a
    table below."""
    names = dict.fromkeys(name for picture in hung.shown for name in picture.distances)
    named = [Column(name, _distance(name), "to the original's image, mean") for name in names]
    return tables(title(hung), hung.shown, [*_COLUMNS, *named], width)


def title(hung: Hung) -> str:
    """What every figure of the table depends on."""
    first = hung.pictures[0]
    settings = first.settings
    against = f"against {first.against}" if first.against else "no original"
    judged = f", judge {settings.judge}, features against {settings.real}" if settings.judge else ""
    host = settings.machine.gpu if "cuda" in settings.device else settings.machine.cpu
    return (
        f"{settings.images} images, {settings.said}, {against}{judged}; {settings.dtype} on {settings.device}, {host}, "
        f"{settings.machine.threads} threads"
    )


def markdown(hung: Hung) -> str:
    """The table for a report, the settings below it."""
    columns = filled(_COLUMNS, hung.shown)
    lines = ["| model | " + " | ".join(column.heading for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {picture.model} | " + " | ".join(column.cell(picture) or "-" for column in columns) + " |"
        for picture in hung.shown
    ]
    return "\n".join([*lines, "", f"{title(hung)}.", ""])


def _distance(name: str) -> Callable[[Picture], str]:
    return lambda picture: some(picture.distances.get(name), ".4f")
