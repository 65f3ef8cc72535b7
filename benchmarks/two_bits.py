"""Two bits, ingredient by ingredient, and the recipes beside the best of any library on the same windows.

    python benchmarks/two_bits.py --data DIR [--only "best 2" ...]
    python benchmarks/two_bits.py --page

Models, texts and rule are those of quality.py. Each row is a whole run of `quantize` and a whole evaluation of the
checkpoint that it wrote. All take hours: `--only` measures some of them again, and the others stay in the results as
they are, each with its own commit, machine and date. `--page` writes the tables of docs/two-bits.md from the results.
The best peer of a row is the one of least perplexity among all in peers.csv, llama.cpp and libraries that train
included, with the same nominal bits and at most a third of a bit more than that on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
from quant.calibration.settings import Calibration
from quant.errors import SettingsError
from quant.eval.evaluate import evaluate
from quant.eval.subject import open_subject
from quant.kernels.spec import Binary, Codebook, LowRank, Rotated, Smoothed, Trellis, Uniform
from quant.models.folding import Folding
from quant.recipe import Recipe, override, with_spec
from quant.recovery.distillation import Distillation
from quant.recovery.tuning import BlockTuning
from quant.solvers.feedback import Feedback

TRELLIS = Recipe(spec=Trellis(), solver=Feedback(sweeps=0))
BALANCED, BEST, ROUNDING = (quant.load_recipe(name) for name in ("balanced", "best", "rounding"))
EVEN = replace(BALANCED, mixed=False)
EACH = Rotated(Trellis(code="inst", window=12))  # a state for each weight, as `best` has
FEW = ["calibration.batch_size=4"]  # windows in a step of end-to-end tuning
BLOCKS = override(EVEN, ["calibration.batch_size=2"])  # and of block tuning
PAGE = record.ROOT / "docs" / "two-bits.md"


def steps() -> list[tuple[str, Recipe, float]]:
    """Every row: what it is, its recipe and its bits, in the order of the page."""
    rounded = override(ROUNDING, ["calibration.batch_size=2"])
    two = {
        "uniform grid, groups of 64": with_spec(quant.load_recipe("gptq"), bits=2, group_size=64),
        "codebooks of vectors (VPTQ)": Recipe(spec=Codebook(bits=2), solver=Feedback()),
        "trellis": TRELLIS,
        "+ descent": replace(TRELLIS, solver=Feedback()),
        "+ rotation": replace(TRELLIS, solver=Feedback(), spec=Rotated()),
        "+ float path's outputs": EVEN,
        "+ rows counted by what their errors cost": replace(BALANCED, widths=(), solver=Feedback(tries=0)),
        "+ and by what errors of two cost together": replace(BALANCED, widths=()),
        "+ bits where they count (balanced)": BALANCED,
        "balanced + end-to-end tuning of scales and codes (best)": BEST,
        "balanced, embedding and head at 8 bits": replace(BALANCED, embeddings=Uniform(bits=8)),
        "balanced, embedding and head at 4 bits": replace(BALANCED, embeddings=Uniform(bits=4, group_size=64)),
        "even bits + token importance (RSQ)": replace(EVEN, importance=Attention()),
        "even bits + low-rank branch of rank 4 (EoRA)": replace(EVEN, spec=LowRank(Rotated(), rank=4)),
        "even bits + block tuning of scales": replace(BLOCKS, recovery=BlockTuning(codes=0)),
        "even bits + block tuning of scales, saliency 0.1 (ULB-SAPR)": replace(
            BLOCKS, recovery=BlockTuning(codes=0, saliency=0.1)
        ),
        "even bits + block tuning of codes and scales": replace(BLOCKS, recovery=BlockTuning()),
        "even bits + end-to-end tuning of scales": replace(override(EVEN, FEW), distillation=Distillation()),
        "even bits + factors of inputs, end-to-end tuning of scales and factors": replace(
            override(EVEN, FEW), spec=Smoothed(Rotated()), distillation=Distillation()
        ),
        "even bits + end-to-end tuning of scales and codes": replace(BEST, mixed=False),
        "even bits, pairs + end-to-end tuning of scales and codes": replace(BEST, spec=Rotated(), mixed=False),
        "even bits, a state for each weight": replace(EVEN, spec=EACH),
        "even bits, a state for each weight + block tuning of codes and scales": replace(
            BLOCKS, spec=EACH, recovery=BlockTuning()
        ),
        "even bits with pairs of values, table of 64 (HYB)": replace(
            EVEN, spec=Rotated(Trellis(code="hyb", table_bits=6))
        ),
        "fast": quant.load_recipe("fast"),
        "codebooks of vectors + end-to-end tuning of entries and indices": replace(BEST, spec=Codebook(bits=2)),
        "uniform grid + block tuning of codes": replace(
            with_spec(rounded, bits=2, group_size=64), recovery=BlockTuning(codes=3, scales=0.005), distillation=None
        ),
        "uniform grid + end-to-end tuning of codes": with_spec(ROUNDING, bits=2, group_size=64),
        "folded between linears": replace(EVEN, folding=Folding(stream=False)),
        "folded, the stream too": replace(EVEN, folding=Folding(untie=True)),
        "folded, the stream too, `online=false`": replace(EVEN, folding=Folding(untie=True, online=False)),
    }
    rows = [(what, recipe, 2.0) for what, recipe in two.items()]
    rows += [("signs and salient columns (PTQ1.61)", Recipe(spec=Binary()), 1.61)]
    rows += [("balanced", replace(with_spec(BALANCED, bits=int(b)), average=b), b) for b in (1.61, 2.33)]
    rows += [("balanced", with_spec(BALANCED, bits=3), 3.0)]
    rows += [("even bits", with_spec(EVEN, bits=3), 3.0)]
    rows += [("balanced", replace(with_spec(BALANCED, bits=3), average=3.29), 3.29)]
    rows += [("even bits, one more for some", replace(with_spec(EVEN, bits=3), average=3.29), 3.29)]
    rows += [("balanced", with_spec(BALANCED, bits=4), 4.0)]
    rows += [("even bits, a state for each weight", with_spec(replace(EVEN, spec=EACH), bits=4), 4.0)]
    rows += [("best", with_spec(BEST, bits=bits), float(bits)) for bits in (3, 4)]
    tuned = "even bits + end-to-end tuning of scales and codes"
    rows += [(tuned, with_spec(replace(BEST, mixed=False), bits=3), 3.0)]
    for bits in (3, 4):  # a symmetric grid of 64 has fewer bits on disk than AutoRound's 3.297 and 4.312
        learned = with_spec(ROUNDING, bits=bits, group_size=64, symmetric=True)
        rows += [("symmetric uniform grid + end-to-end tuning of codes", learned, float(bits))]
    return rows


SHOWN = (
    "what", "bits", "bits on disk", "ppl", "gap", "KL", "KL elsewhere", "seconds", "cpu seconds",
    "cpu s per 1e6 weights", "peak MiB", "rotated", "best peer", "peer's bits", "peer's gap", "ratio", "commit", "date",
)  # fmt: skip


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(quality.MODELS), choices=list(quality.MODELS))
    parser.add_argument("--only", nargs="+", default=[], help="rows to measure, by a part of their name and bits")
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/two-bits.md")
    args = parser.parse_args()
    for name in [] if args.page else args.models:
        found = record.present(args.data, f"models/{name}", quality.CALIBRATION, quality.TEST, quality.OTHER)
        if found is None:
            continue
        model, calibration, test, other = found
        original = open_subject(model)
        whole = evaluate(original, text=test).perplexity
        assert whole is not None
        windows = quality.check_windows(Calibration(text=str(calibration)), original)[:16]
        heading = f"{name} (float {whole.token:.3f})"
        for what, recipe, bits in steps():
            if args.only and not any(part in f"{what} {bits:g}" for part in args.only):
                continue
            made = override(recipe, [f'calibration.text="{calibration}"'])
            try:
                row = alone(model, made, test, other)
            except SettingsError as error:  # signs have no room on matrices this small
                print(f"{name}: no row {what!r}: {error}.", flush=True)
                continue
            best = rival(name, max(2, int(bits)))
            gap = math.log(row["ppl"] / whole.token)
            row |= {"what": what, "bits": bits, "gap": gap}
            row |= {"best peer": f"{best['library']} {best['method']}", "peer's bits": best["bpw"]}
            row |= {"peer's gap": best["gap"], "ratio": gap / best["gap"]}
            row |= {"code": getattr(recipe.spec.core, "code", None), "windows": windows}
            known = record.facts()
            row |= {key: known[key] for key in ("commit", "date", "cpu", "versions")}
            print(record.table([row], SHOWN).splitlines()[-1], flush=True)
            with redirect_stdout(StringIO()):  # kept row by row: the whole takes hours
                write(args.results, heading, row)
    if args.page:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), read(args.results)), encoding="utf-8")


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each model."""
    file = folder / "two_bits.json"
    return json.loads(file.read_text(encoding="utf-8"))["tables"] if file.exists() else {}


def write(folder: Path, heading: str, row: dict[str, Any]) -> None:
    """Puts a row into the results, in place of an older one."""
    rows = read(folder)
    place = {(what, bits): number for number, (what, _, bits) in enumerate(steps())}
    key = lambda row: (row["what"], row["bits"])  # noqa: E731
    rows[heading] = [old for old in rows.get(heading, []) if key(old) != key(row) and key(old) in place] + [row]
    rows[heading].sort(key=lambda row: place[key(row)])
    notes = [
        "Each row was measured on its own commit and date; command, load and versions above are the last row's.",
        "gap: ln(ppl / ppl float). ratio: to the best peer's gap.",
        f"KL(float model || quantized), nats per token: of the test text, and elsewhere, of the first "
        f"{quality.OTHER_WINDOWS} windows of {quality.OTHER}.",
        "rotated: matrices whose inputs are rotated at run time.",
        "seconds, cpu seconds (all threads), peak MiB: the whole run, in a process of its own.",
        "best peer: any library in peers.csv, trained ones included, same nominal bits, at most 1/3 bit more.",
    ]
    order = sorted(rows, key=lambda heading: [heading.startswith(name) for name in quality.MODELS], reverse=True)
    parts = [(heading, rows[heading], SHOWN) for heading in order]
    record.save(folder, "two_bits", "Two bits, ingredient by ingredient", parts, notes)


def page(text: str, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """docs/two-bits.md with its tables as the results have them."""
    for name, lines in tables(results).items():
        before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        start, end = text.index(before) + len(before), text.index(after)
        text = text[:start] + lines + "\n" + text[end:]
    return text


def tables(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """The tables of docs/two-bits.md by their names there."""
    columns = {"model": "model (float perplexity)", "what": "what", "bits": "`--bits`", "bits on disk": "bits on disk"}
    columns |= {"ppl": "perplexity", "gap": "gap", "KL": "KL", "KL elsewhere": "KL elsewhere"}
    whole = [*columns.values(), "CPU s", "best peer, its bits: its gap"]
    folding = ["model", "folded", "bits on disk", "gap", "KL", "KL elsewhere", "rotated", "CPU s"]
    ingredients, folded = list[dict[str, str]](), list[dict[str, str]]()
    for heading, rows in results.items():
        name, perplexity = heading.split()[0], float(heading.split()[-1].strip(")"))
        model = f"{name} ({perplexity:.2f})"
        for row in rows:
            mark = " °" if row["code"] == "inst" else ""
            cells = {"model": name, "model (float perplexity)": model, "what": row["what"] + mark}
            cells |= {"`--bits`": f"{row['bits']:g}", "bits on disk": f"{row['bits on disk']:.3f}"}
            cells |= {"perplexity": f"{row['ppl']:.2f}", "gap": f"{row['gap']:.4f}", "KL": f"{row['KL']:.3f}"}
            cells |= {"KL elsewhere": f"{row['KL elsewhere']:.3f}", "CPU s": f"{row['cpu seconds']:.0f}"}
            cells |= {"rotated": str(row.get("rotated", ""))}
            cells["best peer, its bits: its gap"] = "{best peer}, {peer's bits}: {peer's gap:.3f}".format_map(row)
            if "folded" in row["what"]:
                folded.append(cells | {"folded": row["what"].removeprefix("folded").strip(", ")})
            else:
                ingredients.append(cells)
            if row["what"] == "+ float path's outputs":
                folded.append(cells | {"folded": "nothing"})
    return {"ingredients": record.table(ingredients, whole), "folding": record.table(folded, folding)}


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
