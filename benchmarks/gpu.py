"""Everything that wants a GPU, in one command that leaves its results as it goes and fits in nine minutes:

    python benchmarks/gpu.py [--quick] [--commit NAME]

1. `quant.kernels.benchmark --quick`: the products of real models against bfloat16 and the roofline.
2. Decoding: a model shaped like Llama-3-8B with random weights, batch 1, a cache of 1024 tokens, one CUDA graph per
   token; bfloat16, 4 bits and 2 bits in groups of 128, and a trellis of 2 bits, without rotated inputs and with them.
   Embedding and head stay in bfloat16.
   With plain torch between the products, and with `torch.compile(fullgraph=True)` of a block.
3. GPTQ: `quant.quantize` of models of one and of three blocks (4096 wide, 14336 inside, 226 million weights per block
   where Llama-3-8B has 218) at 4 bits, group 128; the difference is two blocks, free of all that is done once.
4. GPTQ's kernel on a block of columns of 128 experts, in one launch and in one for each; the rotation of one token, by
   itself, before a product and in it; and the trellis search of a column of 16896 sequences, whose first 200 must come
   out as on the CPU.

`--quick` leaves out the second half of 2. Without a GPU it ends with a sentence and exit code 2.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import synthetic
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

import quant
from quant.kernels import benchmark, launch, measure, trellis, trellis_launch, viterbi
from quant.kernels.dispatch import matmul
from quant.kernels.hadamard import hadamard, random_signs
from quant.kernels.order import Arranged
from quant.kernels.rotated import PackedRotated, Rotation
from quant.kernels.spec import Rotated, Trellis
from quant.kernels.trellis_order import ArrangedTrellis

GROUP = 128
Weight = Tensor | Arranged | ArrangedTrellis | PackedRotated
SPECS = {
    "bfloat16": None,
    "4 bits": quant.Uniform(bits=4, group_size=GROUP),
    "2 bits": quant.Uniform(bits=2, group_size=GROUP),
    "2 bits, trellis": Trellis(bits=2),
    "2 bits, trellis, rotated inputs": Rotated(Trellis(bits=2)),
}

TURNED = ["rows", "columns", "alone us", "product us", "one after the other us", "in one us"]


@dataclass(frozen=True)
class Sizes:
    """Of Llama-3-8B."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    width: int = 128
    blocks: int = 32
    vocabulary: int = 128256
    context: int = 1024


def times(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return linear(x, weight)
    if isinstance(weight, PackedRotated):
        return matmul(x, weight)
    return (launch if isinstance(weight, Arranged) else trellis_launch).matmul(x, weight)


def size_of(weight: Weight) -> int:
    """Bytes."""
    if isinstance(weight, Tensor):
        return weight.nbytes
    if isinstance(weight, PackedRotated):
        return size_of(weight.base) + weight.input_signs.nbytes  # pyright: ignore[reportArgumentType]
    return sum(part.nbytes for part in weight.tensors().values())


def block(
    x: Tensor, weights: list[Weight], keys: Tensor, values: Tensor, position: Tensor, angles: Tensor, mask: Tensor
) -> Tensor:
    """One decoder block for one token: `x` `[1, hidden]`; caches `[1, key heads, context, width]`, written in place."""
    q, k, v, o, gate, up, down = weights
    heads, _, width = keys.shape[1:]
    normed = rms_norm(x, x.shape[1:])
    turned = torch.cat((times(normed, q), times(normed, k)), 1).view(-1, 2, width // 2)
    a, b = turned.unbind(1)
    turned = torch.cat((a * angles[0] - b * angles[1], b * angles[0] + a * angles[1]), 1)
    keys.index_copy_(2, position, turned[-heads:].view(1, heads, 1, width))
    values.index_copy_(2, position, times(normed, v).view(1, heads, 1, width))
    query = turned[:-heads].view(1, heads, -1, width)  # the heads that share a key are its queries
    mixed = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    x = x + times(mixed.reshape(1, -1), o)
    normed = rms_norm(x, x.shape[1:])
    return x + times(silu(times(normed, gate)) * times(normed, up), down)


class Decoder:
    """Random weights; each `step` feeds the likeliest token back."""

    def __init__(self, sizes: Sizes, make: Callable[[int, int], Weight], device: str):
        self.sizes, h, i, w = sizes, sizes.hidden, sizes.inner, sizes.width
        key = sizes.key_heads * w
        shapes = [(sizes.heads * w, h), (key, h), (key, h), (h, sizes.heads * w), (i, h), (i, h), (h, i)]
        half = {"device": device, "dtype": torch.bfloat16}
        self.blocks = [[make(*shape) for shape in shapes] for _ in range(sizes.blocks)]
        cache = (1, sizes.key_heads, sizes.context, w)
        self.caches = [(torch.zeros(cache, **half), torch.zeros(cache, **half)) for _ in range(sizes.blocks)]
        self.embedding = torch.randn((sizes.vocabulary, h), **half)
        self.head = torch.randn((sizes.vocabulary, h), **half) * h**-0.5
        self.token, self.position = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.places = torch.arange(sizes.context, device=device)
        self.speeds = 500000.0 ** (-torch.arange(0, w, 2, device=device) / w)
        self.block: Callable[..., Tensor] = block

    def step(self) -> None:
        x = self.embedding[self.token]
        turn = self.position * self.speeds
        angles = torch.stack((turn.cos(), turn.sin())).to(x.dtype)
        group = self.sizes.heads // self.sizes.key_heads
        mask = (self.places <= self.position).expand(1, 1, group, -1)
        for weights, (keys, values) in zip(self.blocks, self.caches, strict=True):
            x = self.block(x, weights, keys, values, self.position, angles, mask)
        self.token.copy_(linear(rms_norm(x, x.shape[1:]), self.head).argmax(1))
        self.position.add_(1)

    @property
    def nbytes(self) -> int:
        """Of the linear layers and the head: what one token reads."""
        return sum(size_of(weight) for row in self.blocks for weight in row) + self.head.nbytes


def made(rows: int, columns: int, spec: measure.Spec | Rotated | None) -> Weight:
    """Random, of about unit gain, on the GPU."""
    if isinstance(spec, Rotated):
        base, signs = made(rows, columns, spec.base), random_signs(columns, 1).cuda()  # pyright: ignore[reportArgumentType]
        sides = torch.tensor([1, 0], dtype=torch.uint8).cuda()
        return PackedRotated(spec, (rows, columns), base, sides, signs, in_order=True)  # pyright: ignore[reportArgumentType]
    if spec is None:
        return torch.randn((rows, columns), device="cuda", dtype=torch.bfloat16) * columns**-0.5
    found = measure.weights(rows, columns, spec, 1)[0]
    if isinstance(found, ArrangedTrellis):
        found.scales.zero_()
        found.peaks.fill_(columns**-0.5 / trellis.deviation(trellis.state_values(found.spec, found.table)))
        return found
    assert isinstance(found, Arranged)
    found.scales.mul_(columns**-0.5 / 2**found.spec.bits)
    return found


@torch.no_grad()
def decoding(name: str, compiled: bool, tokens: int = 256) -> dict[str, Any]:
    """Tokens per second of one of SPECS."""
    decoder = Decoder(Sizes(), lambda rows, columns: made(rows, columns, SPECS[name]), "cuda")
    if compiled:
        decoder.block = torch.compile(block, fullgraph=True, dynamic=False)
    for _ in range(2):
        decoder.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    for _ in range(16):
        graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(tokens):
        graph.replay()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / tokens
    return {
        "weights": name,
        "between": "torch.compile" if compiled else "torch",
        "GB read": decoder.nbytes / 1e9,
        "tokens/s": 1 / seconds,
        "GB/s": decoder.nbytes / 1e9 / seconds,
    }


def quantizing(blocks: int) -> dict[str, Any]:
    """Seconds of `quant.quantize` of a random model, checkpoint and verification included."""
    with tempfile.TemporaryDirectory() as folder:
        model = synthetic.write(Path(folder) / "model", record.DEMO, blocks, 4096, 14336)
        settings = quant.Settings(device="cuda", dtype="bfloat16")
        began = time.perf_counter()
        quant.quantize(str(model), Path(folder) / "out", quant.load_recipe("gptq"), settings=settings)
        torch.cuda.synchronize()
        return {"blocks": blocks, "seconds": time.perf_counter() - began}


@torch.no_grad()
def batched(experts: int = 128, rows: int = 1536, columns: int = 128, device: str = "cuda") -> dict[str, Any]:
    """Microseconds of GPTQ's kernel on the experts of Qwen3-30B-A3B's gate_up, together and one after another; first
    that they come out alike."""
    from quant.kernels.feedback import round_columns

    shape = (experts, columns, rows)
    work = torch.randn(shape, device=device)
    lines = torch.randn((experts, columns, columns), device=device).mul_(0.03).triu_(1) + torch.eye(columns).to(device)
    scales, zeros = (torch.full((experts, 1, rows), value, device=device).expand(shape) for value in (0.2, 8.0))
    inputs = (work, lines, scales, zeros)

    def run(step: int) -> list[Tensor]:
        outputs = [torch.empty_like(work), torch.empty_like(work), torch.empty_like(work, dtype=torch.uint8)]
        for part in (slice(start, start + step) for start in range(0, experts, step)):
            round_columns(*(t[part] for t in inputs), 4, *(t[part] for t in outputs))
        return outputs

    if not all(map(torch.equal, run(experts), run(1))):
        raise RuntimeError("experts in one launch do not come out as in one launch each")
    row: dict[str, Any] = {"experts": experts, "rows": rows, "columns": columns}
    if device == "cuda":
        row["together us"] = 1e6 * measure.clock(lambda _: run(experts), 1, 1e-4)
        row["one by one us"] = 1e6 * measure.clock(lambda _: run(1), 1, 1e-3)
    return row


def rotating(rows: int, columns: int, device: str = "cuda") -> dict[str, Any]:
    """Microseconds that a block Hadamard takes for one token in bfloat16, by itself, and with a product of 2 bits."""
    x, signs = torch.randn((1, columns), device=device).bfloat16(), random_signs(columns, 1).to(device)
    row: dict[str, Any] = {"rows": rows, "columns": columns, "of": tuple(hadamard(x, 128, signs).shape)}
    if device == "cuda":
        packed = measure.weights(rows, columns, Trellis(bits=2), measure.copies(rows * columns // 4))

        def microseconds(call: Callable[[Any], Tensor]) -> float:
            return 1e6 * measure.clock(lambda i: call(packed[i]), len(packed), 1e-5)

        row["alone us"] = 1e6 * measure.clock(lambda _: hadamard(x, 128, signs), 1, 1e-6)
        row["product us"] = microseconds(lambda w: trellis_launch.matmul(x, w))
        row["one after the other us"] = microseconds(lambda w: trellis_launch.matmul(hadamard(x, 128, signs), w))
        row["in one us"] = microseconds(lambda w: trellis_launch.matmul(x, w, None, Rotation(128, signs)))
    return row


def searching(sequences: int = 16896, device: str = "cuda") -> dict[str, Any]:
    """Weights per second of the search for the default 2-bit trellis; first that its states are the CPU's."""
    spec, x = Trellis(bits=2), torch.randn((sequences, 256), generator=torch.Generator().manual_seed(0))
    table = trellis.state_values(spec, None)
    table = table / trellis.deviation(table) * 1.03
    there = [part.to(device) for part in (x, torch.ones_like(x), table)]
    found = viterbi.search(*there, spec.step)
    here = viterbi.search(x[:200], torch.ones_like(x[:200]), table, spec.step)
    if not torch.equal(found[:200].cpu(), here.to(found.dtype)):
        raise RuntimeError("the search does not find the states that the CPU finds")
    began = time.perf_counter()
    viterbi.search(*there, spec.step)[0, 0].item()  # waits for the GPU
    return {"sequences": sequences, "window": spec.window, "weights/s": x.numel() / (time.perf_counter() - began)}


def main(arguments: Sequence[str] | None = None) -> int:
    options = record.parser(__doc__)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--commit", help="name of the commit, where there is no git")
    options.add_argument("--seconds", type=float, default=210, help="for the kernels")
    args = options.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No CUDA device was found, so there is nothing to measure.")
        return 2
    named = ["--commit", args.commit] if args.commit else []
    code = benchmark.main(["--quick", "--seconds", str(args.seconds), "--results", str(args.results), *named])
    decoded, solved, rounded, turned, searched = (list[dict[str, Any]]() for _ in range(5))
    notes = [f"{torch.cuda.get_device_name()}; commit {measure.facts(args.commit)['commit']}"]

    def save() -> None:
        base = {row["between"]: row["tokens/s"] for row in decoded if row["weights"] == "bfloat16"}
        for row in decoded:
            row["times bfloat16"] = row["tokens/s"] / base[row["between"]] if row["between"] in base else None
        parts = [
            ("Decoding", decoded, ["weights", "between", "GB read", "tokens/s", "times bfloat16", "GB/s"]),
            ("GPTQ", solved, ["blocks", "seconds"]),
            ("GPTQ's kernel on experts", rounded, ["experts", "rows", "columns", "together us", "one by one us"]),
            ("Rotating one token, blocks of 128, and a product of a 2-bit trellis", turned, TURNED),
            ("Search for paths, 2 bits, sequences of 256", searched, ["sequences", "window", "weights/s"]),
        ]
        record.save(args.results, "gpu", "On a GPU", parts, notes, gpu=torch.cuda.get_device_name())

    def keep(rows: list[dict[str, Any]], work: Callable[[], dict[str, Any]]) -> None:
        try:
            rows.append(work())
        except Exception as error:  # what else was measured, and is still to come, counts
            notes.append(f"failed: {type(error).__name__}: {str(error)[:300]}")
        torch.cuda.empty_cache()
        save()

    for name in SPECS:
        keep(decoded, lambda name=name: decoding(name, False))
    keep(rounded, batched)
    for rows, columns in ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192), (8192, 28672)):
        keep(turned, lambda rows=rows, columns=columns: rotating(rows, columns))
    keep(searched, searching)
    for blocks in (1, 1, 3):  # the first also compiles
        keep(solved, lambda blocks=blocks: quantizing(blocks))
    if len(solved) == 3:
        each = (solved[2]["seconds"] - solved[1]["seconds"]) / 2
        notes.append(f"GPTQ: a block takes {each:.2f} s; 32 such blocks would take {32 * each:.0f} s (not measured).")
        save()
    for name in () if args.quick else SPECS:
        keep(decoded, lambda name=name: decoding(name, True))
    return code


if __name__ == "__main__":
    sys.exit(main())
