"""Is the peak memory of a run set by the largest block, and not by the depth?

    python benchmarks/depth.py

Synthetic Llamas of 4, 16 and 64 equal blocks are quantized by the command line, each in a fresh process, and the peak
resident set that the kernel counted for the process is compared: it must agree within 10 % over all depths. A block is
26 MB in float32 and the deepest model 1.7 GB, so a run that kept even a tenth of its blocks would show. The grid search
is off and few windows are used: both cost time, not memory (the search works in chunks, the activations are as large
at every depth).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

ALLOWED = 0.10
QUICK = ("--threads", "1", "--set", "solver.search.steps=1", "--set", "solver.search.refits=0")
RECIPES = {
    "rtn": ("--recipe", "rtn", *QUICK),
    "gptq": ("--recipe", "gptq", *QUICK, "--set", "solver.sweeps=0", "--samples", "4"),
}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument(
        "--scratch", type=Path, help="folder for the models (2 GB); default: the system's temporary one"
    )
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        idle = record.run([sys.executable, "-c", "import quant.cli"]).peak
        for blocks in args.blocks:
            model = make(Path(folder) / f"{blocks}-blocks", blocks, args.hidden, args.intermediate)
            for name in args.recipes:
                rows.append(measure(model, blocks, name, idle))
                print(record.table(rows[-1:], list(rows[-1])), flush=True)
            shutil.rmtree(model)
    verdicts = [verdict(name, [row for row in rows if row["recipe"] == name]) for name in args.recipes]
    record.save(
        args.results,
        "depth",
        "Peak memory against depth",
        [("Runs", rows, list(rows[0])), ("Verdict", verdicts, list(verdicts[0]))],
        [
            f"Blocks of hidden size {args.hidden}, intermediate {args.intermediate}, stored in bfloat16, computed in "
            "float32; vocabulary 1,024; 4 bits, group 128.",
            f"A process that has only imported the package peaks at {idle / 2**20:.0f} MiB.",
            "Peak: the kernel's count for the whole process (ru_maxrss), file pages that it mapped included.",
        ],
        idle_bytes=idle,
    )
    if not all(row["within 10 %"] for row in verdicts):
        sys.exit(1)


def make(out: Path, blocks: int, hidden: int, intermediate: int) -> Path:
    """In a process of its own: this one must stay small (see `record`)."""
    size = ["--blocks", str(blocks), "--hidden", str(hidden), "--intermediate", str(intermediate)]
    record.run([sys.executable, str(record.HERE / "synthetic.py"), str(out), *size])
    return out


def measure(model: Path, blocks: int, name: str, idle: int) -> dict[str, Any]:
    out = model.with_name(f"{model.name}-{name}")
    child, report = record.quantize("--model", model, "--bits", "4", "--out", out, *RECIPES[name])
    shutil.rmtree(out)
    return {
        "recipe": name,
        "blocks": blocks,
        "weights": report["bits"]["weights"],
        "float32 MiB": report["bits"]["weights"] * 4 / 2**20,
        "peak MiB": child.peak / 2**20,
        "above imports MiB": (child.peak - idle) / 2**20,
        "seconds": child.seconds,
        "cpu seconds": child.cpu,
        "load": child.load,
    }


def verdict(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    peaks = [row["peak MiB"] for row in rows]
    ratio = max(peaks) / min(peaks)
    growth = (rows[-1]["peak MiB"] - rows[0]["peak MiB"]) / max(1, rows[-1]["blocks"] - rows[0]["blocks"])
    return {"recipe": name, "highest over lowest": ratio, "within 10 %": ratio <= 1 + ALLOWED, "MiB per block": growth}


if __name__ == "__main__":
    main()
