"""Two bits, ingredient by ingredient, and the recipes beside the best of any library on the same windows.

    python benchmarks/two_bits.py --data DIR

Models, texts and rule are those of quality.py. Each row is a whole run of `quantize` and a whole evaluation of the
checkpoint that it wrote. The best peer of a row is the one of least perplexity among all in peers.csv, llama.cpp and
libraries that train included, with the same nominal bits and at most a third of a bit more than that on disk.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import quality
import record

import quant
from quant.eval.evaluate import evaluate
from quant.eval.subject import open_subject
from quant.kernels.spec import Rotated, Trellis
from quant.recipe import Recipe, override, with_spec
from quant.recovery.tuning import BlockTuning
from quant.solvers.feedback import Feedback

TRELLIS = Recipe(spec=Trellis(), solver=Feedback(sweeps=0))
STEPS: dict[str, Recipe] = {
    "uniform grid, groups of 64": with_spec(quant.load_recipe("gptq"), bits=2, group_size=64),
    "trellis": TRELLIS,
    "+ descent": replace(TRELLIS, solver=Feedback()),
    "+ rotation": replace(TRELLIS, solver=Feedback(), spec=Rotated()),
    "+ float path's outputs (balanced)": quant.load_recipe("balanced"),
    "+ block tuning of scales": replace(
        override(quant.load_recipe("balanced"), ["calibration.batch_size=2"]), recovery=BlockTuning()
    ),
    "+ window 14, 4 sweeps (best)": quant.load_recipe("best"),
    "uniform grid, learned rounding": replace(
        with_spec(quant.load_recipe("rounding"), bits=2, group_size=64), recovery=BlockTuning(codes=3, scales=0.005)
    ),
}
SHOWN = ("what", "bits", "bits on disk", "ppl", "gap", "seconds", "best peer", "peer's bits", "peer's gap", "ratio")


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(quality.MODELS), choices=list(quality.MODELS))
    parser.add_argument("--without", nargs="+", default=[], help="rows to leave out, by a part of their name")
    args = parser.parse_args()
    parts, notes = [], []
    for name in args.models:
        found = record.present(args.data, f"models/{name}", quality.CALIBRATION, quality.TEST)
        if found is None:
            continue
        model, calibration, test = found
        original = open_subject(model)
        alone = evaluate(original, text=test).perplexity
        assert alone is not None
        rows: list[dict[str, Any]] = []
        for what, recipe, bits in wanted(args.without):
            made = override(recipe, [f'calibration.text="{calibration}"'])
            row = quality.measure(model, made, test)
            best = rival(name, int(bits))
            gap = math.log(row["ppl"] / alone.token)
            row |= {"what": what, "bits": bits, "gap": gap}
            row |= {"best peer": f"{best['library']} {best['method']}", "peer's bits": best["bpw"]}
            row |= {"peer's gap": best["gap"], "ratio": gap / best["gap"]}
            rows.append(row)
            print(record.table([row], SHOWN).splitlines()[-1], flush=True)
        parts.append((f"{name} (float {alone.token:.3f})", rows, SHOWN))
        digest = quality.check_windows(made.calibration, original)
        notes.append(f"{name}: {alone.windows} test windows, {alone.tokens:,} predictions; windows {digest[:16]}.")
    if parts:
        notes += [
            "gap: ln(ppl / ppl float). ratio: to the best peer's gap. seconds: the whole run.",
            "best peer: any library in peers.csv, trained ones included, same nominal bits, at most 1/3 bit more.",
        ]
        record.save(args.results, "two_bits", "Two bits, ingredient by ingredient", parts, notes)


def wanted(without: list[str]) -> list[tuple[str, Recipe, float]]:
    rows = [(what, recipe, 2.0) for what, recipe in STEPS.items()]
    rows += [("fast", quant.load_recipe("fast"), 2.0)]
    rows += [("balanced", replace(quant.load_recipe("balanced"), average=2.33), 2.33)]
    rows += [("balanced", with_spec(quant.load_recipe("balanced"), bits=bits), float(bits)) for bits in (3, 4)]
    rows += [("uniform grid, learned rounding", with_spec(quant.load_recipe("rounding"), bits=3, group_size=64), 3.0)]
    return [row for row in rows if not any(part in row[0] for part in without)]


def rival(model: str, bits: int) -> dict[str, Any]:
    able = [
        row
        for row in quality.read_peers()
        if row["model"] == model and row["bits"] == bits and row["bpw"] <= bits + 1 / 3
    ]
    return min(able, key=lambda row: row["ppl"])


if __name__ == "__main__":
    main()
