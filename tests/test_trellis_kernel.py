"""The trellis kernels against the reference, on ragged sizes with poisoned outputs; and what compiles for GPUs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.kernels import arranged, trellis_blocks, trellis_launch
from quant.kernels.blocks import Config
from quant.kernels.dispatch import explain, matmul
from quant.kernels.hadamard import hadamard, random_signs
from quant.kernels.layouts import LAYOUTS, PackedTrellis
from quant.kernels.rotated import IDENTITY, PackedRotated, Rotation
from quant.kernels.spec import DTYPES, LowRank, Rotated, Spec, Trellis
from quant.kernels.trellis_order import ArrangedTrellis, arrange, chunks, plain, units
from quant.linear import PackedLinear
from tests.ahead import SHARED_LIMIT, Compiled, compile_for
from tests.guarded import guarded, intact
from tests.products import check_many_tokens, some
from tests.rerun import rerun


def weight(rows: int, columns: int, spec: Trellis, seed: int = 0) -> PackedTrellis:
    """Any bits are a trellis."""
    source = torch.Generator().manual_seed(seed)
    promised = spec.tensors((rows, columns))
    made = {
        "weight": torch.randint(0, 256, promised["weight"].shape, dtype=torch.uint8, generator=source),
        "scales": torch.randint(0, 80, promised["scales"].shape, dtype=torch.uint8, generator=source),
        "peaks": torch.rand(promised["peaks"].shape, generator=source).half(),
    }
    made["scales"][::7] = 255
    if spec.code == "hyb":
        made["table"] = (4 * torch.rand(promised["table"].shape, generator=source) - 2).half()
    return PackedTrellis.from_tensors(spec, (rows, columns), made)


def bound(x: Tensor, packed: PackedTrellis, exact: Tensor, integers: bool = True) -> Tensor:
    """Of the error of one output: the rounding of the result (twice for bfloat16, which the interpreter cuts off); that
    of the table's float16, which the kernel does not do, or, of `integers`, that of `x` to half of 1 / 32512 of its
    largest; and a float32 roundoff for each of the sums, whose terms are a half of a value, or a value and what it
    carries."""
    code, columns = packed.spec.code, packed.shape[1]
    largest = {"inst": 2.0, "mac": 1020.0 + 510.0, "sum": 252.0 + 126.0, "hyb": 2.0}[code]
    roundoff = torch.finfo(x.dtype).eps * (1 if x.dtype == torch.bfloat16 else 0.5)
    length = x.double().abs()
    allowed = roundoff * exact.abs() + 2.0**-24 * (2 * columns + 32) * largest * length.sum(1)[:, None] * (
        packed.row_scales().double()
    )
    weight = packed.dequantize(torch.float64).abs()
    if code == "inst":
        return allowed + 2.0**-11 * length @ weight.T
    rounded = integers and code in trellis_blocks.INTEGER
    return allowed + (length.amax(1)[:, None] * (0.5 / 32512) * weight.sum(1) if rounded else 0.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150), columns=st.integers(1, 70), bits=st.integers(1, 4), window=st.integers(8, 16),
    length=st.sampled_from([32, 64, 96, 256]),
)  # fmt: skip
def test_kernel_order_and_back(rows: int, columns: int, bits: int, window: int, length: int) -> None:
    packed = weight(rows, columns, Trellis(bits=bits, window=window, length=length))
    held = arrange(packed)
    for name, tensor in plain(held).tensors().items():
        assert torch.equal(tensor, packed.tensors()[name])
    assert torch.equal(held.dequantize(torch.float32, 0, rows), packed.dequantize())
    if rows % length == 0 and rows > length:
        for begin, end in pairwise(range(0, rows + 1, length)):
            assert torch.equal(arrange(packed, begin, end).dequantize(), packed.dequantize()[begin:end])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_kernel_order_is_what_its_description_says(bits: int) -> None:
    """Every state of every row, from the words, for whole sequences and a ragged one."""
    packed = weight(64 + 21, 35, Trellis(bits=bits, window=13, length=32, code="inst"))
    held = arrange(packed)
    whole, total = units(85, 32)
    words = held.weight.view(chunks(35), bits, total, 4, 4).long() & 0xFFFFFFFF
    assert (whole, total) == (4, 8)

    def half(unit: int, column: int, number: int) -> int:
        chunk, lane, side, i = column // 32, column % 32 // 8, column % 8 // 4, column % 4
        if number == bits - 1 and bits % 2:
            return int(words[chunk, number, unit, lane, i]) >> 16 * side & 0xFFFF
        return int(words[chunk, number // 2 * 2 + side, unit, lane, i]) >> 16 * (number % 2) & 0xFFFF

    for row in range(85):
        number, place = divmod(row, 32)
        unit, j = divmod(row, 16)
        after = unit - 1 if unit < whole and unit % 2 else unit + 1
        at, shift = divmod(bits * j, 16)
        for column in range(0, 35, 5):
            then = half(unit, column, at + 1) if at + 1 < bits else half(after, column, 0)
            state = (half(unit, column, at) | then << 16) >> shift & (1 << 13) - 1
            assert state == int(packed.states(number)[column, place])


def test_only_whole_sequences_are_cut_out() -> None:
    with pytest.raises(ValueError, match="rows 16 to 64 of sequences of 32; whole ones are expected"):
        arrange(weight(64, 4, Trellis(length=32)), 16)


def test_configurations() -> None:
    assert trellis_blocks.choose(1, 8192, 8192, 132) == Config(2, 256, 8, 1, 4)
    assert trellis_blocks.choose(1, 28672, 8192, 132) == Config(2, 256, 16, 1, 1)
    assert trellis_blocks.choose(8, 28672, 8192, 132) == Config(8, 256, 4, 1, 2)
    assert trellis_blocks.choose(16, 1024, 8192, 132) == Config(16, 256, 4, 1, 16)  # few parts: the last program adds
    assert trellis_blocks.choose(1, 28672, 8192, 132, "inst") == Config(8, 256, 2, 1, 7)
    assert trellis_blocks.choose(1, 256, 28672, 1, warps=1).splits == 2  # integers stay below 2^31
    assert trellis_blocks.choose(16, 64, 32, 132).splits == 1  # one chunk cannot be split
    assert trellis_blocks.choose(17, 28672, 8192, 132, "inst").bm == 16
    for columns in (100, 256, 1000, 8192, 28672):
        config = trellis_blocks.choose(1, 4096, columns, 132)
        each = -(-chunks(columns) // (config.splits * config.warps)) * config.warps
        assert (config.splits - 1) * each < chunks(columns) <= config.splits * each  # no split is without work
        assert trellis_blocks.turns(1, "twin", config, 32, chunks(columns))
    eight = Config(2, 256, 8, 1, 4)
    assert trellis_blocks.turns(1, "twin", eight, 256, 256)
    assert not trellis_blocks.turns(2, "twin", eight, 128, 256)  # one token only
    assert not trellis_blocks.turns(1, "twin", Config(4, 256, 8, 1, 4), 128, 256)  # and the least that a program takes
    assert not trellis_blocks.turns(1, "twin", eight, 128, 96)  # a block would be in two warps
    assert not trellis_blocks.turns(1, "inst", Config(8, 256, 8, 1, 4), 128, 256)


@pytest.mark.parametrize(
    ("rows", "columns", "config", "blocks"),
    [
        (8192, 8192, Config(2, 128, 8, 1, 2), 2),
        (8192, 28672, Config(2, 128, 16, 1, 2), 2),
        (1024, 8192, Config(2, 128, 8, 1, 8), 8),
        (4096, 4096, Config(2, 256, 8, 1, 4), 4),
        (14336, 4096, Config(2, 256, 8, 1, 2), 2),
        (28672, 8192, Config(2, 256, 16, 1, 1), 1),  # every multiprocessor has rows of its own
        (4096, 14336, Config(2, 256, 8, 1, 8), 1),  # clusters would leave half of them idle
        (64, 64, Config(2, 256, 8, 1, 1), 1),
    ],
)
def test_clusters(rows: int, columns: int, config: Config, blocks: int) -> None:
    """What was fastest on an H200."""
    assert trellis_blocks.choose(1, rows, columns, 132, clusters=True) == config
    assert trellis_blocks.blocks_of(config, 1, rows, "twin", 132, True) == blocks
    assert trellis_blocks.blocks_of(config, 1, rows, "twin", 132, False) == 1
    assert trellis_blocks.blocks_of(config, 2, rows, "twin", 132, True) == 1


@given(rows=st.integers(1, 40000), columns=st.integers(1, 60000), code=st.sampled_from(["twin", "mac", "sum", "inst"]))
def test_no_block_is_without_a_chunk(rows: int, columns: int, code: str) -> None:
    config = trellis_blocks.choose(1, rows, columns, 132, code, clusters=True)
    if trellis_blocks.blocks_of(config, 1, rows, code, 132, True) > 1:
        assert trellis_blocks.busy(config, chunks(columns))
    assert config.warps <= (16 if code == "twin" else 8)  # or registers spill


def test_rows_of_the_table_say_what_they_multiply() -> None:
    x, held = some(1, 60, torch.float16), arrange(weight(4, 60, Trellis()))
    lines = explain(x, held).splitlines()
    assert lines[0] == "triton: refuses, the weight is a trellis"
    assert "triton-trellis: refuses, x is on cpu: Triton kernels run on CUDA devices" in lines[1]
    assert lines[2] == "triton-codebook: refuses, the weight is a trellis"
    assert "torch: runs" in lines
    assert torch.equal(matmul(x, held), x @ plain(held).dequantize(torch.float16).T)


def test_operators_have_shape_rules() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, words = torch.empty((5, 512), dtype=torch.float16), torch.empty(16 * 2 * 16 * 16, dtype=torch.int32)
        held = words, torch.empty(256, dtype=torch.uint8), torch.empty(1, dtype=torch.float16)
        held, sizes = (*held, None), (256, 512, 2, 12, "inst", 9, 256)
        out = torch.ops.bitwright.trellis_matmul(x, *held, None, *sizes, torch.float16, None, 1)
        assert (out.shape, out.dtype) == ((5, 256), torch.float16)
        part = torch.ops.bitwright.trellis_dequantize(*held, *sizes, torch.bfloat16, 8, 40)
        assert (part.shape, part.dtype) == ((32, 512), torch.bfloat16)


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    rerun(__file__)


CASES = [
    (1, 70, 100, 32, 12, "inst", torch.float16, Config(8, 256, 2, 1, 2)),
    (2, 300, 64, 256, 16, "mac", torch.bfloat16, Config(4, 256, 4, 1, 1)),
    (3, 33, 70, 64, 8, "sum", torch.float16, Config(4, 256, 1, 1, 3)),
    (16, 40, 33, 32, 16, "inst", torch.bfloat16, Config(16, 256, 2, 1, 1)),
    (9, 31, 40, 32, 12, "mac", torch.float16, Config(8, 256, 2, 1, 1)),
    (2, 45, 70, 32, 13, "hyb", torch.bfloat16, Config(8, 256, 1, 1, 3)),
    (5, 80, 33, 64, 8, "hyb", torch.float16, Config(8, 256, 1, 1, 1)),
    (1, 290, 70, 256, 12, "mac", torch.bfloat16, Config(4, 256, 2, 1, 2)),
    (1, 45, 70, 32, 16, "mac", torch.float16, Config(2, 256, 1, 1, 3)),
    (1, 290, 70, 256, 13, "mac", torch.bfloat16, Config(2, 256, 8, 1, 1)),
    (5, 33, 70, 64, 14, "mac", torch.float16, Config(8, 256, 2, 1, 1)),
    (3, 33, 70, 64, 12, "hyb", torch.float16, Config(8, 256, 4, 1, 1)),
    (3, 40, 70, 32, 13, "mac", torch.bfloat16, Config(2, 256, 2, 1, 2)),
    (16, 40, 70, 32, 13, "mac", torch.bfloat16, Config(16, 256, 1, 1, 1)),
    (9, 33, 70, 32, 8, "sum", torch.float16, Config(16, 256, 1, 1, 2)),
]
LONG = (1, 20, 1060, 32, 13, "mac", torch.bfloat16, Config(2, 256, 1, 1, 1))  # more than a warp takes as a whole
APART = [
    (2, (1, 290, 330, 256, 13, "mac", torch.bfloat16, Config(2, 128, 2, 1, 4))),
    (1, (1, 170, 330, 32, 12, "mac", torch.float16, Config(2, 128, 1, 1, 1))),
]


@pytest.mark.parametrize(
    ("bits", "case"),
    [*((b, c) for n, c in enumerate(CASES) for b in ((1 + n % 4,), (1, 2, 3, 4))[n == 0]), (2, LONG), *APART],
)
def interpreted_matmul(bits: int, case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis_launch, "clusters", lambda device: True)
    monkeypatch.setattr(trellis_launch, "processor", lambda device: (132, False))
    tokens, rows, columns, length, window, code, dtype, config = case
    packed = weight(rows, columns, Trellis(bits=bits, window=window, code=code, length=length, table_bits=7))
    held, x = arrange(packed), some(tokens, columns, dtype) * torch.tensor(0.5) ** (torch.arange(tokens) % 8)[:, None]
    x, bias = x.to(dtype), some(1, rows, dtype, 2)[0]
    exact = x.double() @ packed.dequantize(torch.float64).T
    allowed = bound(x, packed, exact, config.bm < 8)
    found = list[Tensor]()
    for extra in (bias if rows % 2 else None,) * (2 if config.splits > 2 else 1):
        out, buffer = guarded((tokens, rows), dtype)
        parts = held.weight, held.scales, held.peaks, held.table, extra, out
        trellis_launch.launch(x, *parts, rows, columns, bits, window, code, 7, length, config)
        expected = exact if extra is None else exact + bias.double()
        error = (out.double() - expected).abs()
        assert bool((error <= allowed + 2 * torch.finfo(dtype).eps * expected.abs()).all()), float(error.max())
        assert intact(buffer)
        found.append(out)
    assert torch.equal(found[0], found[-1])  # splits leave their counters as they found them


@pytest.mark.parametrize(
    ("bits", "columns", "block", "code", "dtype", "config"),
    [
        (2, 256, 64, "mac", torch.bfloat16, Config(2, 256, 2, 1, 2)),
        (1, 1024, 256, "mac", torch.float16, Config(2, 256, 2, 1, 1)),  # two steps
        (3, 136, 8, "sum", torch.float16, Config(4, 256, 1, 1, 3)),
        (2, 320, 64, "mac", torch.float16, Config(2, 256, 1, 1, 4)),  # a block in two parts: rotated before
        (2, 96, 12, "mac", torch.float16, Config(2, 256, 2, 1, 1)),  # likewise, no power of two
        (2, 576, 64, "mac", torch.bfloat16, Config(2, 128, 2, 1, 2)),  # two chunks at a time, none for the last warp
        (2, 512, 128, "mac", torch.float16, Config(2, 256, 1, 1, 4)),
    ],
)
@pytest.mark.parametrize("clusters", [False, True])
def interpreted_rotation(
    bits: int, columns: int, block: int, code: Any, dtype: torch.dtype, config: Config, clusters: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A token is rotated by the product, and better than before it: what is rotated is not rounded to `dtype`."""
    monkeypatch.setattr(trellis_launch, "clusters", lambda device: clusters)
    monkeypatch.setattr(trellis_launch, "processor", lambda device: (132, False))
    packed = weight(33, columns, Trellis(bits=bits, code=code, length=32))
    held, x, signs = arrange(packed), some(1, columns, dtype), random_signs(columns, 3)
    x[0, 5] = 40
    turned = hadamard(x.double(), block, signs)
    exact = turned @ packed.dequantize(torch.float64).T
    out, buffer = guarded((1, 33), dtype)
    sizes = 33, columns, bits, packed.spec.window, code, 7, 32
    trellis_launch.launch(x, held.weight, held.scales, held.peaks, None, None, out, *sizes, config, signs, block)
    allowed = bound(turned.to(dtype), packed, exact)
    name = trellis_blocks.compiled_code(code, bits)
    if not trellis_blocks.turns(1, name, config, block, chunks(columns)):
        allowed += torch.finfo(dtype).eps * turned.norm() * packed.dequantize(torch.float64).norm(dim=1)
    assert bool(((out.double() - exact).abs() <= allowed + 2 * torch.finfo(dtype).eps * exact.abs()).all())
    assert intact(buffer)


def interpreted_rotation_of_odd_signs() -> None:
    """What the product's own rotation does not read is rotated before it, or refused there."""
    packed = weight(33, 64, Trellis(length=32))
    held, x, signs = arrange(packed), some(1, 64, torch.float16), random_signs(64, 3)
    expected = trellis_launch.matmul(x, held, None, Rotation(32, signs))
    spread = torch.zeros(128, dtype=torch.int8)
    spread[::2] = signs
    for odd in (signs.half(), spread[::2], torch.cat((signs[:1], signs))[1:]):
        found = trellis_launch.matmul(x, held, None, Rotation(32, odd))
        assert float((found - expected).norm() / expected.norm()) < 2e-3
    with pytest.raises(ValueError, match="signs"):
        trellis_launch.matmul(x, held, None, Rotation(32, signs[:32]))
    bias = some(2, 33, torch.float16, 5).T[:, 0]  # strided
    assert torch.equal(trellis_launch.matmul(x, held, bias), trellis_launch.matmul(x, held, bias.contiguous()))
    x.requires_grad_()
    got = torch.autograd.grad(trellis_launch.matmul(x, held, None, Rotation(32, signs)).sum(), x)[0]
    wanted = hadamard(packed.dequantize(torch.float64).sum(0), 32, signs, inverse=True)
    assert float((got.double() - wanted).norm() / wanted.norm()) < 2e-3


@pytest.mark.parametrize(
    ("bits", "code"),
    [(1, "inst"), (3, "sum"), (4, "inst"), (3, "inst"), *((b, code) for b in (1, 2, 3, 4) for code in ("mac", "hyb"))],
)
def interpreted_dequantize(bits: int, code: Any) -> None:
    packed = weight(85, 33, Trellis(bits=bits, window=8 + 2 * bits, code=code, length=32))
    held = arrange(packed)
    assert torch.equal(held.dequantize(torch.float32), packed.dequantize())
    assert torch.equal(held.dequantize(torch.float16, 5, 36), packed.dequantize(torch.float16, 5, 36))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of infinity times 0
def interpreted_bfloat16_of_any_size() -> None:
    """From small numbers (of float16 products, almost the smallest normal ones) to the largest, and zeros; infinities
    come out as what is not finite."""
    packed = weight(20, 40, Trellis(length=32, code="sum"))
    held, x = arrange(packed), some(5, 40, torch.bfloat16)
    x *= torch.tensor([2.0**-104, 2.0**110, 0.0, 1.0, torch.inf], dtype=torch.bfloat16)[:, None]
    broken = x[2:4].clone()
    broken[1, 7] = torch.nan
    assert trellis_launch.matmul(broken, held).isnan().all(1).tolist() == [False, True]
    found = trellis_launch.matmul(x, held)
    exact = x.double() @ packed.dequantize(torch.float64).T
    small = 2.0**-126  # results below are flushed or rounded coarsely
    assert bool(((found.double() - exact).abs()[:4] <= (bound(x, packed, exact, False) + small)[:4]).all())
    assert not torch.isfinite(found[4, 1:7]).any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("config", [Config(2, 256, 2, 1, 2), Config(2, 128, 1, 1, 2), Config(2, 256, 1, 1, 1)])
def interpreted_one_token_of_any_size(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, where each warp takes its part of one token as a whole."""
    monkeypatch.setattr(trellis_launch, "clusters", lambda device: True)
    monkeypatch.setattr(trellis_launch, "processor", lambda device: (132, False))
    packed, x = weight(20, 200, Trellis(bits=2, length=32)), some(1, 200, torch.bfloat16)
    held, spec = arrange(packed), packed.spec
    held_parts, sizes = (held.weight, held.scales, held.peaks, None, None), (20, 200, 2, spec.window, "mac", 9, 32)
    for factor in (2.0**-104, 2.0**110, 0.0, torch.inf, torch.nan):
        out = torch.full((1, 20), 7.0, dtype=x.dtype)
        some_x = x * factor if abs(factor) < 2.0**120 else x.clone().index_fill_(1, torch.tensor([199]), factor)
        trellis_launch.launch(some_x, *held_parts, out, *sizes, config)
        exact = some_x.double() @ packed.dequantize(torch.float64).T
        if abs(factor) < 2.0**120:
            assert bool(((out.double() - exact).abs() <= bound(some_x, packed, exact) + 2.0**-126).all())
        else:
            assert not torch.isfinite(out[0, 1:7]).any()


@pytest.mark.filterwarnings("ignore:invalid value")
def interpreted_tokens_are_alone() -> None:
    """What is not finite stays with its token, of those that share a product and of those that share a program."""
    packed, x = weight(20, 32, Trellis(length=32)), some(12, 32, torch.float16)
    x[2, 3], x[11, 7] = torch.nan, torch.inf
    found = trellis_launch.matmul(x, arrange(packed))
    assert torch.isfinite(found).all(1).tolist() == [number not in (2, 11) for number in range(12)]


def interpreted_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = weight(70, 40, Trellis(length=32))
    check_many_tokens(trellis_launch, packed, arrange(packed), monkeypatch)


def wrapped(spec: Spec, rows: int, columns: int) -> dict[str, Tensor]:
    """Random tensors of a trellis with rotations and a branch around it."""
    made = {name: torch.zeros(t.shape, dtype=DTYPES[t.dtype]) for name, t in spec.tensors((rows, columns)).items()}
    made |= weight(rows, columns, spec.core).tensors()  # pyright: ignore[reportArgumentType]
    made |= {name: some(*part.shape, part.dtype) / 8 for name, part in made.items() if name.startswith("lora")}
    if "rotation" in made:
        base = weight(rows, columns, spec.core)  # pyright: ignore[reportArgumentType]
        sides = [Rotation(block, random_signs(n, 1)) for block, n in ((4, columns), (8, rows))]
        inner = spec.base if isinstance(spec, LowRank) else spec
        assert isinstance(inner, Rotated)
        outputs = sides[1] if inner.outputs else IDENTITY
        own = PackedRotated.around(inner, base, sides[0], outputs)
        made |= own.tensors()
    return made


@pytest.mark.parametrize(
    "spec",
    [
        Trellis(bits=3, length=32),
        Rotated(Trellis(bits=2, length=32), outputs=True, block=8),
        Rotated(Trellis(bits=2, length=32), outputs=False, block=8),
        LowRank(Rotated(Trellis(bits=2, length=32), outputs=True, block=8), rank=2),
    ],
)
def interpreted_module(spec: Spec) -> None:
    """A packed linear in kernel order multiplies through the table and saves what the checkpoint held."""
    rows, columns = 72, 36
    module, stored = PackedLinear(spec, rows, columns, bias=True), wrapped(spec, rows, columns)
    packed = LAYOUTS[spec.layout].from_tensors(spec, (rows, columns), stored)
    module.load_state_dict({**stored, "bias": torch.zeros(rows)})
    x = some(5, columns, torch.float16)
    module.half()
    assert module.slots()[0].arranged
    assert explain(x, module.operand).splitlines()[1] == "triton-trellis: runs"
    exact = x.double() @ packed.dequantize(torch.float32).double().T
    size = 2.0**-8 * x.double().norm(dim=1)[:, None] * packed.dequantize().double().norm(dim=1).max()
    assert bool(((module(x).double() - exact).abs() <= size).all())  # x, its rotation and sums rounded to float16
    for name, tensor in stored.items():
        assert torch.equal(module.state_dict()[name], tensor)
    assert torch.equal(module.unpack(torch.float32).weight, packed.dequantize())
    assert torch.isfinite(torch.autograd.grad(module(x.requires_grad_()).sum(), x)[0]).all()


def interpreted_experts_are_arranged_one_by_one() -> None:
    spec = Rotated(Trellis(bits=2, length=32), outputs=True, block=8)
    tensors = wrapped(spec, 128, 36)
    packed = LAYOUTS["rotated"].from_tensors(spec, (128, 36), tensors)
    for expert in range(2):
        held = arranged.kernel_order(packed, 64 * expert, 64 * expert + 64)
        found = arranged.weight_of(spec, (64, 36), held)
        assert torch.equal(found.dequantize(), packed.dequantize()[64 * expert : 64 * expert + 64])
        back = arranged.checkpoint_order(spec, (64, 36), held)
        assert torch.equal(back.dequantize(), found.dequantize())


def interpreted_a_product_is_one_graph() -> None:
    packed, x = weight(40, 36, Trellis(length=32)), some(3, 36, torch.float16)
    module = PackedLinear(packed.spec, 40, 36, bias=False)
    module.load_state_dict(packed.tensors())
    assert isinstance(module.half().operand, ArrangedTrellis)
    whole: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(whole(x), module(x))


SHAPES = [
    (2, "mac", 13, "bf16", 1, 128), (3, "inst", 16, "bf16", 16), (4, "mac", 16, "fp16", 16), (1, "sum", 8, "fp16", 8),
    (2, "hyb", 12, "fp16", 1), (3, "hyb", 16, "bf16", 16),
]  # fmt: skip
# every GPU and every shape, not every pair: all 24 were compiled once, and a compilation takes three seconds
PAIRS = [(capability, SHAPES[number % 2]) for number, capability in enumerate(sorted(SHARED_LIMIT))]


WIDE = (2, "mac", 13, "bf16", 1, 128, 28672)  # 16 warps, all registers, two steps of the rotation
SQUARE = (2, "mac", 13, "bf16", 1, 0)  # a cluster of two blocks, two chunks at a time


@pytest.mark.parametrize(
    ("capability", "case"), [*PAIRS, *((90, case) for case in (*SHAPES[:1], *SHAPES[2:], WIDE, SQUARE))]
)
def compiled_for(capability: int, case: tuple[Any, ...]) -> None:
    made = compiled(capability, *case)
    assert made.fits(), (made.registers, made.spilled, made.shared)
    assert any(op.startswith("LDG") and "128" in op and "STRONG" not in op for op in made.ops), made.ops
    # 16 rows and two sides, each with two products of four columns (of pairs of values one) a part: every product once,
    # so no thread computes another's
    bits, code, _, _, tokens = case[:5]
    bm = trellis_blocks.choose(tokens, 8192, 8192, 132, trellis_blocks.compiled_code(code, bits)).bm  # of any rows
    name = trellis_blocks.compiled_code(code, bits, bm)
    parts = bm // {"twin": 2, "mac": 4, "sum": 4}.get(name, 8)
    each = {"twin": 16, "hyb": 16, "mac": 32, "sum": 32, "inst": 32}.get(name, 17)  # 17: and what bytes carry beside
    products = sum(count for op, count in made.ops.items() if op.startswith(("HMMA", "IMMA")))
    assert products in (2 * each * parts, 4 * each * parts)  # the latter where one takes half as many columns
    assert made.shared <= 4096  # scales of rows at the end
    assert made.shared + made.static <= 49 * 1024  # the latter in PTX, with 1 KiB of the driver's: nobody has to ask
    assert code not in trellis_blocks.INTEGER or any(op.startswith("LDS.128") for op in made.ops)
    if case in (SHAPES[0], SQUARE) and capability == 90:  # sums of blocks pass through their memory, with no fence
        assert any(op.startswith("STAS") for op in made.ops)
        assert made.registers <= 128  # two blocks to a multiprocessor: one waits while the other works


def compiled(
    capability: int, bits: int, code: str, window: int, kind: str, tokens: int, block: int = 0, rows: int = 8192,
    config: Config | None = None,
) -> Compiled:  # fmt: skip
    """The default configuration for a matrix of `rows` x 8192."""
    from quant.kernels.trellis_product import trellis_kernel

    name = trellis_blocks.compiled_code(code, bits)
    config = config or trellis_blocks.choose(tokens, rows, 8192, 132, name, clusters=capability // 10 == 9)
    ctas = trellis_blocks.blocks_of(config, tokens, rows, name, 132, capability // 10 == 9)
    apart = 256 // config.bn
    each = -(-256 // (config.splits * config.warps * apart))
    block = block or int(trellis_blocks.alone(tokens, name, config, 256))
    types = dict.fromkeys(("x", "bias", "out"), f"*{kind}")
    types |= {"weight": "*i32", "scales": "*u8", "peaks": "*fp16", "table": "*fp32", "partial": "*fp32"}
    types |= {"counters": "*i32", "pairs": "*i32", "signs": "*i8"}
    types |= dict.fromkeys(("M", "N", "K", "stride", "count", "each", "total", "whole", "mask"), "i32")
    constants = trellis_launch.constants(bits, window, code, 9, 256, torch.device("cuda"), config.bm) | {
        "BM": config.bm, "WARPS": config.warps, "CTAS": ctas, "ONE": tokens == 1, "SPLIT": config.splits > ctas,
        "EVEN": True, "APART": apart,
        "BLOCK": block, "STEPS": -(-each * apart // 8) if block else 1, "BIAS": True, "EARLY": capability // 10 == 9,
    }  # fmt: skip
    return compile_for(capability, trellis_kernel, types, constants, config.warps, config.stages, blocks=ctas)
