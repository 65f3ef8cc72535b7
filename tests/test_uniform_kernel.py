"""The uniform kernels against the reference, on ragged sizes with poisoned outputs; and what compiles for GPUs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.kernels import blocks, integer_launch, launch, reference
from quant.kernels.blocks import Config
from quant.kernels.dispatch import explain
from quant.kernels.layouts import PackedUniform
from quant.kernels.order import Arranged, arrange, pieces, plain, tiles
from quant.kernels.spec import DTYPES, Uniform
from quant.linear import PackedLinear
from tests.ahead import SHARED_LIMIT, Compiled, compile_for
from tests.guarded import guarded, intact
from tests.products import some
from tests.rerun import rerun


def weight(rows: int, columns: int, spec: Uniform, seed: int = 0) -> PackedUniform:
    source = torch.Generator().manual_seed(seed)
    groups = spec.groups(columns)
    codes = torch.randint(0, 2**spec.bits, (rows, columns), generator=source, dtype=torch.uint8)
    scales = (torch.randn((rows, groups), generator=source) / 2**spec.bits).to(DTYPES[spec.scale_dtype])
    zeros = torch.randint(0, 2**spec.bits, (rows, groups), generator=source, dtype=torch.uint8)
    return PackedUniform.from_codes(spec, (rows, columns), codes, scales, None if spec.symmetric else zeros)


def bound(x: Tensor, arranged: Arranged, exact: Tensor) -> Tensor:
    """Of the error of one output: the rounding of the result (twice for bfloat16, which the interpreter cuts off), and
    a float32 roundoff for each of the sums, whose terms are `(base + code) x scale` and `zero x scale`.
    """
    bits, columns = arranged.spec.bits, arranged.shape[1]
    width = arranged.spec.group_width(columns)
    roundoff = torch.finfo(x.dtype).eps * (1 if x.dtype == torch.bfloat16 else 0.5)
    largest = 2.0**bits * 2 + (2176 if bits == 8 else 128) * (x.dtype == torch.bfloat16)
    if width % 32 and width < columns:  # the weight itself was rounded
        largest += 2**bits * roundoff * 2**24 / (columns + 8)
    scale = arranged.scales.float().abs().max(0).values
    return roundoff * exact.abs() + 2.0**-24 * (columns + 8) * largest * x.double().abs().sum(1)[:, None] * scale


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 600), bits=st.integers(1, 8), symmetric=st.booleans(),
    group=st.sampled_from([16, 32, 128, -1]),
)  # fmt: skip
def test_kernel_order_and_back(rows: int, columns: int, bits: int, symmetric: bool, group: int) -> None:
    packed = weight(rows, columns, Uniform(bits=bits, group_size=group, symmetric=symmetric))
    arranged = arrange(packed)
    assert arranged.weight.numel() == 8 * bits * rows * tiles(columns)  # dense: bits times the padded columns
    for name, tensor in plain(arranged).tensors().items():
        assert torch.equal(tensor, packed.tensors()[name])
    assert torch.equal(arranged.dequantize(torch.float32, 0, rows), packed.dequantize())


def test_kernel_order_is_what_its_description_says() -> None:
    for bits in range(1, 9):
        packed = weight(3, 300, Uniform(bits=bits, group_size=-1))
        arranged, codes = arrange(packed), packed.codes()
        found = torch.zeros((3, 512), dtype=torch.uint8)
        base = 0
        for plane, shift, first, words in pieces(bits):
            for column in range(512):
                tile, chunk, lane = column // 256, column % 256 // 32, column % 32 // 8
                r, e, p = column % 8 // 4, column % 4 // 2, column % 2
                word = chunk * plane // 4 - first
                if not 0 <= word < words:
                    continue
                bit = 16 * p + plane * (4 * (chunk % (4 // plane)) + 2 * r + e)
                for row in range(3):
                    at = tile * 8 * bits * 3 + base + (row * 4 + lane) * words + word
                    found[row, column] |= ((int(arranged.weight[at]) >> bit) & (2**plane - 1)) << shift
            base += 3 * 4 * words
        assert torch.equal(found[:, :300], codes)
        assert not found[:, 300:].any()


def test_configurations() -> None:
    assert blocks.choose(1, 8192, 8192, 132) == Config(4, 32, 1, 1, 11)
    assert blocks.choose(1, 8192, 8192, 132, bits=2) == Config(4, 32, 1, 1, 8)
    assert blocks.choose(1, 28672, 8192, 132, bits=2) == Config(4, 64, 1, 1, 4)
    assert blocks.choose(16, 28672, 8192, 132) == Config(16, 32, 1, 1, 2)
    assert blocks.choose(16, 64, 256, 132).splits == 1  # a split has two steps
    assert blocks.choose(4096, 8192, 8192, 132, skinny=False).bm == 64
    assert blocks.choose(17, 8192, 8192, 132, skinny=False) == Config(32, 64, 4, 1, 2)
    assert blocks.choose(17, 8192, 8192, 132, narrow=True, skinny=False) == Config(32, 32, 2, 1, 2)
    for tokens in (1, 9, 17, 33, 100):
        for columns in (100, 256, 1000, 8192, 28672):
            for skinny in (False, True):
                config = blocks.choose(tokens, 4096, columns, 132, skinny=skinny)
                count = -(-columns // (blocks.step_columns(4) if skinny else 256))
                each = -(-count // config.splits)
                assert (config.splits - 1) * each < count <= config.splits * each  # no split is without work


def test_what_the_kernels_do_not_take() -> None:
    arranged = arrange(weight(4, 60, Uniform(bits=4, group_size=20)))
    assert "Triton kernels run on CUDA devices" in str(launch.refuses(some(1, 60, torch.float16), arranged))


def test_operators_have_shape_rules() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty((5, 512), dtype=torch.float16)
        made = torch.empty(8 * 4 * 96 * 2, dtype=torch.int32), torch.empty((4, 96), dtype=torch.float16)
        out = torch.ops.bitwright.uniform_matmul(x, *made, None, None, None, 96, 512, 4, 128, torch.float16)
        assert (out.shape, out.dtype) == ((5, 96), torch.float16)
        whole = torch.ops.bitwright.uniform_dequantize(*made, None, 96, 512, 4, 128, torch.bfloat16, 8, 40)
        assert (whole.shape, whole.dtype) == ((32, 512), torch.bfloat16)


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    rerun(__file__)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def interpreted_matmul(bits: int, dtype: torch.dtype) -> None:
    cases = [
        (1, 70, 300, 128, False, Config(8, 64, 1, 1, 2)),
        (3, 17, 512, 32, True, Config(8, 32, 1, 1, 1)),
        (17, 9, 260, 16, False, Config(32, 16, 1, 1, 2)),
        (2, 40, 700, -1, True, Config(16, 16, 1, 1, 3)),
    ]
    few = [  # of the kernel for few tokens
        (1, 24, 300, 128, False, Config(4, 32, 1, 1, 2)),
        (7, 24, 136, 32, True, Config(8, 32, 1, 1, 1)),
        (9, 32, 130, -1, False, Config(16, 32, 1, 1, 1)),
    ]
    cases = cases[: 4 if bits in (2, 3, 4, 8) else 2] + few[bits % 2 + (dtype == torch.float16) :][:1]
    for number, (tokens, rows, columns, group, symmetric, config) in enumerate(cases):
        more = (bits // 2 + number) % 2 == 1  # of every case and dtype, some bits with and some without
        spec = Uniform(bits=bits, group_size=group, symmetric=symmetric)
        check(tokens, rows, columns, spec, dtype, config, (more, more)[: config.splits])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([1, 2, 3, 16, 17, 33]), rows=st.sampled_from([1, 7, 8, 24, 33, 40]),
    columns=st.integers(1, 400),
    bits=st.integers(1, 8), symmetric=st.booleans(), group=st.sampled_from([16, 24, 32, 64, 96, 128, 256, -1]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]), scales=st.sampled_from(["float16", "bfloat16"]),
)  # fmt: skip
def interpreted_any_shape(
    tokens: int, rows: int, columns: int, bits: int, symmetric: bool, group: int, dtype: torch.dtype, scales: str
) -> None:
    spec = Uniform(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=scales)  # pyright: ignore[reportArgumentType]
    check(tokens, rows, columns, spec, dtype, None, (False, True, False))


def check(
    tokens: int, rows: int, columns: int, spec: Uniform, dtype: torch.dtype, config: Config | None,
    launches: tuple[bool, ...],
) -> None:  # fmt: skip
    """`launches`: each with a bias and a residual, or without; the last gives the bits of the first, if both are alike:
    splits leave their counters as they found them."""
    packed = weight(rows, columns, spec)
    arranged, x = arrange(packed), some(tokens, columns, dtype)
    bias, residual = some(1, rows, dtype, 2)[0], some(tokens, rows, dtype, 3)
    exact = x.double() @ packed.dequantize(torch.float64).T
    allowed = bound(x, arranged, exact)
    width = spec.group_width(columns)
    results: list[Tensor] = []
    for more in launches:
        out, buffer = guarded((tokens, rows), dtype)
        extra, added = (bias, residual) if more else (None, None)
        launch.launch(
            x, None, arranged.weight, arranged.scales, arranged.zeros, extra, added, out, columns, spec.bits, width,
            config,
        )  # fmt: skip
        expected = exact + bias.double() + residual.double() if more else exact
        error = (out.double() - expected).abs()
        assert bool((error <= allowed + 2 * torch.finfo(dtype).eps * expected.abs()).all()), float(error.max())
        assert intact(buffer)
        results.append(out)
    assert launches[0] != launches[-1] or torch.equal(results[0], results[-1])


@pytest.mark.parametrize("bits", range(1, 9))
def interpreted_int8(bits: int) -> None:
    for tokens, rows, columns, group, symmetric in [(1, 20, 300, 128, False), (17, 33, 256, 32, True)]:
        packed = weight(rows, columns, Uniform(bits=bits, group_size=group, symmetric=symmetric))
        x = some(tokens, columns, torch.float16)
        scale = x.float().abs().amax(1, keepdim=True) / 127
        rounded = (x.float() / scale).round() * scale  # int32 sums are exact: only the scales' products round
        exact = rounded.double() @ packed.dequantize(torch.float64).T
        found = integer_launch.matmul(x, arrange(packed))
        allowed = bound(x, arrange(packed), exact)
        assert bool(((found.double() - exact).abs() <= allowed).all())


def interpreted_dequantize() -> None:
    for bits in range(1, 9):
        packed = weight(37, 300, Uniform(bits=bits, group_size=20 if bits % 2 else 64, symmetric=bits < 4))
        arranged = arrange(packed)
        for dtype in (torch.float16, torch.float32):
            assert torch.equal(launch.dequantize(arranged, dtype, 0, 37), packed.dequantize(dtype))
            assert torch.equal(launch.dequantize(arranged, dtype, 5, 36), packed.dequantize(dtype, 5, 36))


def interpreted_shapes_of_inputs() -> None:
    packed = weight(24, 256, Uniform(bits=4, group_size=64))
    arranged, x = arrange(packed), some(6, 256, torch.float16)
    expected = launch.matmul(x, arranged)
    assert torch.equal(launch.matmul(x.view(2, 3, 256), arranged), expected.view(2, 3, 24))
    assert torch.equal(launch.matmul(x.T.contiguous().T, arranged), expected)  # columns apart, not rows
    assert torch.equal(launch.matmul(torch.cat([x, x], 1)[:, :256], arranged), expected)
    assert launch.matmul(x[:0], arranged).shape == (0, 24)
    ragged = arrange(weight(4, 60, Uniform(bits=4, group_size=20)))
    assert "groups of 20" in str(launch.refuses(some(1, 60, torch.float16), ragged))
    assert "float32" in str(launch.refuses(x.float(), arranged))


def interpreted_module() -> None:
    """A packed linear in kernel order multiplies through the dispatch table and saves what the checkpoint held."""
    packed = weight(24, 300, Uniform(bits=3, group_size=64))
    module = PackedLinear(packed.spec, 24, 300, bias=True)
    bias = some(1, 24, torch.float32)[0]
    module.load_state_dict({**packed.tensors(), "bias": bias})  # which settles the weight, as any move does
    x = some(5, 300, torch.float16)
    assert "not in kernel order" in explain(x, packed)
    before = reference.matmul(x, packed, bias)
    assert isinstance(module.half().operand, Arranged)
    assert explain(x, module.operand).startswith("triton: runs")
    error = (module(x).double() - before.double()).abs()
    exact = x.double() @ packed.dequantize(torch.float64).T
    assert bool((error <= 2 * bound(x, arrange(packed), exact) + 2**-9 * before.double().abs()).all())
    for name, tensor in packed.tensors().items():
        assert torch.equal(module.state_dict()[name], tensor)
    assert torch.equal(module.unpack(torch.float32).weight, packed.dequantize())


CHECKED = [(2, "fp16", 1), (3, "bf16", 16), (8, "bf16", 5)]
HOPPER = [(bits, ("fp16", "bf16")[bits % 2], tokens) for bits in range(1, 9) for tokens in (1, (8, 16)[bits % 2])]


# every GPU and every shape, not every pair: all 18 were compiled once
@pytest.mark.parametrize(
    ("capability", "bits", "kind", "tokens"),
    [(capability, *CHECKED[number % 3]) for number, capability in enumerate(sorted(SHARED_LIMIT))],
)
def compiled_for(capability: int, bits: int, kind: str, tokens: int) -> None:
    made = compiled(capability, bits, kind, tokens)
    assert made.fits(), (made.registers, made.spilled, made.shared)
    assert any(op.startswith("LDG") and "NA" in op and "128" in op for op in made.ops)  # past the first-level cache


@pytest.mark.parametrize(("bits", "kind", "tokens"), HOPPER)
def compiled_for_hopper(bits: int, kind: str, tokens: int) -> None:
    made = compiled(90, bits, kind, tokens)
    assert made.fits(), (made.registers, made.spilled, made.shared)
    config = blocks.choose(tokens, 8192, 8192, 132, bits)
    parts, tiles = 2 if config.bm == 16 else 1, config.bn // 16
    each = parts + parts * tiles * (2 if bits == 8 and kind == "bf16" else 1)
    products = sum(count for op, count in made.ops.items() if op.startswith("HMMA"))
    assert products == each * (8 if bits >= 4 else 16), made.ops  # every one once: no thread computes another's
    assert made.shared <= 1024  # no operand is exchanged through it


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("bits", "kind", "tokens", "group"), [(4, "fp16", 1, 16), (3, "bf16", 20, 128)])
def compiled_what_others_refuse(capability: int, bits: int, kind: str, tokens: int, group: int) -> None:
    """Small groups; and rows of any number."""
    from quant.kernels.uniform import matmul_kernel

    config = blocks.choose(tokens, 8190, 8192, 132, bits, capability == 100, skinny=False)
    half = "*bf16" if kind == "bf16" else "*fp16"
    types = {"x": half, "weight": "*i32", "scales": "*fp16", "zeros": "*u8", "bias": half, "residual": half}
    types |= {"out": half, "partial": "*fp32", "counters": "*i32"}
    types |= dict.fromkeys(("M", "N", "K", "stride", "count", "each"), "i32")
    constants = launch.constants(bits, group, 8192, True, kind) | {
        "BM": config.bm, "BN": config.bn, "SPLIT": config.splits > 1, "EVEN": True, "BIAS": True, "RESIDUAL": True,
        "WIDEN": False,
    }  # fmt: skip
    made = compile_for(capability, matmul_kernel, types, constants, config.warps, config.stages)
    assert made.fits(), (made.registers, made.spilled, made.shared)


def compiled(capability: int, bits: int, kind: str, tokens: int) -> Compiled:
    """The default configuration for a matrix of 8192 x 8192 in groups of 128."""
    from quant.kernels.skinny import skinny_kernel

    config = blocks.choose(tokens, 8192, 8192, 132, bits)
    half = "*bf16" if kind == "bf16" else "*fp16"
    types = {"x": half, "x_scale": "*fp32", "weight": "*i32", "scales": "*fp16", "mask": "i32"}
    types |= {"zeros": "*u8", "bias": half, "residual": half, "out": half, "partial": "*fp32", "counters": "*i32"}
    types |= dict.fromkeys(("M", "N", "K", "stride", "count", "each"), "i32")
    constants = launch.constants(bits, 128, 8192, True, kind) | {
        "BM": config.bm, "SPLIT": config.splits > 1, "EVEN": True, "BIAS": True, "RESIDUAL": True, "ROUNDED": False,
        "TILES": config.bn // 16, "NATIVE": True,
    }  # fmt: skip
    return compile_for(capability, skinny_kernel, types, constants, 1, 1)
