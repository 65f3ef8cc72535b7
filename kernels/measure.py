"""What `benchmark` and `tune` share: shapes of real models, random weights, the correctness gate and the clock.

The gate compares with float64 on the very case that will be timed; what it does not pass is not timed. The clock runs a
CUDA graph (no Python between launches, as in decoding) whose calls go through copies of the weight that together exceed
the L2 cache 2.5 times, so that every call reads its weight from memory; activations may stay in L2, where the
layer before leaves them in a model. Triton compiles a second or two per kernel, so the gate runs in several processes,
which leave what they compiled in Triton's cache on disk.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.kernels import (
    codebook_launch,
    codebook_order,
    integer,
    integer_launch,
    launch,
    trellis_blocks,
    trellis_launch,
)
from quant.kernels.arranged import ORDERS
from quant.kernels.blocks import Config
from quant.kernels.codebook import Codebook, PackedCodebook, codebook_for
from quant.kernels.codebook_order import ArrangedCodebook
from quant.kernels.hadamard import random_signs
from quant.kernels.layouts import PackedTrellis, PackedUniform
from quant.kernels.order import Arranged, tiles
from quant.kernels.rotated import IDENTITY, Rotation
from quant.kernels.spec import DTYPES, Trellis, Uniform, rounds_inputs
from quant.kernels.trellis_order import ArrangedTrellis, chunks, units

Spec = Uniform | Trellis | Codebook
Ordered = Arranged | ArrangedTrellis | ArrangedCodebook
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PART = 1024  # rows; a check looks at the first and the last so many, to spare memory

SHAPES: dict[str, list[tuple[str, int, int]]] = {
    "Llama-3-70B": [("q, o", 8192, 8192), ("k, v", 1024, 8192), ("gate, up", 28672, 8192), ("down", 8192, 28672)],
    "Llama-3-8B": [("q, o", 4096, 4096), ("k, v", 1024, 4096), ("gate, up", 14336, 4096), ("down", 4096, 14336)],
    "Qwen3-30B-A3B expert": [("gate_up", 1536, 2048), ("down", 2048, 768)],
    "FLUX.1": [("q, k, v, o", 3072, 3072), ("mlp up", 12288, 3072), ("mlp down", 3072, 12288), ("out", 3072, 15360)],
    "DiT-XL/2": [("qkv", 3456, 1152), ("o", 1152, 1152), ("mlp up", 4608, 1152), ("mlp down", 1152, 4608)],
}
"""Model -> `(name, N, K)` of its linear layers, as transformers and diffusers store them; the most important first."""


@dataclass(frozen=True)
class Case:
    """A product to check or to time. `kind`: "fp16" or "bf16"; `config`: None for what `launch` chooses; `block`:
    of the rotation of a trellis's inputs, 0: there is none."""

    tokens: int
    rows: int
    columns: int
    spec: Spec
    kind: str = "bf16"
    config: Config | None = None
    block: int = 0


def wrong(case: Case, device: str = "cuda") -> str | None:
    """None where the kernel's result on random numbers is that of float64 within rounding, else what is wrong."""
    torch.manual_seed(0)
    rows, columns, dtype = case.rows, case.columns, HALVES[case.kind]
    packed = random_packed(case.spec, rows, columns, device)
    x = torch.randn((case.tokens, columns), device=device).to(dtype)
    turn = Rotation(case.block, random_signs(columns, 1).to(device)) if case.block else IDENTITY
    try:
        found = multiply(x, arrange(packed), case.config, turn).double()
    except Exception as error:  # any, so that one configuration that does not compile does not end a run
        return f"{case}: {type(error).__name__}: {str(error)[:300]}"
    if rounds_inputs(case.spec):
        expected = integer.matmul(x, packed)  # pyright: ignore[reportArgumentType]  one of a grid
        return None if torch.equal(found, expected.double()) else f"{case}: not the bits of integer.py"
    worst, x = 0.0, turn.apply(x.double())
    scales = packed.scales.double().abs().amax(1) if isinstance(packed, PackedUniform) else packed.row_scales().double()
    for start, stop in {(0, min(rows, PART)), (max(0, rows - PART), rows)}:
        weight = packed.dequantize(torch.float64, start, stop)
        exact = x @ weight.T
        allowed = rounding(case, x, weight, exact, scales[start:stop])
        worst = max(worst, float(((found[:, start:stop] - exact).abs() / allowed).nan_to_num(torch.inf).max()))
    return None if worst <= 1 else f"{case}: off by {worst:.3g} times what rounding explains"


def random_packed(spec: Spec, rows: int, columns: int, device: str) -> PackedUniform | PackedTrellis | PackedCodebook:
    if isinstance(spec, Uniform):
        return random_uniform(spec, rows, columns, device)
    return (random_trellis if isinstance(spec, Trellis) else random_codebook)(spec, rows, columns, device)  # pyright: ignore[reportArgumentType]


def random_uniform(spec: Uniform, rows: int, columns: int, device: str) -> PackedUniform:
    groups = (rows, spec.groups(columns))
    codes = torch.randint(0, 2**spec.bits, (rows, columns), dtype=torch.uint8, device=device)
    zeros = torch.randint(0, 2**spec.bits, groups, dtype=torch.uint8, device=device)
    scales = (torch.randn(groups, device=device) / 2**spec.bits).to(DTYPES[spec.scale_dtype])
    return PackedUniform.from_codes(spec, (rows, columns), codes, scales, None if spec.symmetric else zeros)


def random_trellis(spec: Trellis, rows: int, columns: int, device: str) -> PackedTrellis:
    """Any bits are states."""
    shapes = {name: tensor.shape for name, tensor in spec.tensors((rows, columns)).items()}
    weight = torch.randint(0, 256, shapes["weight"], dtype=torch.uint8, device=device)
    scales = torch.randint(0, 64, shapes["scales"], dtype=torch.uint8, device=device)
    peaks = torch.rand(shapes["peaks"], device=device).half()
    table = torch.rand(shapes["table"], device=device).mul_(4).sub_(2).half() if spec.code == "hyb" else None
    return PackedTrellis(spec, (rows, columns), weight, scales, peaks, table)


def random_codebook(spec: Codebook, rows: int, columns: int, device: str) -> PackedCodebook:
    """Entries between -1 and 1; the first columns are the finer ones."""
    spec = codebook_for(spec, (rows, columns))
    made = {"scales": torch.randint(0, 64, (rows,), dtype=torch.uint8, device=device)}
    for name, tensor in spec.tensors((rows, columns)).items():
        if tensor.dtype == "float16":
            made[name] = torch.rand(tensor.shape, device=device).mul_(2).sub_(float(name != "peaks")).half()
    fine = torch.arange(spec.finer(columns), device=device)
    count = sum(spec.vectors(rows))
    first, second = (
        torch.randint(0, 1 << bits, (count, size), dtype=torch.int32, device=device)
        for bits, size in ((spec.index_bits, columns), (spec.second_bits, len(fine)))
    )
    return PackedCodebook.from_indices(spec, (rows, columns), first, second, fine, made)


def arrange(packed: PackedUniform | PackedTrellis | PackedCodebook) -> Ordered:
    return ORDERS[type(packed.spec)].arrange(packed)


def rounding(case: Case, x: Tensor, weight: Tensor, exact: Tensor, scales: Tensor) -> Tensor:
    """How far a right result may lie from `exact` `[M, n]`, for rows `weight` `[n, K]` with largest scales `[n]`.

    Of K terms (a code, what it carries beside it, the zero point) with float32 roundoffs that are independent, and
    those of the weight where it is rounded itself or was in the table, eight standard deviations; the worst case, all
    roundoffs of one sign, grows with K instead of its root (Higham and Mary, SIAM J. Sci. Comput. 41, 2019) and would
    let anything pass.
    """
    spec, columns, eps = case.spec, case.columns, torch.finfo(HALVES[case.kind]).eps
    squares = x.square()
    if isinstance(spec, Trellis):
        largest = {"inst": 2.0, "mac": 1530.0, "sum": 378.0, "hyb": 2.0}[spec.code]
        rounded = 2.0**-11 * (spec.code == "inst") + eps * (case.tokens >= trellis_launch.UNPACK_FROM or case.block > 0)
    elif isinstance(spec, Codebook):
        largest, rounded = 2.0, eps * (case.tokens >= codebook_launch.UNPACK_FROM)
    else:
        largest = 2.0**spec.bits * 2 + (2176 if spec.bits == 8 else 128) * (case.kind == "bf16")
        rounded = eps * (case.tokens >= launch.UNPACK_FROM or spec.group_width(columns) % 32 > 0)
    allowed = 2.0**-21 * columns**0.5 * largest * squares.sum(1, keepdim=True).sqrt() * scales
    if isinstance(spec, Trellis) and spec.code in trellis_blocks.INTEGER:  # x to 2^-16 of its largest
        allowed += 8 * 3**-0.5 * 2.0**-16 * x.abs().amax(1, keepdim=True) * weight.square().sum(1).sqrt()
    allowed += eps * exact.abs()  # twice the rounding of the result: Triton's interpreter cuts bfloat16 off
    return allowed + 8 * rounded * (squares @ weight.square().T).sqrt()


def multiply(x: Tensor, arranged: Ordered, config: Config | None, turn: Rotation = IDENTITY) -> Tensor:
    """`matmul` of its kernels, or the kernel with one configuration."""
    module, turned = module_of(arranged), () if turn.signs is None else (turn,)  # which a trellis's kernel does too
    if config is None:
        return module.matmul(x, arranged, None, *turned)
    out = torch.full((len(x), arranged.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    module.run(x, arranged, config, out, *turned)
    return out


def module_of(arranged: Ordered) -> Any:
    """The module that launches its kernels."""
    if isinstance(arranged, ArrangedCodebook):
        return codebook_launch
    if isinstance(arranged, ArrangedTrellis):
        return trellis_launch
    return integer_launch if rounds_inputs(arranged.spec) else launch


def weights(rows: int, columns: int, spec: Spec, count: int) -> Sequence[Ordered]:
    """Random weights in kernel order on the GPU: any bits are codes, states or indices."""
    if isinstance(spec, Codebook):
        held = codebook_order.arrange(random_codebook(spec, rows, columns, "cuda"))
        copied = ({name: part.clone() for name, part in held.tensors().items()} for _ in range(count))
        return [codebook_order.weight_of(held.spec, held.shape, parts) for parts in copied]
    if isinstance(spec, Trellis):
        size = (count, chunks(columns) * spec.bits * units(rows, spec.length)[1] * 16)
        words = torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda")
        held = random_trellis(spec, rows, 1, "cuda")
        own = [(held.scales.clone(), held.peaks.clone(), held.table) for _ in words]
        return [ArrangedTrellis(spec, (rows, columns), w, *parts) for w, parts in zip(words, own, strict=True)]
    size = (count, tiles(columns) * 8 * spec.bits * rows)
    words = torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda")
    groups = (count, spec.groups(columns), rows)
    scales = torch.randn(groups, device="cuda").to(DTYPES[spec.scale_dtype])
    zeros = torch.randint(0, 2**spec.bits, groups, dtype=torch.uint8, device="cuda")
    parts = zip(words, scales, zeros, strict=True)
    return [Arranged(spec, (rows, columns), w, s, None if spec.symmetric else z) for w, s, z in parts]


def copies(nbytes: int) -> int:
    """How many buffers of `nbytes` exceed the L2 cache 2.5 times."""
    return max(2, -(-5 * torch.cuda.get_device_properties(0).L2_cache_size // (2 * nbytes)))


def clock(call: Callable[[int], Any], count: int, least: float, rounds: int = 9) -> float:
    """Seconds of one call: the median over `rounds` replays of a graph of calls `call(0)` to `call(count - 1)`, gone
    through again until it should last a millisecond. `least`: seconds that one call takes at the least."""
    for number in range(3):  # compiles, and lets cuBLAS choose
        call(number % count)
    torch.cuda.synchronize()
    calls = count * max(1, round(1e-3 / (least * count)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number % count)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1000 / calls


def bandwidth() -> float:
    """Bytes per second of an elementwise kernel from 1 GiB to another, read and written ones both counted. (In a graph
    a plain copy goes to the copy engines, which take 2.8 of an H200's 4.2 TB/s.)"""
    source, target = torch.randint(0, 2**30, (2, 2**28), device="cuda", dtype=torch.int32)
    return 2 * source.nbytes / clock(lambda _: torch.bitwise_not(source, out=target), 1, 1e-4)


def rate() -> float:
    """Flop per second of torch's bfloat16 product of random matrices of 8192 x 8192."""
    a, b = torch.randn((2, 8192, 8192), device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / clock(lambda _: a @ b, 1, 1e-3)


@contextmanager
def processes() -> Generator[ProcessPoolExecutor]:
    """Processes of their own CUDA contexts, idle unless given work."""
    with ProcessPoolExecutor(max(1, min(12, (cpu_count() or 1) - 2)), get_context("spawn")) as pool:
        yield pool


def facts(commit: str | None = None) -> dict[str, Any]:
    """The GPU, versions, commit and date that a figure depends on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "L2 bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit or asked.stdout.strip() or "not a git checkout",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
