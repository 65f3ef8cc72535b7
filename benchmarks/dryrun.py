"""Is the dry run right? Bytes exactly, peak memory within 15 %, time within a factor of 2.

    python benchmarks/dryrun.py

For the demo model and a larger synthetic one, round-to-nearest and GPTQ at 4, 3 and 2 bits, and for the demo model the
trellis recipes at 2 bits: first `--dry-run`, with nothing compiled yet, then the run itself, each in a fresh process.
Peak memory is the kernel's count for the process of the run.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

MEMORY, TIME = 0.15, 2.0
TRELLIS = ("fast", "balanced", "best")  # a core takes hours for the synthetic model


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--recipes", nargs="+", default=["rtn", "gptq", *TRELLIS])
    parser.add_argument("--blocks", type=int, default=6, help="of the synthetic model")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows for the synthetic model")
    parser.add_argument("--no-synthetic", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = [("demo", record.DEMO, [])]
        if not args.no_synthetic:
            large = Path(folder) / "synthetic"
            size = ["--blocks", args.blocks, "--hidden", args.hidden, "--intermediate", args.intermediate]
            record.run([sys.executable, str(record.HERE / "synthetic.py"), str(large), *map(str, size)])
            models.append(("synthetic", large, ["--samples", str(args.samples)]))
        for name, model, extra in models:
            for recipe in args.recipes:
                for bits in [] if recipe in TRELLIS and name != "demo" else [2] if recipe in TRELLIS else args.bits:
                    os.environ["NUMBA_CACHE_DIR"] = str(Path(folder) / f"compiled-{len(rows)}")
                    options = ["--model", model, "--bits", str(bits), "--recipe", recipe]
                    rows.append(compare(name, options, extra if recipe != "rtn" else [], Path(folder) / "out"))
                    print(record.table(rows[-1:], list(rows[-1])), flush=True)
    sizes = f"{args.blocks} blocks of hidden size {args.hidden}, intermediate {args.intermediate}"
    sizes += f", {args.samples} calibration windows of 512 tokens"
    record.save(
        args.results,
        "dryrun",
        "The dry run against the run",
        [("Predicted and measured", rows, list(rows[0]))],
        [
            f"synthetic: {sizes}; demo: the recipes' own calibration.",
            f"ok: memory within {MEMORY:.0%}, time within a factor of {TIME:g}.",
        ],
    )
    if not all(row["bytes exact"] and row["memory ok"] and row["time ok"] for row in rows):
        sys.exit(1)


def compare(name: str, options: list[Any], extra: list[str], out: Path) -> dict[str, Any]:
    _, predicted = record.quantize(*options, *extra, "--dry-run")
    child, report = record.quantize(*options, *extra, "--out", out)
    written = sum(file.stat().st_size for file in out.glob("model*.safetensors*"))
    shutil.rmtree(out)
    memory = predicted["peak_rss_bytes"] / child.peak
    seconds = predicted["seconds"] / report["seconds"]
    return {
        "model": name,
        "recipe": options[-1],
        "bits": int(options[3]),
        "predicted bytes": predicted["weight_bytes"],
        "bytes": written,
        "bytes exact": predicted["weight_bytes"] == written,
        "predicted MiB": predicted["peak_rss_bytes"] / 2**20,
        "peak MiB": child.peak / 2**20,
        "memory ratio": memory,
        "memory ok": abs(memory - 1) <= MEMORY,
        "predicted s": predicted["seconds"],
        "seconds": report["seconds"],
        "time ratio": seconds,
        "time ok": 1 / TIME <= seconds <= TIME,
        "rehearsal s": predicted["rehearsal_seconds"],
        "load": child.load,
    }


if __name__ == "__main__":
    main()
