"""A diffusion transformer's rounded inputs, smoothing, branches, mixed precision: what each gains in the image.

    python benchmarks/dit_inputs.py [MODEL] [--judge JUDGE]
    python benchmarks/dit_inputs.py [MODEL] --mixed    # mixed precision, weighted timesteps and end-to-end tuning alone

MODEL: a folder that quant-eval draws class by class (`demo/dit` without it). Rows without a recipe's name are GPTQ on
uniform grids with the calibration of the recipes that ship. All are drawn from packed checkpoints as `quant.load` opens
them: where inputs are rounded (A8), integers are summed. Unless a row says "alike" or "by the error", modulations keep
at least four bits and inputs as they are.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import record

import quant
from quant.eval.draw import Rule
from quant.eval.gallery import judge_images
from quant.eval.hang import title
from quant.eval.judge import open_judge
from quant.kernels.spec import LowRank, Rotated, Smoothed, Spec, Uniform
from quant.recipe import Recipe, override, with_spec

SHOWN = ("what", "bits", "PSNR", "pooled", "worst", "SSIM", "right", "layer error", "seconds")


def main() -> None:
    args = arguments()
    judge = open_judge(args.judge or args.model / "judge.safetensors")
    rule = Rule(images=args.images, steps=args.steps, batch=args.images)
    parts: list[tuple[str, list[dict[str, Any]], tuple[str, ...]]] = []
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        for heading, recipes in (mixed(args) if args.mixed else tables(args)).items():
            rows: list[dict[str, Any]] = []
            for number, (what, recipe) in enumerate(recipes.items()):
                out = Path(folder) / f"{heading}-{number}".replace(" ", "-")
                result = quant.quantize(str(args.model), out, recipe)
                errors = [site["error"] for site in result.report["sites"]]
                row = {"what": what, "recipe": recipe.to_dict(), "bits": result.written.measured_bits}
                row |= {"layer error": sum(errors) / len(errors), "seconds": result.report["seconds"], "out": out}
                rows.append(row)
            hung = judge_images([row.pop("out") for row in rows], against=args.model, rule=rule, judge=judge)
            for row, picture in zip(rows, hung.pictures, strict=True):
                row |= {"PSNR": picture.psnr, "pooled": picture.psnr_pooled, "SSIM": picture.ssim}
                row["worst"] = picture.psnr_worst
                row["right"] = picture.accuracy
            parts.append((heading, rows, SHOWN))
            print(record.table(rows, SHOWN), flush=True)
            said = f"{title(hung)}."
    notes = [
        said,
        "bits: measured on disk, per weight of the quantized linears. PSNR: mean over images, in dB; pooled: of the "
        "mean squared error. layer error: mean over linears of the output's lost energy on the calibration inputs, "
        "rounding of inputs included.",
    ]
    kind, said = ("mixed", "Mixed precision") if args.mixed else ("inputs", "Rounded inputs and smoothing")
    name = args.model.resolve().name
    record.save(args.results, f"dit_{kind}_{name}", f"{said}, {name}", parts, notes)


def mixed(args: Namespace) -> dict[str, dict[str, Recipe]]:
    """By what an error of each linear costs, at the bits of the recipes without; the time-embedding's layers too."""
    found: dict[str, Recipe] = {}
    for bits, average in ((3, 3.309), (2, 2.724)):
        grid = with_spec(quant.load_recipe("gptq"), bits=bits, group_size=args.group_size)
        alike, narrow = replace(grid, modulation_bits=1), with_spec(grid, bits=2)
        image = replace(alike, trajectory=replace(alike.trajectory, weighting="image"))
        found |= {f"{bits} bits alike": alike, f"{bits} bits alike, timesteps by their effect": image}
        for sensitivity in ("output", "image"):
            made = replace(narrow, average=average, sensitivity=sensitivity)
            found[f"{average} bits by the {sensitivity}'s error"] = made
    best = with_spec(quant.load_recipe("best"), bits=2)
    found["balanced, 2 bits"] = with_spec(quant.load_recipe("balanced"), bits=2)
    found["best, 2 bits"] = best
    found["best, 2 bits, modulations alone (QuEST)"] = override(best, ['distillation.only=["*norm1.linear*"]'])
    return {"mixed precision, timesteps, tuning": found}


def tables(args: Namespace) -> dict[str, dict[str, Recipe]]:
    """The rows of each table."""
    found: dict[str, dict[str, Spec]] = {}
    for bits in args.rounded:
        plain, eight = Uniform(bits, args.group_size), Uniform(bits, args.group_size, activations=8)
        found[f"W{bits}A8"] = {
            f"W{bits}A16": plain,
            f"W{bits}A8": eight,
            f"W{bits}A8, smoothed": Smoothed(eight),
            f"W{bits}A8, rotated where better": Rotated(eight),
        }
    for bits in args.bits:
        base, rank = Uniform(bits, args.group_size), args.rank
        found[f"{bits} bits, low rank"] = {
            f"GPTQ, groups of {args.group_size}": base,
            f"GPTQ, groups of {args.group_size // 2}": Uniform(bits, args.group_size // 2),
            "smoothed": Smoothed(base),
            f"branch of rank {rank}": LowRank(base, rank),
            f"smoothed with a branch of rank {rank} (SVDQuant)": Smoothed(LowRank(base, rank)),
        }
    gptq = quant.load_recipe("gptq")
    return {heading: {what: replace(gptq, spec=spec) for what, spec in some.items()} for heading, some in found.items()}


def arguments() -> Namespace:
    parser = record.parser(__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=record.ROOT / "demo" / "dit")
    parser.add_argument("--judge", help="see quant.eval.judge; judge.safetensors in the model's folder without")
    parser.add_argument("--rounded", type=int, nargs="*", default=[4, 8], help="bits of weights whose inputs have 8")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], help="bits of low-rank rows")
    parser.add_argument("--mixed", action="store_true", help="mixed precision, weighted timesteps and tuning instead")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=2, help="costs about what groups half as wide cost")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=25)
    return parser.parse_args()


if __name__ == "__main__":
    main()
