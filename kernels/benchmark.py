"""Speed of the kernels for packed weights: `python -m quant.kernels.benchmark [--quick] [--check]`.

First the gate: ragged shapes of all bit widths and codes against float64; if one is wrong, nothing is timed. Then the
copy bandwidth and the bfloat16 matmul rate of this GPU, which give each product its limit (`roofline.py`), and then the
products, the most important first. Each is checked before it is timed, beside torch's own product of 16-bit weights
(cuBLAS), torch's 4-bit kernel and gemlite, where they exist. Results are written after every few rows, so a run that is
killed leaves what it measured; one that reaches `--seconds` stops by itself and says how much it left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.kernels import measure
from quant.kernels.available import INTERPRET, runs_triton
from quant.kernels.blocks import Config
from quant.kernels.measure import HALVES, SHAPES, Case
from quant.kernels.roofline import work
from quant.kernels.spec import Codebook, Trellis, Uniform, rounds_inputs

TOKENS, BITS, GROUP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096), (4, 2, 3, 8), 128
TRELLISES = (2, 3, 4)
"""Bits of the trellises that are timed, of the default code and window."""
CODEBOOKS = (2.0, 3.0)
"""Bits of the codebooks that are timed."""
PEERS = ("bf16", "int4pack", "gemlite")
SHOWN = (
    "model", "layer", "N", "K", "M", "bits", "code", "us", "GB/s", "limit us", "of limit", "other us",
    *(f"{name} us" for name in PEERS),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 if a result was wrong; 2 without a GPU."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="the most important rows, within 4 minutes")
    options.add_argument("--check", action="store_true", help="the correctness gate alone")
    options.add_argument("--seconds", type=float, help="no row begins later than this [200 if quick, else 500]")
    options.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of kernels.json, .md")
    options.add_argument("--json", type=Path, help="the JSON file, if not in that folder")
    options.add_argument("--commit", help="name of the commit, where there is no git")
    args = options.parse_args(arguments)
    if not torch.cuda.is_available() and not (args.check and runs_triton(torch.empty(0))):
        print(
            "No CUDA device was found, so there is nothing to measure; with TRITON_INTERPRET=1, "
            f"{INTERPRET}=1 and --check the kernels are checked on the CPU."
        )
        return 2
    if not torch.cuda.is_available():
        return gate(map)
    with measure.processes() as pool:
        return gate(pool.map) or (0 if args.check else measured(args, pool.map))


def gate(apply: Callable[..., Iterator[Any]]) -> int:
    """Checks ragged products, prints what is wrong. `apply`: a `map`."""
    cuda = torch.cuda.is_available()
    device, size = ("cuda", (1000, 2100)) if cuda else ("cpu", (20, 300))
    cases = [
        Case(tokens, *size, Uniform(bits=bits, group_size=group, symmetric=bits == 2), kind)
        for bits in ((1, 2, 3, 4, 5, 6, 7, 8) if cuda else (2, 3, 4, 8))
        for tokens, group, kind in ((1, 128, "bf16"), (3, -1, "fp16"), (17, 32, "bf16"), (65, 16, "fp16"))
    ]
    cases += [
        Case(tokens, size[0] & ~7, size[1], Uniform(bits, group, symmetric=symmetric, activations=8), "fp16")
        for tokens, bits, group, symmetric in (
            (1, 4, 128, False), (17, 8, -1, True), (5, 2, 32, True), (100, 4, 64, False), (90, 8, 128, False),
            (90, 1, 128, True),
        )
    ]  # fmt: skip
    cases += [
        Case(tokens, *size, Trellis(bits=bits, window=window, code=code), kind)  # pyright: ignore[reportArgumentType]
        for tokens, bits, window, code, kind in (
            (1, 2, 12, "inst", "bf16"), (3, 1, 8, "sum", "fp16"),
            (17, 3, 16, "mac", "bf16"), (9, 4, 12, "inst", "fp16"), (1, 2, 13, "mac", "bf16"),
            (2, 1, 16, "mac", "fp16"), (3, 2, 13, "mac", "fp16"), (17, 2, 12, "mac", "bf16"), (7, 2, 13, "mac", "bf16"),
            (8, 4, 12, "sum", "fp16"),
        )
    ]  # fmt: skip
    cases += [
        Case(tokens, size[0], columns, Trellis(bits=bits), kind, block=block)
        for tokens, columns, bits, block, kind in (
            (1, 640, 2, 128, "bf16"), (1, 512, 3, 256, "fp16"), (1, 72, 1, 8, "bf16"), (1, 384, 2, 12, "fp16"),
            (3, 256, 2, 64, "bf16"),
        )
    ]  # fmt: skip
    cases.append(Case(16, *size, Trellis(bits=2), "bf16", Config(16, 256, 1, 1, 1)))  # many chunks of one warp
    shapes = ((256, 16, 1), (256, 8, 2), (256, 16, 4), (128, 8, 2), (128, 16, 1), (128, 4, 8)) * cuda
    for bn, warps, splits in shapes:  # clusters, where blocks share K
        config = Config(2, bn, warps, 1, splits)
        cases += [Case(1, size[0], 8192, Trellis(bits=2), "bf16", config, block=128)]
        cases += [Case(1, *size, Trellis(bits=2), "fp16", config)]
    cases += [Case(1, size[0], 9000, Trellis(bits=2), "bf16", Config(2, 256, 4, 1, 2))] * cuda  # `x` warp by warp
    cases += [
        Case(tokens, size[0] - 4, size[1], Codebook(bits=2.0), "bf16", Config(4, bn, warps, 1, splits))
        for tokens, bn, warps, splits in (
            (1, 128, 4, 4), (3, 128, 8, 2), (4, 128, 4, 8), (2, 64, 4, 4), (1, 64, 8, 8), (1, 128, 16, 2),
        ) * cuda
    ]  # fmt: skip
    cases += [
        Case(tokens, *size, Codebook(length=length, index_bits=bits, second_bits=second, share=share, rows=rows), kind)
        for tokens, length, bits, second, share, rows, kind in (
            (1, 6, 11, 4, 0.24, 4096, "bf16"), (17, 8, 12, 0, 1.0, 40, "fp16"), (3, 5, 9, 7, 1.0, 4096, "bf16"),
            (1, 4, 8, 0, 1.0, 4096, "bf16"), (4, 4, 8, 0, 1.0, 300, "fp16"), (16, 4, 8, 0, 1.0, 4096, "bf16"),
        )
    ]  # fmt: skip
    whole = (Uniform(bits=4), Trellis(), Codebook(length=6, index_bits=11, second_bits=4, share=0.24))
    cases += [Case(300, *size, spec) for spec in whole] * cuda  # unpacked and left to cuBLAS
    failed = [line for line in apply(measure.wrong, cases, [device] * len(cases)) if line]
    print(f"gate: {len(cases) - len(failed)} of {len(cases)} products are right", *failed, sep="\n", flush=True)
    return int(bool(failed))


def rows(quick: bool) -> list[tuple[str, str, Case]]:
    """All `(model, layer, case)`, the most important first; `quick`: only those."""

    def rank(row: tuple[str, str, Case]) -> int:
        tokens = row[2].tokens
        return min(2, list(SHAPES).index(row[0])) + (0 if tokens in (1, 16) else 1 if tokens in (4, 64, 256) else 2)

    made = [
        (model, layer, Case(tokens, rows, columns, spec))
        for model, layers in SHAPES.items()
        for layer, rows, columns in layers
        for tokens in TOKENS
        for spec in (
            *(Uniform(bits=b, group_size=GROUP) for b in BITS), Uniform(bits=4, group_size=GROUP, activations=8),
            *(Trellis(bits=b) for b in TRELLISES),
            *(Codebook(bits=b) for b in CODEBOOKS),
        )
    ]  # fmt: skip
    return [row for row in sorted(made, key=rank) if not quick or rank(row) <= 2]


def measured(args: argparse.Namespace, apply: Callable[..., Iterator[Any]]) -> int:
    """Times everything and writes it; see the module."""
    end = time.monotonic() + (args.seconds or (200 if args.quick else 500))
    todo, step = rows(args.quick), 64
    data: dict[str, Any] = measure.facts(args.commit)
    data |= {"bytes/s copied": measure.bandwidth(), "flop/s bf16": measure.rate(), "group": GROUP, "dtype": "bf16"}
    print(*(f"{name}: {cell(value)}" for name, value in data.items()), sep="; ", flush=True)
    data |= {"rows": [], "wrong": [], "not measured": len(todo)}
    peers: dict[tuple[Any, ...], float | None] = {}
    for start in range(0, len(todo), step):
        if time.monotonic() > end:
            break
        some = todo[start : start + step]
        checked = list(apply(measure.wrong, [case for *_, case in some]))
        fresh = list[dict[str, Any]]()
        for (model, layer, case), complaint in zip(some, checked, strict=True):
            if complaint:
                data["wrong"].append(complaint)
            elif time.monotonic() < end:
                try:
                    fresh.append({"model": model, "layer": layer, **timed(case, data, peers)})
                except RuntimeError as error:  # out of memory, say: the other rows still count
                    data["wrong"].append(f"{case}: {str(error)[:300]}")
        data["rows"] += fresh
        data["not measured"] = len(todo) - len(data["rows"]) - len(data["wrong"])
        show(fresh)
        write(data, args.results, args.json)
    print(*data["wrong"], f"{data['not measured']} rows were left out for lack of time", sep="\n")
    return int(bool(data["wrong"]))


@torch.no_grad()
def timed(case: Case, data: Mapping[str, Any], peers: dict[tuple[Any, ...], float | None]) -> dict[str, Any]:
    """One row: microseconds, limit and peers. `peers`: those that were timed before."""
    M, N, K, spec = case.tokens, case.rows, case.columns, case.spec
    x = torch.randn((M, K), device="cuda", dtype=HALVES[case.kind])
    need = work(M, N, K, spec)
    limit = need.limit(data["bytes/s copied"], data["flop/s bf16"])
    packed = measure.weights(N, K, spec, measure.copies(need.weight))
    seconds = ours(x, packed, limit)
    code = spec.code if isinstance(spec, Trellis) else spec.layout + ", 8-bit x" * rounds_inputs(spec)
    row: dict[str, Any] = {"N": N, "K": K, "M": M, "bits": spec.bits, "code": code, "us": seconds * 1e6}
    row |= {"GB/s": need.nbytes / seconds / 1e9, "limit us": limit * 1e6, "of limit": limit / seconds}
    if 64 <= M <= 1024:
        row["other us"] = other(x, packed, limit) * 1e6
    for name in PEERS:
        key = (name, M, N, K, spec.bits if name == "gemlite" else 0)
        if name == "int4pack" and spec.bits != 4:
            continue
        if key not in peers:
            peers[key] = None
            try:
                peers[key] = peer(name, x, N, spec, limit)
            except Exception as error:  # not ours to repair: its place stays empty
                print(f"{name} does not run: {str(error)[:200]}")
        found = peers[key]
        row |= {f"{name} us": found and found * 1e6, f"times {name}": found and found / seconds}
    return row


def ours(x: Tensor, packed: Sequence[Any], least: float) -> float:
    """Seconds of the product of our kernels."""
    return measure.clock(lambda i: measure.multiply(x, packed[i], None), len(packed), least)


def other(x: Tensor, packed: Sequence[Any], least: float) -> float:
    """Seconds of the way not taken, from which `UNPACK_FROM` is to be set: unpacked and left to cuBLAS where `launch`
    takes the kernel, and the reverse."""
    module = measure.module_of(packed[0])
    chosen = module.UNPACK_FROM
    try:
        module.UNPACK_FROM = len(x) + 1 if len(x) >= chosen else 0
        return ours(x, packed, least)
    finally:
        module.UNPACK_FROM = chosen


def peer(name: str, x: Tensor, rows: int, spec: measure.Spec, least: float) -> float | None:
    """Seconds of another kernel on the same product; None where there is none."""
    columns = x.shape[1]
    count = measure.copies(work(len(x), rows, columns, None if name == "bf16" else spec).weight)
    if name == "bf16":
        plain = torch.randn((count, rows, columns), device="cuda", dtype=x.dtype)
        return measure.clock(lambda i: torch.nn.functional.linear(x, plain[i]), count, least)
    if name == "int4pack" and columns % 128 == 0:  # tiles of 8 x 128; any bits are codes
        words = torch.randint(0, 2**31 - 1, (count, rows // 8, columns // 128, 32, 4), dtype=torch.int32, device="cuda")
        pairs = torch.randn((count, columns // GROUP, rows, 2), device="cuda", dtype=x.dtype)
        return measure.clock(lambda i: torch.ops.aten._weight_int4pack_mm(x, words[i], GROUP, pairs[i]), count, least)
    if name == "gemlite" and find_spec("gemlite") and spec.bits in (2, 4, 8):
        layers = [gemlite(rows, columns, int(spec.bits)) for _ in range(count)]
        return measure.clock(lambda i: layers[i](x), count, least)
    return None


def gemlite(rows: int, columns: int, bits: int) -> Callable[[Tensor], Tensor]:
    """A layer of gemlite with random bfloat16 scales (https://github.com/mobiusml/gemlite)."""
    from gemlite.core import DType, GemLiteLinearTriton  # pyright: ignore[reportMissingImports]

    half = DType.BF16
    layer = GemLiteLinearTriton(
        bits, group_size=GROUP, in_features=columns, out_features=rows, input_dtype=half, output_dtype=half
    )
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device="cuda")
    scales, zeros = torch.randn((2, codes.numel() // GROUP, 1), device="cuda", dtype=torch.bfloat16)
    layer.pack(codes, scales, zeros, None)
    return layer


def show(fresh: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*SHOWN, "times bf16")
    for row in fresh:
        table.add_row(*(cell(row.get(name)) for name in (*SHOWN, "times bf16")))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write(data: Mapping[str, Any], folder: Path, file: Path | None) -> None:
    """The JSON, and the same rows as a Markdown table beside it."""
    file = file or folder / "kernels.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    shown = (*SHOWN, *(f"times {name}" for name in PEERS))
    lines = ["# Kernels", "", *(f"- {k}: {cell(v)}" for k, v in data.items() if not isinstance(v, list)), ""]
    lines += ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    ordered = sorted(data["rows"], key=lambda row: (list(SHAPES).index(row["model"]), -row["N"] * row["K"], row["M"]))
    lines += ["| " + " | ".join(cell(row.get(name)) for name in shown) + " |" for row in ordered]
    file.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
