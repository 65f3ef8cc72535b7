"""Diffusion transformers at 4, 3 and 2 bits beside other libraries: one sampler, one judge, the same linears.

    python benchmarks/dit.py MODEL [--judge JUDGE] [--python PYTHON] [--only PART ...]

MODEL: a folder that quant-eval draws class by class (`demo/dit` without it). The other libraries run in an environment
of their own, whose interpreter is PYTHON; nothing of bitwright is needed there:

    python3 -m venv peers
    peers/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 auto-round==0.16.1 optimum-quanto

All quantize the same linears, those that bitwright finds in the blocks, and see the same calibration inputs, those of
the recipes that ship. What comes out is put dequantized into the float transformer, so that all images come from the
same sampler and the same kernels. Bits are what each library stores for these linears, over their weights. The
modulations (adaLN) have the bits of the others in "all alike" and at least four in "modulations 4".
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import load_file, save_file

import quant
from quant.eval.draw import Rule
from quant.eval.gallery import judge_images
from quant.eval.hang import title
from quant.eval.judge import open_judge
from quant.eval.painter import Painter, open_painter
from quant.eval.picture import Picture
from quant.eval.sheet import sheet
from quant.prepare import Prepared, prepare
from quant.recipe import with_spec

PEERS = ("quanto max", "quanto hqq", "autoround rtn", "autoround", "autoround asym", "autoround algext")
GRIDS = ("rtn", "gptq", "gptq_float", "rounding")  # recipes whose groups are chosen here
PLAIN = {"codebook": "vq4dit"}  # without its recovery
LEAST = 4  # bits of modulations under the default of a recipe
SHOWN = ("what", "bits", "PSNR", "pooled", "worst", "SSIM", "Fréchet", "right", "seconds")


def main() -> None:
    args = arguments()
    rows: list[dict[str, Any]] = []
    painters: list[Painter] = []
    notes: list[str] = []
    versions: dict[str, str] = {}
    prepared = prepare(str(args.model), quant.load_recipe("gptq"))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        hand_over(prepared, place)
        for what, bits, raised in wanted(args):
            row: dict[str, Any] = {"what": what, "nominal": bits, "modulations raised": raised}
            try:
                if what in PEERS:
                    weights, found = theirs(row, args, prepared, place)
                    versions |= found.pop("versions")
                else:
                    weights, found = ours(row, args, place)
            except (quant.BitwrightError, RuntimeError) as error:
                notes.append(f"No row {what} of {bits} bits: {str(error).strip().splitlines()[-1]}")
                print(notes[-1], flush=True)
                continue
            painters.append(painter(args.model, weights, f"{what} {bits}{' raised' if raised else ''}"))
            rows.append(row | found)
            print(record.table(rows[-1:], ("what", "nominal", "modulations raised", "bits", "seconds")), flush=True)
    judge = open_judge(args.judge or args.model / "judge.safetensors")
    rule = Rule(images=args.images, steps=args.steps, batch=args.images)
    hung = judge_images(painters, against=args.model, rule=rule, judge=judge)
    assert hung.original is not None
    rows = [row | figures(picture) for row, picture in zip(rows, hung.pictures, strict=True)]
    first = {"what": "float", "right": hung.original.accuracy}
    parts = [
        (heading, [first, *some], SHOWN)
        for raised in (False, True)
        for bits in args.bits
        for heading in [f"{bits} bits, modulations {'at least ' + str(LEAST) if raised else 'alike'}"]
        if (some := [row for row in rows if row["nominal"] == bits and row["modulations raised"] == raised])
    ]
    if args.sheet:
        sheet(hung.rows, args.sheet)
    used = ", ".join(f"{package} {number}" for package, number in sorted(versions.items()))
    notes += [f"{title(hung)}.", f"Calibration: {prepared.samples.text}."]
    notes += [f"The other libraries ran with {used}."] if used else []
    notes.append(
        "bits: stored, per weight of the quantized linears. PSNR: mean, in dB; pooled: of the mean squared error."
    )
    save(args, parts, notes)


def arguments() -> Namespace:
    parser = record.parser(__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=record.ROOT / "demo" / "dit")
    parser.add_argument("--judge", help="see quant.eval.judge; judge.safetensors in the model's folder without")
    parser.add_argument("--python", help="interpreter with the other libraries; without it only bitwright runs")
    parser.add_argument("--recipes", nargs="*", default=["rtn", "gptq", "balanced"])
    parser.add_argument("--methods", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument(
        "--raised", type=int, nargs="*", default=[3, 2], help="bits also with modulations of at least 4"
    )
    parser.add_argument("--group-size", type=int, default=64, help="of grids; quanto has its own")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sheet", type=Path, help="PNG with the first images of all rows")
    parser.add_argument("--name", help="of the results; dit_ and the model's folder without")
    return parser.parse_args()


def wanted(args: Namespace) -> list[tuple[str, int, bool]]:
    """The rows: what, bits, whether modulations are raised to `LEAST`."""
    names = [*(args.methods if args.python else []), *args.recipes]
    return [
        (what, bits, raised)
        for raised in (False, True)
        for bits in args.bits
        if not raised or bits in args.raised
        for what in names
        if not (what.startswith("quanto") and bits == 3)
    ]


def hand_over(prepared: Prepared, place: Path) -> None:
    """The calibration inputs, row by row, for the other libraries."""
    batches = prepared.samples.batches
    save_file({key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}, place / "inputs.safetensors")


def ours(row: dict[str, Any], args: Namespace, place: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    group = args.group_size if row["what"] in GRIDS else None
    named = quant.load_recipe(PLAIN.get(row["what"], row["what"]))
    recipe = with_spec(
        replace(named, recovery=None) if row["what"] in PLAIN else named, bits=row["nominal"], group_size=group
    )
    recipe = replace(recipe, modulation_bits=LEAST if row["modulations raised"] else 1)
    out = place / "ours"
    result = quant.quantize(str(args.model), out, recipe, mode="restart")
    model = quant.load(out, dequantize=True)
    weights = {site["site"]: model.get_submodule(site["site"]).weight for site in result.report["sites"]}
    return weights, {"bits": result.written.measured_bits, "seconds": result.report["seconds"]}


def theirs(
    row: dict[str, Any], args: Namespace, prepared: Prepared, place: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    raised = row["modulations raised"]
    sites = prepared.walk.sites
    task = {
        "transformer": str(prepared.source.folder.resolve()),
        "class": type(prepared.skeleton.model).__name__,
        "method": row["what"],
        "group": args.group_size,
        "linears": {s.name: max(LEAST, row["nominal"]) if raised and s.modulation else row["nominal"] for s in sites},
    }
    (place / "task.json").write_text(json.dumps(task))
    record.run([args.python, str(Path(__file__).with_name("dit_peer.py")), str(place)])
    return load_file(place / "weights.safetensors"), json.loads((place / "done.json").read_text())


def painter(model: Path, weights: dict[str, torch.Tensor], name: str) -> Painter:
    """The float model with these weights in it."""
    made = replace(open_painter(model), name=name, folder=None)
    with torch.no_grad():
        for site, weight in weights.items():
            made.transformer.get_submodule(site).weight.copy_(weight)
    return made


def figures(picture: Picture) -> dict[str, Any]:
    return {
        "PSNR": picture.psnr,
        "pooled": picture.psnr_pooled,
        "worst": picture.psnr_worst,
        "SSIM": picture.ssim,
        "Fréchet": picture.frechet,
        "right": picture.accuracy,
    }


def save(args: Namespace, parts: list[Any], notes: list[str]) -> None:
    name = args.name or f"dit_{args.model.resolve().name}"
    record.save(args.results, name, f"Diffusion transformer {args.model.resolve().name}", parts, notes)


if __name__ == "__main__":
    main()
