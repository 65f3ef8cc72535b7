"""Perplexity at 4, 3 and 2 bits on two real models, beside what other libraries reached on the same windows.

    python benchmarks/quality.py --data DIR

DIR holds models/ts-llama-small, models/stories260K-i192 and texts/tinystories.{calib,test}.txt. The rule is that of
peers.csv: 128 calibration windows of min(512, model maximum) tokens cut at random with seed 0 from the one text;
perplexity over the whole other text in non-overlapping windows of the same length, float32. All linears inside the
blocks are quantized, embedding and head are not. The windows are drawn a second time here by the rule written out, and
the run stops if they are not those that the package drew.

A row is held against the best uniform-grid library without training that has the same nominal bits and either the same
group size or no more bits on disk.
"""

from __future__ import annotations

import csv
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import load_file

import quant
from quant.calibration.samples import draw
from quant.calibration.texts import PIECE
from quant.eval.evaluate import evaluate
from quant.eval.subject import Subject, open_subject
from quant.models.source import find
from quant.prepare import Settings
from quant.recipe import Calibration, Recipe, override, with_spec

MODELS = {"ts-llama-small": (128, 64), "stories260K-i192": (64, 32)}
CALIBRATION, TEST = "texts/tinystories.calib.txt", "texts/tinystories.test.txt"
OTHER, OTHER_WINDOWS = "texts/wikitext2.test.txt", 128
SHOWN = (
    "library",
    "bits",
    "group",
    "bits on disk",
    "ppl",
    "gap",
    "seconds",
    "best peer",
    "peer's bits",
    "peer's ppl",
    "ok",
)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--recipes", nargs="+", default=["rtn", "gptq", "gptq_float"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--set", action="append", default=[], help="as of quantize, for the gptq recipes")
    args = parser.parse_args()
    parts, notes = [], []
    for name in args.models:
        found = record.present(args.data, f"models/{name}", CALIBRATION, TEST)
        if found is None:
            continue
        rows, facts = judge(name, *found, args)
        shown = sorted(rows + peer_rows(name), key=lambda row: (-row["bits"], row["ppl"]))
        parts.append((f"{name} (float {facts['float']:.3f})", shown, SHOWN))
        notes.append(facts["note"])
    if parts:
        notes += [
            "gap: ln(ppl / ppl float). seconds: the whole run for bitwright; for the others their own count, measured "
            "elsewhere: an order of magnitude.",
            "Other libraries: measured in November 2026 with the versions in peers.csv. autoround trains its rounding.",
            "ok: perplexity not above that of the best uniform-grid library without training at the same nominal bits "
            "with the same group size or no more bits on disk.",
        ]
        record.save(args.results, "quality", "Perplexity beside other libraries", parts, notes)


def judge(
    name: str, model: Path, calibration: Path, test: Path, args: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    original = open_subject(model)
    alone = evaluate(original, text=test).perplexity
    assert alone is not None
    calibrated = Calibration(text=str(calibration))
    digest = check_windows(calibrated, original)
    rows: list[dict[str, Any]] = []
    peers = [row for row in read_peers() if row["model"] == name]
    for bits in args.bits:
        for group in MODELS[name]:
            for recipe in args.recipes:
                made = with_spec(quant.load_recipe(recipe), bits=bits, group_size=group)
                if made.calibration is not None:
                    made = override(made, [f'calibration.text="{calibration}"', *args.set])
                row = measure(model, made, test)
                best = rival(peers, bits, group, row["bits on disk"])
                row |= {
                    "library": f"bitwright {recipe}",
                    "bits": bits,
                    "group": group,
                    "gap": math.log(row["ppl"] / alone.token),
                    "best peer": best and f"{best['library']} {best['method']} {best['group']}".strip(),
                    "peer's bits": best and best["bpw"],
                    "peer's ppl": best and best["ppl"],
                    "ok": None if best is None else round(row["ppl"], 2) <= best["ppl"],
                }
                rows.append(row)
                print(record.table([row], SHOWN).splitlines()[-1], flush=True)
    note = (
        f"{name}: {alone.windows} test windows, {alone.tokens:,} predictions; calibration windows sha256 {digest[:16]}."
    )
    return rows, {"float": alone.token, "note": note}


def measure(model: Path, recipe: Recipe, test: Path, other: Path | None = None) -> dict[str, Any]:
    """`other`: a text of another kind; then the divergence from the float model is measured too, on both."""
    original, strange = (open_subject(model) if other else None), None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        began, worked = time.perf_counter(), time.process_time()
        result = quant.quantize(str(model), out, recipe, settings=Settings())
        seconds, worked = time.perf_counter() - began, time.process_time() - worked
        found = evaluate(out, against=original, text=test)
        if other:
            strange = evaluate(out, against=original, text=other, max_windows=OTHER_WINDOWS)
        turned = sum(rotated(file) for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
    assert found.perplexity is not None
    diverged = {} if found.divergence is None else {"KL": found.divergence.kl}
    diverged |= {} if strange is None or strange.divergence is None else {"KL elsewhere": strange.divergence.kl}
    return {
        **diverged,
        "bits on disk": result.written.measured_bits,
        "promised bits": result.report["bits"]["promised"],
        "ppl": found.perplexity.token,
        "seconds": seconds,
        "cpu seconds": worked,
        "cpu s per 1e6 weights": worked / result.report["bits"]["weights"] * 1e6,
        "peak MiB": result.report["peak_rss_bytes"] / 2**20,
        "rotated": turned,
    }


def rotated(file: Path) -> int:
    """How many packed matrices in a file have their inputs rotated at run time."""
    return sum(int(tensor[0]) for name, tensor in load_file(file).items() if name.endswith(".rotation"))


def check_windows(calibration: Calibration, original: Subject) -> str:
    """Draws the windows by the shared rule, written out. Raises `SystemExit` if the package drew others."""
    source = find(str(original.folder))
    drawn = draw(calibration, source, original.model)
    ours = torch.cat([batch["input_ids"] for batch in drawn.batches])
    text, tokenizer = Path(calibration.text).read_text(encoding="utf-8"), original.tokenizer()
    ids: list[int] = []
    start = 0
    while start < len(text):
        stop = min(len(text), start + PIECE)
        if stop < len(text) and (newline := text.rfind("\n", start, stop)) > start:
            stop = newline + 1
        ids += tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
        start = stop
    length = min(512, original.max_length or 512)
    places = torch.randint(0, len(ids) - length - 1, (128,), generator=torch.Generator().manual_seed(0))
    theirs = torch.stack([torch.tensor(ids[place : place + length]) for place in places.tolist()])
    if not torch.equal(ours, theirs):
        raise SystemExit("the calibration windows are not those of the shared rule: nothing here would compare")
    return drawn.tokens_sha256()


def read_peers() -> list[dict[str, Any]]:
    lines = (record.HERE / "peers.csv").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    for row in rows:
        row |= {key: float(row[key]) for key in ("bpw", "ppl", "gap", "seconds")} | {"bits": int(row["bits"])}
        row["group"] = int(row["group"]) if row["group"] else ""
    return rows


def rival(peers: list[dict[str, Any]], bits: int, group: int, measured: float) -> dict[str, Any] | None:
    """The best untrained uniform grid of the same nominal bits with the same group size or no more bits on disk."""
    able = [
        row
        for row in peers
        if row["kind"] == "uniform" and row["bits"] == bits and (row["group"] == group or row["bpw"] <= measured)
    ]
    return min(able, key=lambda row: row["ppl"], default=None)


def peer_rows(name: str) -> list[dict[str, Any]]:
    return [
        {**row, "library": f"{row['library']} {row['method']}", "bits on disk": row["bpw"]}
        for row in read_peers()
        if row["model"] == name
    ]


if __name__ == "__main__":
    main()
