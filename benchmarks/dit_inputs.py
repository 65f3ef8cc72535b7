"""A diffusion transformer's rounded inputs, smoothing and low-rank branches: what each costs and gains in the image.

    python benchmarks/dit_inputs.py [MODEL] [--judge JUDGE]

MODEL: a folder that quant-eval draws class by class (`demo/dit` without it). All rows are GPTQ on uniform grids with
the calibration of the recipes that ship, and are drawn from packed checkpoints as `quant.load` opens them: where inputs
are rounded (A8), integers are summed. Modulations keep at least four bits and inputs as they are.
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

SHOWN = ("what", "bits", "PSNR", "pooled", "SSIM", "right", "layer error", "seconds")


def main() -> None:
    args = arguments()
    judge = open_judge(args.judge or args.model / "judge.safetensors")
    rule = Rule(images=args.images, steps=args.steps, batch=args.images)
    parts: list[tuple[str, list[dict[str, Any]], tuple[str, ...]]] = []
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        for heading, specs in tables(args).items():
            rows: list[dict[str, Any]] = []
            for number, (what, spec) in enumerate(specs.items()):
                recipe = replace(quant.load_recipe("gptq"), spec=spec)
                out = Path(folder) / f"{heading}-{number}".replace(" ", "-")
                result = quant.quantize(str(args.model), out, recipe)
                errors = [site["error"] for site in result.report["sites"]]
                row = {"what": what, "spec": spec.to_dict(), "bits": result.written.measured_bits}
                row |= {"layer error": sum(errors) / len(errors), "seconds": result.report["seconds"], "out": out}
                rows.append(row)
            hung = judge_images([row.pop("out") for row in rows], against=args.model, rule=rule, judge=judge)
            for row, picture in zip(rows, hung.pictures, strict=True):
                row |= {"PSNR": picture.psnr, "pooled": picture.psnr_pooled, "SSIM": picture.ssim}
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
    name = f"dit_inputs_{args.model.resolve().name}"
    record.save(args.results, name, f"Rounded inputs and smoothing, {args.model.resolve().name}", parts, notes)


def tables(args: Namespace) -> dict[str, dict[str, Spec]]:
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
    return found


def arguments() -> Namespace:
    parser = record.parser(__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=record.ROOT / "demo" / "dit")
    parser.add_argument("--judge", help="see quant.eval.judge; judge.safetensors in the model's folder without")
    parser.add_argument("--rounded", type=int, nargs="*", default=[4, 8], help="bits of weights whose inputs have 8")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], help="bits of low-rank rows")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=2, help="costs about what groups half as wide cost")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=25)
    return parser.parse_args()


if __name__ == "__main__":
    main()
