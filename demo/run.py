"""The main job on the embedded model: 4, 3 and 2 bits; round-to-nearest, GPTQ and trellis codes, on held-out text.

    make demo

Needs no network and no GPU. The model was trained by `demo/train.py` on the documentation that ships with CPython; the
calibration text and the held-out text are other parts of it. Checkpoints, reports, a table and a plot go to `demo/out`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin: the matrices are small

import transformers
from rich import box
from rich.console import Console
from rich.table import Table

import quant
from quant.display import Display
from quant.eval.evaluate import evaluate
from quant.eval.plot import plot
from quant.eval.subject import open_subject
from quant.machine import machine, versions
from quant.recipe import with_spec

HERE = Path(__file__).parent
COLUMNS = ("recipe", "bits", "bits on disk", "bytes", "perplexity", "KL", "top-1", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    args = parser.parse_args()
    console = Console()
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    model = os.path.relpath(HERE / "model")
    original = open_subject(model)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    alone = evaluate(original, text="python-docs")
    rows, reports = [row("float", 16, 16.0, alone, 0.0)], []
    for bits in args.bits:
        for name in ("rtn", "gptq", "balanced") if bits <= 3 else ("rtn", "gptq"):
            group_size = None if name == "balanced" else args.group_size
            recipe = with_spec(quant.load_recipe(name), bits=bits, group_size=group_size)
            out = args.out / f"{name}-{bits}bit"
            with Display(console) as shown:
                result = quant.quantize(model, out, recipe, progress=shown)
            report = evaluate(out, against=original, text="python-docs", generate=1 if bits == 4 else 0)
            reports.append(report)
            rows.append(row(name, bits, result.written.measured_bits, report, result.report["seconds"]))
            console.print(f"{out}: perplexity {rows[-1]['perplexity']:.2f}", highlight=False)
    plot(reports, alone, args.out / "size-against-perplexity.png")
    text = markdown(rows, args.group_size, time.perf_counter() - began)
    (args.out / "results.md").write_text(text, encoding="utf-8")
    (args.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    show(console, rows)
    console.print(
        f"wrote {args.out}: results.md, size-against-perplexity.png, and report.html in each checkpoint folder"
    )


def row(name: str, bits: int, measured: float, report: Any, seconds: float) -> dict[str, Any]:
    divergence = report.divergence
    return {
        "recipe": name,
        "bits": bits,
        "bits on disk": measured,
        "bytes": report.size.bytes,
        "perplexity": report.perplexity.token,
        "KL": None if divergence is None else divergence.kl,
        "top-1": None if divergence is None else divergence.top1,
        "seconds": seconds,
    }


def cells(values: dict[str, Any]) -> list[str]:
    kl, top = values["KL"], values["top-1"]
    return [
        values["recipe"],
        str(values["bits"]),
        f"{values['bits on disk']:.3f}",
        f"{values['bytes']:,}",
        f"{values['perplexity']:.2f}",
        "" if kl is None else f"{kl:.4f}",
        "" if top is None else f"{100 * top:.1f} %",
        f"{values['seconds']:.1f}" if values["seconds"] else "",
    ]


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(*COLUMNS, title="demo model, held-out text", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for values in rows:
        table.add_row(*cells(values))
    console.print(table)


def markdown(rows: list[dict[str, Any]], group_size: int, seconds: float) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(values)) + " |" for values in rows]
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    host = machine()
    lines += [
        "",
        f"`make demo`: grids in groups of {group_size}, balanced is a trellis; bits per quantized weight as found on "
        "disk; bytes of all weights, the bfloat16 embedding included; perplexity of a small model on held-out "
        "python-docs, windows of 512 tokens; KL in nats per token to the float model. "
        f"{host.cpu}, {host.cores} cores; {used}; {seconds:.0f} s in all.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
