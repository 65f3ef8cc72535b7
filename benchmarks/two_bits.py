"""Two bits, ingredient by ingredient, and the recipes beside the best of any library on the same windows.

    python benchmarks/two_bits.py --data DIR

Models, texts and rule are those of quality.py. Each row is a whole run of `quantize` and a whole evaluation of the
checkpoint that it wrote. The best peer of a row is the one of least perplexity among all in peers.csv, llama.cpp and
libraries that train included, with the same nominal bits and at most a third of a bit more than that on disk.
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import quality
import record

import quant
from quant.calibration.importance import Attention
from quant.errors import SettingsError
from quant.eval.evaluate import evaluate
from quant.eval.subject import open_subject
from quant.kernels.spec import Binary, Codebook, LowRank, Rotated, Smoothed, Trellis
from quant.models.folding import Folding
from quant.recipe import Recipe, override, with_spec
from quant.recovery.distillation import Distillation
from quant.recovery.tuning import BlockTuning
from quant.solvers.feedback import Feedback

TRELLIS = Recipe(spec=Trellis(), solver=Feedback(sweeps=0))
BALANCED = quant.load_recipe("balanced")
ROUNDING = quant.load_recipe("rounding")
FEW = ["calibration.batch_size=4"]  # windows in a step of tuning
STEPS: dict[str, Recipe] = {
    "uniform grid, groups of 64": with_spec(quant.load_recipe("gptq"), bits=2, group_size=64),
    "codebooks of vectors (VPTQ)": Recipe(spec=Codebook(bits=2), solver=Feedback()),
    "trellis": TRELLIS,
    "+ descent": replace(TRELLIS, solver=Feedback()),
    "+ rotation": replace(TRELLIS, solver=Feedback(), spec=Rotated()),
    "+ float path's outputs (balanced)": BALANCED,
    "balanced with pairs of values, table of 64 (HYB)": replace(
        BALANCED, spec=Rotated(Trellis(code="hyb", table_bits=6))
    ),
    "balanced + rotations folded between linears": replace(BALANCED, folding=Folding(stream=False)),
    "balanced + rotations folded into the stream too": replace(BALANCED, folding=Folding(untie=True)),
    "balanced + those in place of rotations at run time": replace(BALANCED, folding=Folding(untie=True, online=False)),
    "balanced + token importance (RSQ)": replace(BALANCED, importance=Attention()),
    "balanced + low-rank branch of rank 4 (EoRA)": replace(BALANCED, spec=LowRank(Rotated(), rank=4)),
    "balanced + block tuning of codes and scales": replace(
        override(BALANCED, ["calibration.batch_size=2"]), recovery=BlockTuning()
    ),
    "balanced + end-to-end tuning of scales": replace(override(BALANCED, FEW), distillation=Distillation()),
    "+ of codes (best)": quant.load_recipe("best"),
    "balanced + factors of inputs, end-to-end tuning of scales and factors": replace(
        override(BALANCED, FEW), spec=Smoothed(Rotated()), distillation=Distillation()
    ),
    "codebooks of vectors + end-to-end tuning of entries and indices": replace(
        quant.load_recipe("best"), spec=Codebook(bits=2)
    ),
    "balanced + block tuning of scales": replace(
        override(BALANCED, ["calibration.batch_size=2"]), recovery=BlockTuning(codes=0)
    ),
    "balanced + block tuning of scales, saliency 0.1 (ULB-SAPR)": replace(
        override(BALANCED, ["calibration.batch_size=2"]), recovery=BlockTuning(codes=0, saliency=0.1)
    ),
    "fast": quant.load_recipe("fast"),
    "uniform grid + block tuning of codes": replace(
        with_spec(override(ROUNDING, ["calibration.batch_size=2"]), bits=2, group_size=64),
        recovery=BlockTuning(codes=3, scales=0.005), distillation=None,
    ),
    "uniform grid + end-to-end tuning of codes": with_spec(ROUNDING, bits=2, group_size=64),
}  # fmt: skip
SHOWN = (
    "what", "bits", "bits on disk", "ppl", "gap", "KL", "KL elsewhere", "seconds", "cpu seconds",
    "cpu s per 1e6 weights", "peak MiB", "rotated", "best peer", "peer's bits", "peer's gap", "ratio",
)  # fmt: skip


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(quality.MODELS), choices=list(quality.MODELS))
    parser.add_argument("--only", nargs="+", default=[], help="rows to measure, by a part of their name and bits")
    args = parser.parse_args()
    parts, notes = [], []
    for name in args.models:
        found = record.present(args.data, f"models/{name}", quality.CALIBRATION, quality.TEST, quality.OTHER)
        if found is None:
            continue
        model, calibration, test, other = found
        original = open_subject(model)
        whole = evaluate(original, text=test).perplexity
        assert whole is not None
        rows: list[dict[str, Any]] = []
        for what, recipe, bits in wanted(args.only):
            made = override(recipe, [f'calibration.text="{calibration}"'])
            try:
                row = alone(model, made, test, other)
            except SettingsError as error:  # signs have no room on matrices this small
                notes.append(f"{name}: no row {what!r}: {error}.")
                continue
            best = rival(name, max(2, int(bits)))
            gap = math.log(row["ppl"] / whole.token)
            row |= {"what": what, "bits": bits, "gap": gap}
            row |= {"best peer": f"{best['library']} {best['method']}", "peer's bits": best["bpw"]}
            row |= {"peer's gap": best["gap"], "ratio": gap / best["gap"]}
            rows.append(row)
            print(record.table([row], SHOWN).splitlines()[-1], flush=True)
            with redirect_stdout(StringIO()):  # kept row by row: the whole takes hours
                write(args.results, [*parts, (f"{name} (float {whole.token:.3f})", rows, SHOWN)], [*notes])
        parts.append((f"{name} (float {whole.token:.3f})", rows, SHOWN))
        digest = quality.check_windows(made.calibration, original)
        notes.append(f"{name}: {whole.windows} test windows, {whole.tokens:,} predictions; windows {digest[:16]}.")
    if parts:
        write(args.results, parts, notes)


def write(folder: Path, parts: list[Any], notes: list[str]) -> None:
    notes = [
        *notes,
        "gap: ln(ppl / ppl float). ratio: to the best peer's gap.",
        f"KL(float model || quantized), nats per token: of the test text, and elsewhere, of the first "
        f"{quality.OTHER_WINDOWS} windows of {quality.OTHER}.",
        "rotated: matrices whose inputs are rotated at run time.",
        "seconds, cpu seconds (all threads), peak MiB: the whole run, in a process of its own.",
        "best peer: any library in peers.csv, trained ones included, same nominal bits, at most 1/3 bit more.",
    ]
    record.save(folder, "two_bits", "Two bits, ingredient by ingredient", parts, notes)


def wanted(only: list[str]) -> list[tuple[str, Recipe, float]]:
    rows = [(what, recipe, 2.0) for what, recipe in STEPS.items()]
    rows += [("signs and salient columns (PTQ1.61)", Recipe(spec=Binary()), 1.61)]
    rows += [("balanced", replace(with_spec(BALANCED, bits=int(b)), average=b), b) for b in (1.61, 2.33, 3.29)]
    for name in ("balanced", "best"):
        rows += [(name, with_spec(quant.load_recipe(name), bits=bits), float(bits)) for bits in (3, 4)]
    for bits in (3, 4):  # a symmetric grid of 64 has fewer bits on disk than AutoRound's 3.297 and 4.312
        learned = with_spec(ROUNDING, bits=bits, group_size=64, symmetric=True)
        rows += [("symmetric uniform grid + end-to-end tuning of codes", learned, float(bits))]
    return [row for row in rows if not only or any(part in f"{row[0]} {row[2]:g}" for part in only)]


def alone(model: Path, recipe: Recipe, test: Path, other: Path) -> dict[str, Any]:
    """The measurement in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(quality.measure, model, recipe, test, other).result()


def rival(model: str, bits: int) -> dict[str, Any]:
    able = [
        row
        for row in quality.read_peers()
        if row["model"] == model and row["bits"] == bits and row["bpw"] <= bits + 1 / 3
    ]
    return min(able, key=lambda row: row["ppl"])


if __name__ == "__main__":
    main()
