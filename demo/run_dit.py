"""Diffusion transformers on the embedded model: 4, 3 and 2 bits, judged by what they draw from the same noise.

    make demo-dit

Needs no network and no GPU. The model was trained by `demo/train_dit.py` on the handwritten digits inside scikit-learn;
calibration follows its own trajectories, so no data are needed. Checkpoints, a table, the contact sheet and the error
of each timestep go to `demo/out-dit`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin: the matrices are small

from rich.console import Console

import quant
from quant.display import Display
from quant.eval.draw import Rule
from quant.eval.gallery import judge_images
from quant.eval.hang import markdown, picture_table
from quant.eval.judge import open_judge
from quant.eval.sheet import plot_steps, sheet
from quant.recipe import with_spec

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "dit")
    parser.add_argument("--judge", help="see quant.eval.judge; judge.safetensors in the model's folder without")
    parser.add_argument("--out", type=Path, default=HERE / "out-dit")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()
    console = Console()
    began = time.perf_counter()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    model = os.path.relpath(args.model)
    seconds = {}
    for bits in args.bits:
        for name in ("rtn", "gptq", "balanced") if bits <= 3 else ("rtn", "gptq"):
            group_size = None if name == "balanced" else args.group_size
            recipe = with_spec(quant.load_recipe(name), bits=bits, group_size=group_size)
            out = args.out / f"{name}-{bits}bit"
            with Display(console) as shown:
                result = quant.quantize(model, out, recipe, progress=shown)
            seconds[out.name] = result.report["seconds"]
    judge = args.judge or args.model / "judge.safetensors"
    hung = judge_images(
        [args.out / name for name in seconds],
        against=args.model,
        # all at once: a packed weight is unpacked once a step, not once for each batch of a step
        rule=Rule(images=args.images, steps=args.steps, guidance=args.guidance, batch=args.images),
        judge=open_judge(judge),
    )
    console.print(picture_table(hung, console.width))
    sheet(hung.rows, args.out / "sheet.png")
    plot_steps(hung.pictures, args.out / "timesteps.png")
    made = "; ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    text = f"{markdown(hung)}\n`make demo-dit`: quantized in {made}; {time.perf_counter() - began:.0f} s in all.\n"
    (args.out / "results.md").write_text(text, encoding="utf-8")
    shown = [hung.original, *hung.pictures] if hung.original else hung.pictures
    figures = [{**picture.to_dict(), "quantized_in": seconds.get(picture.model)} for picture in shown]
    (args.out / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(f"wrote {args.out}: results.md, results.json, sheet.png, timesteps.png", soft_wrap=True)


if __name__ == "__main__":
    main()
