"""The codebook kernels against the reference, on ragged sizes with poisoned outputs; and what compiles for GPUs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.kernels import arranged, codebook_launch
from quant.kernels.blocks import Config
from quant.kernels.codebook import Codebook, PackedCodebook
from quant.kernels.codebook_order import ArrangedCodebook, arrange, column_tiles, plain, row_tiles, width, words
from quant.kernels.dispatch import explain, matmul
from quant.kernels.hadamard import random_signs
from quant.kernels.layouts import LAYOUTS
from quant.kernels.rotated import IDENTITY, PackedRotated, Rotation
from quant.kernels.spec import LowRank, Rotated, Spec
from quant.linear import PackedLinear
from tests.ahead import OLD, Compiled, compile_for
from tests.guarded import guarded, intact
from tests.products import check_many_tokens, some
from tests.rerun import rerun


def weight(rows: int, columns: int, spec: Codebook, seed: int = 0) -> PackedCodebook:
    """Random indices; every group has finer columns of its own."""
    source = torch.Generator().manual_seed(seed)
    promised, fine = spec.tensors((rows, columns)), spec.finer(columns)
    draw = lambda high, *size: torch.randint(0, high, size, generator=source, dtype=torch.int32)  # noqa: E731
    made = {n: torch.randn(t.shape, generator=source).half() for n, t in promised.items() if t.dtype == "float16"}
    made["peaks"] = made["peaks"].abs()
    made["scales"] = draw(80, rows).byte()
    made["scales"][::7] = 255
    vectors = sum(spec.vectors(rows))
    indices = draw(1 << spec.index_bits, vectors, columns), draw(1 << spec.second_bits, vectors, fine)
    packed = PackedCodebook.from_indices(spec, (rows, columns), *indices, torch.arange(fine), made)
    if "columns" in packed.stored:
        chosen = torch.stack([torch.randperm(columns, generator=source) < fine for _ in packed.stored["peaks"]])
        packed.stored["columns"].copy_(arranged.codebook_order.pack(chosen.to(torch.uint8), 1))
    packed.validate()
    return packed


def bound(x: Tensor, packed: PackedCodebook, exact: Tensor) -> Tensor:
    """Of the error of one output: the rounding of the result (twice for bfloat16, which the interpreter cuts off) and a
    float32 roundoff for each of the sums, of up to two terms for a weight."""
    columns = packed.shape[1]
    largest = sum(float(packed.stored[name].abs().max()) for name in ("codebook", "second") if name in packed.stored)
    roundoff = torch.finfo(x.dtype).eps * (1 if x.dtype == torch.bfloat16 else 0.5)
    sums = 2.0**-24 * (2 * columns + 40) * largest * x.double().abs().sum(1)[:, None]
    return roundoff * exact.abs() + sums * packed.row_scales().double() + 2.0**-25


specs = st.builds(
    Codebook,
    length=st.integers(1, 16),
    index_bits=st.integers(1, 16),
    second_bits=st.sampled_from([0, 0, 1, 3, 11]),
    share=st.sampled_from([0.2, 0.5, 1.0]),
    rows=st.sampled_from([7, 48, 4096]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(spec=specs, rows=st.integers(1, 150), columns=st.integers(1, 300))
def test_kernel_order_and_back(spec: Codebook, rows: int, columns: int) -> None:
    packed = weight(rows, columns, spec)
    held = arrange(packed)
    back = plain(held).tensors()
    assert back.keys() == packed.tensors().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in packed.tensors().items())
    assert held.weight.numel() == sum(words(spec, packed.shape))
    if rows > spec.rows:
        for begin, end in pairwise([*range(0, rows, spec.rows), rows]):
            assert torch.equal(arrange(packed, begin, end).dequantize(), packed.dequantize(start=begin, stop=end))


@pytest.mark.parametrize("bits", [1, 6, 11, 16])
def test_kernel_order_is_what_its_description_says(bits: int) -> None:
    """Indices of both streams, bit by bit, in groups of more than a tile."""
    spec = Codebook(length=3, index_bits=bits, second_bits=5, share=0.4, rows=60)
    packed = weight(140, 300, spec)
    held, tiles, per = arrange(packed), row_tiles(spec, 140), -(-60 // 3)
    assert tiles == [2, 2, 1]
    first, second = held.weight.split(words(spec, packed.shape))

    def read(stream: Tensor, row: int, column: int, size: int, count: int) -> int:
        group, within = divmod(row, per)
        tile = (sum(tiles[:group]) + within // 16) * column_tiles(size) + column // 128
        cell, i, found = within % 16 * 4 + column % 128 // 32, column % 32, 0
        for b in range(count):
            word, at = (i * count + b) // 32, tile * 64 * count
            for piece in [4] * (count // 4) + [n for n in (2, 1) if count & n]:
                if word < piece:
                    break
                word, at = word - piece, at + 64 * piece
            found |= (int(stream[at + cell * piece + word]) >> (i * count + b) % 32 & 1) << b
        return found

    for row in range(0, sum(spec.vectors(140)), 7):
        exact = [part[0] for part in packed.indices(row, row + 1)]
        assert all(read(first, row, k, 300, bits) == int(exact[0][k]) for k in range(0, 300, 11))
        assert all(read(second, row, k, 120, 5) == int(exact[1][k]) for k in range(0, 120, 7))
    assert held.columns is not None
    assert held.columns[1, :120].tolist() == packed.fine(1).tolist()
    assert held.columns[1, 120 + int(packed.fine(1)[5])] == 5
    assert held.codebook.shape == (3, 1 << bits, width(3)) == (3, 1 << bits, 4)


def test_only_whole_groups_are_cut_out() -> None:
    with pytest.raises(ValueError, match="rows 16 to 64 of groups of 32; whole ones are expected"):
        arrange(weight(64, 4, Codebook(length=2, index_bits=3, rows=32)), 16)


def test_configurations() -> None:
    assert codebook_launch.choose(1, 8192, 8192, 6, 132) == Config(8, 96, 1, 1, 22)
    assert codebook_launch.choose(16, 64, 32, 6, 132).splits == 1  # one tile cannot be split
    assert [codebook_launch.choose(16, 8192, 8192, length, 132).bm for length in (8, 9)] == [16, 8]
    for columns in (100, 256, 1000, 8192, 28672):
        for config in codebook_launch.candidates(1, 4096, columns, 6, 132):
            each = -(-column_tiles(columns) // config.splits)
            assert (config.splits - 1) * each < column_tiles(columns) <= config.splits * each


def test_rows_of_the_table_say_what_they_multiply() -> None:
    x, held = some(1, 60, torch.float16), arrange(weight(4, 60, Codebook(length=2, index_bits=4)))
    lines = explain(x, held).splitlines()
    assert lines[:2] == [f"{name}: refuses, the weight is a codebook" for name in ("triton", "triton-trellis")]
    assert "triton-codebook: refuses, x is on cpu: Triton kernels run on CUDA devices" in lines[2]
    assert lines[3] == "torch: runs"
    assert torch.equal(matmul(x, held), x @ plain(held).dequantize(torch.float16).T)


def test_operators_have_shape_rules() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, held = torch.empty((5, 512), dtype=torch.float16), torch.empty(9, dtype=torch.int32)
        table, scales = torch.empty((1, 16, 4), dtype=torch.float16), torch.empty(256, dtype=torch.uint8)
        parts, sizes = (held, table, None, None, scales, table[0, 0, :1]), (256, 512, 4, 4, 0, 0, 4096)
        out = torch.ops.bitwright.codebook_matmul(x, *parts, None, *sizes, torch.float16)
        assert (out.shape, out.dtype) == ((5, 256), torch.float16)
        part = torch.ops.bitwright.codebook_dequantize(*parts, *sizes, torch.bfloat16, 8, 40)
        assert (part.shape, part.dtype) == ((32, 512), torch.bfloat16)


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    rerun(__file__)


CASES = [
    (1, 100, 150, Codebook(length=6, index_bits=11, second_bits=2, share=0.24), torch.float16, 8, 2),
    (2, 40, 128, Codebook(length=5, index_bits=9, rows=20), torch.bfloat16, 8, 1),
    (3, 30, 300, Codebook(length=3, index_bits=7, second_bits=9, share=0.3, rows=21), torch.float16, 8, 3),
    (16, 33, 132, Codebook(length=8, index_bits=12, second_bits=5, share=1.0), torch.bfloat16, 16, 2),
    (17, 20, 100, Codebook(length=1, index_bits=3, second_bits=1, share=0.1, rows=16), torch.float16, 16, 1),
    (3, 20, 40, Codebook(length=16, index_bits=16, second_bits=10, share=0.5), torch.bfloat16, 8, 1),
]


@pytest.mark.parametrize("case", CASES)
def interpreted_matmul(case: tuple[Any, ...]) -> None:
    tokens, rows, columns, spec, dtype, bm, splits = case
    packed = weight(rows, columns, spec)
    held, x = arrange(packed), some(tokens, columns, dtype) * torch.tensor(0.5) ** (torch.arange(tokens) % 8)[:, None]
    x, bias = x.to(dtype), some(1, rows, dtype, 2)[0]
    exact = x.double() @ packed.dequantize(torch.float64).T
    allowed, found = bound(x, packed, exact), list[Tensor]()
    config = Config(bm, 16 * spec.length, 1, 1, splits)
    for extra in ((None, bias)[tokens % 2],) * min(2, splits):
        out, buffer = guarded((tokens, rows), dtype)
        parts = held.weight, held.codebook, held.second, held.columns, held.scales, held.peaks, extra, out
        sizes = spec.length, spec.index_bits, spec.second_bits, spec.finer(columns), spec.rows
        codebook_launch.launch(x, *parts, rows, columns, *sizes, config)
        expected = exact if extra is None else exact + bias.double()
        error = (out.double() - expected).abs()
        assert bool((error <= allowed + 2 * torch.finfo(dtype).eps * expected.abs()).all()), float(error.max())
        assert intact(buffer)
        found.append(out)
    assert torch.equal(found[0], found[-1])  # splits leave their counters as they found them


@pytest.mark.parametrize("case", CASES)
def interpreted_dequantize(case: tuple[Any, ...]) -> None:
    packed = weight(*case[1:4])
    held = arrange(packed)
    assert torch.equal(held.dequantize(torch.float32), packed.dequantize())
    assert torch.equal(held.dequantize(torch.float16, 5, 19), packed.dequantize(torch.float16, 5, 19))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of infinity times 0
def interpreted_bfloat16_of_any_size() -> None:
    """From almost the smallest normal numbers to the largest, and zeros; infinities come out as what is not finite."""
    packed = weight(20, 140, Codebook(length=4, index_bits=6, second_bits=3, share=0.3))
    held, x = arrange(packed), some(5, 140, torch.bfloat16)
    x *= torch.tensor([2.0**-118, 2.0**110, 0.0, 1.0, torch.inf], dtype=torch.bfloat16)[:, None]
    found = codebook_launch.matmul(x, held)
    exact = x.double() @ packed.dequantize(torch.float64).T
    small = 2.0**-126  # results below are flushed or rounded coarsely
    assert bool(((found.double() - exact).abs()[:4] <= (bound(x, packed, exact) + small)[:4]).all())
    assert not torch.isfinite(found[4, 1:7]).any()


def interpreted_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = weight(70, 40, Codebook(length=4, index_bits=8, second_bits=2, share=0.3, rows=32))
    check_many_tokens(codebook_launch, packed, arrange(packed), monkeypatch)


BASE = Codebook(length=3, index_bits=5, second_bits=2, share=0.25, rows=36)


def wrapped(spec: Spec, rows: int, columns: int) -> dict[str, Tensor]:
    """Random tensors of a codebook with a rotation and a branch around it."""
    base = weight(rows, columns, spec.core)  # pyright: ignore[reportArgumentType]
    inner = spec.base if isinstance(spec, LowRank) else spec
    made = base.tensors()
    if isinstance(inner, Rotated):
        made = PackedRotated.around(inner, base, Rotation(4, random_signs(columns, 1)), IDENTITY).tensors()
    if isinstance(spec, LowRank):
        made |= {"lora_a": some(2, columns, torch.float16) / 8, "lora_b": some(rows, 2, torch.float16) / 8}
    return made


@pytest.mark.parametrize("spec", [BASE, LowRank(Rotated(BASE, block=8), rank=2)])
def interpreted_module(spec: Spec) -> None:
    """A packed linear in kernel order multiplies through the table, saves what the checkpoint held, and is one graph;
    experts are arranged one by one."""
    rows, columns = 72, 36
    module, stored = PackedLinear(spec, rows, columns, bias=True), wrapped(spec, rows, columns)
    packed = LAYOUTS[spec.layout].from_tensors(spec, (rows, columns), stored)
    module.load_state_dict({**stored, "bias": torch.zeros(rows)})
    x = some(5, columns, torch.float16)
    module.half()
    assert module.slots()[0].arranged
    assert explain(x, module.operand).splitlines()[2] == "triton-codebook: runs"
    exact = x.double() @ packed.dequantize(torch.float32).double().T
    size = 2.0**-8 * x.double().norm(dim=1)[:, None] * packed.dequantize().double().norm(dim=1).max()
    assert bool(((module(x).double() - exact).abs() <= size).all())  # x, its rotation and sums rounded to float16
    whole: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(x), module(x))
    for name, tensor in stored.items():
        assert torch.equal(module.state_dict()[name], tensor)
    assert torch.equal(module.unpack(torch.float32).weight, packed.dequantize())  # pyright: ignore[reportArgumentType]
    assert torch.isfinite(torch.autograd.grad(module(x.requires_grad_()).sum(), x)[0]).all()
    for begin in (0, 36):
        held = arranged.kernel_order(packed, begin, begin + 36)
        found = arranged.weight_of(spec, (36, columns), held)
        assert torch.equal(found.dequantize(), packed.dequantize()[begin : begin + 36])
        assert torch.equal(arranged.checkpoint_order(spec, (36, columns), held).dequantize(), found.dequantize())


def interpreted_modules_hold_kernel_order() -> None:
    packed = weight(72, 36, BASE)
    module = PackedLinear(packed.spec, 72, 36, bias=False)
    module.load_state_dict(packed.tensors())
    assert isinstance(module.operand, ArrangedCodebook)
    assert torch.equal(module.packed.dequantize(), packed.dequantize())


SHAPES = [(6, 11, 4, "fp16", 1), (8, 12, 0, "bf16", 16), (5, 11, 1, "bf16", 1), (8, 16, 16, "fp16", 8)]
# every shape and three GPUs, not every pair: a compilation takes ten seconds
PAIRS = list(zip((80, 90, 100, 90), SHAPES, strict=True))


@pytest.mark.parametrize(("capability", "case"), PAIRS)
def compiled_for(capability: int, case: tuple[Any, ...]) -> None:
    made = compiled(capability, *case)
    assert made.fits(64 if OLD else 0), (made.registers, made.spilled, made.shared)
    assert made.shared <= 1024  # so the tables have the first-level cache to themselves
    lookups = sum(n for op, n in made.ops.items() if op.startswith("LDG") and "CONSTANT" in op and "STRONG" not in op)
    assert lookups >= 64, made.ops  # a vector is one load, two beyond 16 bytes


def compiled(capability: int, length: int, bits: int, second: int, dtype: str, tokens: int) -> Compiled:
    """The default configuration for a matrix of 8192 x 8192."""
    from quant.kernels.codebook_product import codebook_kernel

    config = codebook_launch.choose(tokens, 8192, 8192, length, 132)
    types = dict.fromkeys(("x", "bias", "out"), f"*{dtype}") | dict.fromkeys(("table", "partial"), "*fp32")
    types |= dict.fromkeys(("codebook", "second", "peaks"), "*fp16") | {"scales": "*u8"}
    types |= dict.fromkeys(("weight", "columns", "counters"), "*i32")
    types |= dict.fromkeys(("M", "N", "K", "stride", "count", "each", "few", "more", "per"), "i32")
    constants = codebook_launch.constants(bits, second, length, 4096, second < 16, torch.device("cuda")) | {
        "BM": config.bm, "SPLIT": config.splits > 1, "EVEN": True, "BIAS": True,
    }  # fmt: skip
    return compile_for(capability, codebook_kernel, types, constants, config.warps, config.stages)


def compiled_decoding() -> None:
    from quant.kernels.codebook_decode import codebook_decode_kernel

    types = {"weight": "*i32", "columns": "*i32", "scales": "*u8", "table": "*fp32", "out": "*bf16"}
    types |= dict.fromkeys(("codebook", "second", "peaks"), "*fp16")
    types |= dict.fromkeys(("first", "stop", "K", "tile", "tiles", "count", "few", "per"), "i32")
    constants = codebook_launch.constants(11, 4, 6, 4096, True, torch.device("cuda"))
    made = compile_for(90, codebook_decode_kernel, types, constants, 1, 1)
    assert made.fits(), (made.registers, made.spilled, made.shared)
