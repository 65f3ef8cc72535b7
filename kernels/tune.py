"""The fastest block sizes for this GPU: `python -m quant.kernels.tune [--minutes 20] [--bits 4 2] [--trellis 2]`.

For each shape, number of tokens and bits some blocks and splits of K are compiled (in several processes), checked, and
timed as in `measure.py`. The fastest is written to a JSON file named after GPU, kernels, torch and Triton in the user's
cache folder, after each shape; files of the same form in `kernels/tuned/` ship with the package. Nothing is tuned
unless this is run: a product without an entry gets the default configuration at once.

Entries are found by nearby sizes: rows and columns by the nearest power of two, tokens by the next of `BUCKETS`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from quant.kernels import blocks
from quant.kernels.available import clusters
from quant.kernels.blocks import Config, choose_skinny, even_splits
from quant.kernels.order import TILE

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHIPPED = Path(__file__).parent / "tuned"
REVISION = 6
"""Of the kernels: entries for others do not fit."""


@cache
def tuned(
    device: torch.device, tokens: int, rows: int, columns: int, bits: int, kind: str, tile: int = TILE
) -> Config | None:
    """The measured configuration for `x` `[tokens, columns]` of `kind` ("fp16", "bf16") times a weight `[rows,
    columns]` of so many bits; None where this GPU has none. Compiles and measures nothing."""
    if device.type != "cuda":
        return None
    found = known(file_name(torch.cuda.get_device_name(device))).get(key(tokens, rows, columns, bits, kind))
    return found and replace(found, splits=even_splits(columns, found.splits, tile))


def key(tokens: int, rows: int, columns: int, bits: int, kind: str) -> str:
    """Under which an entry stands."""
    M = next((size for size in BUCKETS if tokens <= size), BUCKETS[-1])
    N, K = (2 ** round(math.log2(size)) for size in (rows, columns))
    return f"{kind} W{bits} M{M} N{N} K{K}"


@cache
def known(name: str) -> dict[str, Config]:
    """All entries of one GPU and versions; the user's own come first."""
    entries = dict[str, Config]()
    for folder in (SHIPPED, cache_folder()):
        file = folder / name
        try:
            if file.is_file():
                found = json.loads(file.read_text(encoding="utf-8"))["configs"]
                entries |= {place: Config(**config) for place, config in found.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(f"{name} is not what quant.kernels.tune writes and is ignored: {error!r}", stacklevel=2)
    return entries


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitwright" / "tuned"


def file_name(device: str) -> str:
    import triton

    parts = (
        f"{device}-r{REVISION}",
        f"torch-{torch.__version__.split('+')[0]}",
        f"triton-{triton.__version__.split('+')[0]}",
    )
    return "_".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()) for part in parts) + ".json"


def candidates(tokens: int, rows: int, columns: int, bits: int, processors: int) -> list[Config]:
    """Blocks of `skinny.py`'s kernel worth compiling, with several splits each."""
    sizes = (tokens, rows, columns, processors, bits)
    made = [choose_skinny(*sizes, bn, warps) for bn in (32, 64) for warps in (4, 8, 12, 14, 16, 18, 20, 24)]
    return list(dict.fromkeys(made))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 without a GPU."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=20, help="nothing begins later than this")
    options.add_argument("--bits", type=int, nargs="+", default=[4, 2, 3, 8])
    options.add_argument("--trellis", type=int, nargs="*", default=[2, 3, 4], help="bits of trellises")
    options.add_argument("--codebook", type=float, nargs="*", default=[2, 3], help="bits of codebooks")
    options.add_argument("--code", choices=("inst", "mac", "sum", "hyb"), default="mac", help="of the trellises")
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 4, 8, 32, 64, 128], help=f"of {BUCKETS}")
    options.add_argument("--kind", choices=("bf16", "fp16"), default="bf16")
    options.add_argument("--out", type=Path, default=cache_folder(), help="folder of the JSON file")
    args = options.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No CUDA device was found, so there is nothing to tune for.")
        return 2
    from rich.progress import Progress

    from quant.kernels import measure
    from quant.kernels.spec import Codebook, Trellis, Uniform

    specs: list[measure.Spec] = [Uniform(bits=bits) for bits in args.bits]
    specs += [Trellis(bits=bits, code=args.code) for bits in args.trellis]
    specs += [Codebook(bits=bits) for bits in args.codebook]
    todo = {
        named(tokens, rows, columns, spec, args.kind): (tokens, rows, columns, spec)
        for layers in measure.SHAPES.values()
        for tokens in args.tokens
        for spec in specs
        for _, rows, columns in layers
    }
    file = args.out / file_name(torch.cuda.get_device_name())
    configs = json.loads(file.read_text(encoding="utf-8"))["configs"] if file.is_file() else {}
    end = time.monotonic() + 60 * args.minutes
    with measure.processes() as pool, Progress() as progress:
        for name, sizes in progress.track(todo.items(), description="tuning"):
            if time.monotonic() > end:
                break
            best, seconds, default = fastest(*sizes, args.kind, pool.map)
            progress.console.print(f"{name}: {1e6 * seconds:.1f} us, {best}; by default {1e6 * default:.1f} us")
            configs[name] = asdict(best)
            args.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({**measure.facts(), "configs": configs}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(configs)} entries in {file}")
    return 0


def named(tokens: int, rows: int, columns: int, spec: Any, kind: str) -> str:
    """The key of a spec's weight of this shape."""
    from quant.kernels import codebook_launch
    from quant.kernels.spec import Codebook, Trellis

    chosen = spec.chosen((rows, columns))
    if isinstance(chosen, Codebook):
        name = codebook_launch.kind(chosen.length, chosen.second_bits, kind)
        return key(tokens, rows, columns, chosen.index_bits, name)
    return key(tokens, rows, columns, spec.bits, f"{spec.code}-{kind}" if isinstance(spec, Trellis) else kind)


@torch.no_grad()
def fastest(
    tokens: int, rows: int, columns: int, spec: Any, kind: str, apply: Callable[..., Iterator[Any]]
) -> tuple[Config, float, float]:
    """The best configuration, its seconds, and those of the default one. `apply`: a `map`, for the checks."""
    from quant.kernels import codebook_launch, launch, measure, trellis_blocks
    from quant.kernels.spec import Codebook, Trellis

    properties = torch.cuda.get_device_properties(0)
    bits, count = spec.bits, properties.multi_processor_count
    sizes = (tokens, rows, columns)
    nbytes = int(rows * columns * bits) // 8
    packed = measure.weights(rows, columns, spec, measure.copies(nbytes))
    module = measure.module_of(packed[0])
    x = torch.randn((tokens, columns), device="cuda", dtype=measure.HALVES[kind])
    out = x.new_empty((tokens, rows))
    times = dict[Config, float]()

    def measured(some: Iterable[Config]) -> None:
        fresh = [config for config in dict.fromkeys(some) if config not in times]
        cases = [measure.Case(*sizes, spec, kind, config) for config in fresh]
        for config, complaint in zip(fresh, apply(measure.wrong, cases), strict=True):
            times[config] = math.inf
            if not complaint:
                call = lambda i, config=config: module.run(x, packed[i], config, out)  # noqa: E731
                times[config] = measure.clock(call, len(packed), nbytes / 4e12)  # how many calls, no more

    if isinstance(spec, Trellis):
        code = trellis_blocks.compiled_code(spec.code, bits)
        default = trellis_blocks.choose(*sizes, count, code, clusters=clusters(x.device))
        measured([default, *trellis_blocks.candidates(*sizes, count, code)])
    elif isinstance(spec, Codebook):
        chosen = spec.chosen((rows, columns))
        shared = codebook_launch.is_shared(chosen.length, chosen.index_bits, chosen.second_bits)
        default = codebook_launch.choose(*sizes, chosen.length, count, shared)
        measured([default, *codebook_launch.candidates(*sizes, chosen.length, count, shared)])
    else:
        default = blocks.choose(*sizes, count, bits, launch.processor(x.device)[1])
        measured([default, *candidates(*sizes, bits, count)])
    best = min(times, key=times.__getitem__)
    return best, times[best], times[default]


if __name__ == "__main__":
    raise SystemExit(main())
