"""How long does GPTQ take beside other libraries, and how fast does a packed model run on the CPU?

    python benchmarks/speed.py [--data DIR] [--peer NAME='COMMAND' ...]

GPTQ: a model under DIR (the demo model without one), 4 bits, group 128, 128 windows of 512 tokens. Every round runs
bitwright and then each peer in a process of its own, so that all share the machine's weather; the ratio is the median
of the rounds. Bitwright's seconds are those of `quant.quantize` as a whole: tokenizing, writing the checkpoint, its
report and the verification included. A peer's seconds are the `quant_s` that its output reports (the quantization
alone), or else those of its process.

Tokens per second: the demo model at batch 1, greedy decoding and the prefill of 512 tokens, float against packed
through the torch kernel; every round takes each once.
"""

from __future__ import annotations

import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

CALIBRATION = "texts/tinystories.calib.txt"
QUANTIZE = """
import json, sys, tempfile, time
import quant
from quant.recipe import override, with_spec
model, text, bits, group = sys.argv[1:]
recipe = with_spec(quant.load_recipe("gptq"), bits=int(bits), group_size=int(group))
recipe = override(recipe, [f"calibration.text={json.dumps(text)}"] if text else [])
with tempfile.TemporaryDirectory() as out:
    began = time.perf_counter()
    quant.quantize(model, out + "/q", recipe)
    print(json.dumps({"quant_s": time.perf_counter() - began}))
"""


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", default="models/ts-llama-small", help="under --data")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    args = parser.parse_args()
    found = record.present(args.data, args.model, CALIBRATION)
    model, text = found or (record.DEMO, "")
    ours = [sys.executable, "-c", QUANTIZE, str(model), str(text), str(args.bits), str(args.group)]
    commands = {"bitwright": ours} | {name: shlex.split(line) for name, line in (p.split("=", 1) for p in args.peer)}
    parts = [("GPTQ", quantizing(commands, args.rounds), QUANTIZING), ("Tokens per second", running(args), RUNNING)]
    notes = [
        f"GPTQ: {Path(model).name}, {args.bits} bits, group {args.group}; median of {args.rounds} rounds.",
        "Tokens per second: demo model, packed, batch 1, medians.",
        "'of bitwright', 'of float': the median of the ratios within a round, not the ratio of the medians.",
    ]
    if not args.peer:
        notes.append("No other library was installed for this run; it had no --peer.")
    record.save(args.results, "speed", "Time to quantize, and to run on the CPU", parts, notes)


QUANTIZING = ("library", "seconds", "least", "most", "process s", "cpu s", "peak MiB", "of bitwright")


def quantizing(commands: dict[str, list[str]], rounds: int) -> list[dict[str, Any]]:
    taken: dict[str, list[tuple[float, record.Child]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            child = record.run(command)
            told = re.findall(r'"quant_s":\s*([0-9.]+)', child.stdout)
            taken[name].append((float(told[-1]) if told else child.seconds, child))
            print(f"round {number + 1}: {name} {taken[name][-1][0]:.1f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for name, runs in taken.items():
        seconds = [run[0] for run in runs]
        shares = [mine / base[0] for mine, base in zip(seconds, taken["bitwright"], strict=True)]
        rows.append(
            {
                "library": name,
                "seconds": statistics.median(seconds),
                "least": min(seconds),
                "most": max(seconds),
                "process s": statistics.median(child.seconds for _, child in runs),
                "cpu s": statistics.median(child.cpu for _, child in runs),
                "peak MiB": statistics.median(child.peak for _, child in runs) / 2**20,
                "of bitwright": statistics.median(shares),
            }
        )
    return rows


RUNNING = ("weights", "bits", "MiB", "decode tokens/s", "of float", "prefill tokens/s", "prefill of float")


def running(args: Any) -> list[dict[str, Any]]:
    """Imports torch, so it comes after the processes whose peak memory is measured."""
    import torch

    import quant
    from quant.eval.generate import greedy
    from quant.eval.subject import Subject, open_subject
    from quant.recipe import override, with_spec

    with tempfile.TemporaryDirectory() as folder:
        subjects: dict[tuple[str, Any], Subject] = {("float32", None): open_subject(record.DEMO)}
        recipes = {("grid", b): with_spec(quant.load_recipe("rtn"), bits=b, group_size=64) for b in (8, 4, 3, 2)}
        recipes["trellis", 2] = override(quant.load_recipe("fast"), ["calibration.samples=4"])
        for (name, bits), recipe in recipes.items():
            quant.quantize(str(record.DEMO), out := Path(folder) / f"{name}{bits}", recipe)
            subjects[name, bits] = open_subject(out)
        ids = torch.randint(0, 500, (1, 512), generator=torch.Generator().manual_seed(0))
        timed: dict[Any, list[tuple[float, float]]] = {key: [] for key in subjects}
        for _ in range(max(3, args.rounds)):
            for key, subject in subjects.items():
                decode = clock(lambda s=subject: list(greedy(s, ids[:, :16], args.tokens)))
                prefill = clock(lambda s=subject: list(greedy(s, ids, 1)))
                timed[key].append((args.tokens / decode, 512 / prefill))
        rows: list[dict[str, Any]] = []
        for (name, bits), pairs in timed.items():
            base = timed["float32", None]
            model = subjects[name, bits].model
            held = sum(t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers()))
            rows.append(
                {
                    "weights": name,
                    "bits": bits,
                    "MiB": held / 2**20,
                    "decode tokens/s": statistics.median(pair[0] for pair in pairs),
                    "of float": statistics.median(p[0] / b[0] for p, b in zip(pairs, base, strict=True)),
                    "prefill tokens/s": statistics.median(pair[1] for pair in pairs),
                    "prefill of float": statistics.median(p[1] / b[1] for p, b in zip(pairs, base, strict=True)),
                }
            )
    return rows


def clock(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
