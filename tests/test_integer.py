"""Activations rounded to 8 bits: the CPU's product against its definition in integers and, bit for bit, against the
Triton kernel; which row of the dispatch table runs; smoothed weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.kernels import dispatch, integer, integer_launch, launch
from quant.kernels.arranged import checkpoint_order, kernel_order, weight_of
from quant.kernels.layouts import LAYOUTS, LayoutError, PackedUniform
from quant.kernels.order import arrange
from quant.kernels.smoothed import PackedSmoothed
from quant.kernels.spec import (
    LowRank,
    Rotated,
    Smoothed,
    Spec,
    SpecError,
    Trellis,
    Uniform,
    rounds_inputs,
    spec_from_dict,
)
from quant.solvers.feedback import Feedback
from tests.ahead import OLD, SHARED_LIMIT, compile_for
from tests.guarded import guarded, intact
from tests.products import some
from tests.rerun import rerun
from tests.test_lowrank import trained as trained
from tests.test_uniform_kernel import weight


def grid(bits: int, group: int, symmetric: bool = False) -> Uniform:
    return Uniform(bits=bits, group_size=group, symmetric=symmetric, activations=8)


def by_definition(x: Tensor, packed: PackedUniform) -> Tensor:
    """Float64 sums of integer products, every float32 step of the definition by itself."""
    codes, scale = integer.round_tokens(x)
    acc = torch.zeros((len(x), packed.shape[0]))
    width, columns = packed.spec.group_width(packed.shape[1]), packed.shape[1]
    step = 128 if width >= columns else max(size for size in (128, 64, 32) if width % size == 0)
    tiles = -(-columns // 256)
    part = -(-tiles // -(-tiles // 4)) * 256  # of K, at most 1024 columns
    total = acc
    for begin in range(0, columns, step):
        if begin % part == 0:
            total, acc = total + acc, torch.zeros_like(acc)
        some, group = slice(begin, min(begin + step, columns)), begin // width
        levels = packed.codes()[:, some].double() - packed.zero_points()[:, group, None].double()
        whole = (codes[:, some].double() @ levels.T).float()
        acc = acc + whole * packed.scales[:, group].float()
    return (total + acc) * scale[:, None]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 20), rows=st.integers(1, 40), columns=st.integers(1, 2300), bits=st.integers(1, 8),
    symmetric=st.booleans(), group=st.sampled_from([32, 96, 128, 256, 384, -1]),
)  # fmt: skip
def test_the_product_is_what_its_definition_says(
    tokens: int, rows: int, columns: int, bits: int, symmetric: bool, group: int
) -> None:
    packed, x = weight(rows, columns, grid(bits, group, symmetric)), some(tokens, columns, torch.float32)
    found = integer.matmul(x, packed)
    assert torch.equal(found, by_definition(x, packed))
    exact = integer.rounded(x).double() @ packed.dequantize(torch.float64).T
    allowed = (
        2.0**-22 * columns * 2**bits * integer.rounded(x).abs().sum(1)[:, None] * packed.scales.float().abs().amax(1)
    )
    assert bool(((found - exact).abs() <= allowed).all())


def test_tokens_are_rounded_by_their_own_scale() -> None:
    x = torch.tensor([[127.0, -63.4, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-3, -2.54e-1, 0.0, 1e-5]])
    codes, scale = integer.round_tokens(x)
    assert codes.tolist() == [[127, -63, 0, 0], [0, 0, 0, 0], [0, -127, 0, 0]]  # halves to even
    assert scale[0] == pytest.approx(1.0)
    assert integer.rounded(x[:, None])[1].abs().max() == 0
    largest = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 4096)[:, None]
    assert int(integer.round_tokens(largest)[0].abs().max()) == 127  # never 128, whatever the division rounds to


def test_groups_that_the_kernel_cannot_sum_are_refused() -> None:
    with pytest.raises(SpecError, match="multiple of 32"):
        Uniform(group_size=48, activations=8)
    with pytest.raises(SpecError, match="activations is 4"):
        Uniform(activations=4)  # pyright: ignore[reportArgumentType]
    assert spec_from_dict(grid(4, 32).to_dict()) == grid(4, 32)
    assert rounds_inputs(Smoothed(LowRank(Rotated(grid(3, 64)))))
    assert not rounds_inputs(Rotated(Trellis()))


def test_the_table_rounds_where_the_spec_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rounding, plain, x = weight(8, 64, grid(4, 32)), weight(8, 64, Uniform(group_size=32)), some(3, 64, torch.float32)
    assert dispatch.select(x, rounding).name == "torch-int8"
    assert dispatch.select(x, plain).name == "torch"
    assert "torch: refuses, the weight's inputs are rounded to 8 bits" in dispatch.explain(x, rounding)
    assert "torch-int8: refuses, the weight takes its inputs as they are" in dispatch.explain(x, plain)
    bias = some(1, 8, torch.float32)[0]
    assert torch.equal(dispatch.matmul(x, rounding, bias), integer.matmul(x, rounding) + bias)
    with torch.autocast("cpu", torch.bfloat16):
        half = dispatch.matmul(x, rounding, bias)
    assert torch.equal(half, (integer.matmul(x.bfloat16().float(), rounding) + bias).bfloat16())
    x.requires_grad_(True)
    dispatch.matmul(x, rounding, bias).sum().backward()
    torch.testing.assert_close(x.grad, rounding.dequantize().sum(0).expand_as(x))
    monkeypatch.setenv("BITWRIGHT_KERNEL", "torch")
    with pytest.raises(dispatch.KernelError, match="rounded to 8 bits"):
        dispatch.matmul(x, rounding)


@pytest.mark.parametrize(
    "base", [grid(4, 32), Rotated(grid(4, 32)), LowRank(Uniform(bits=3), rank=3), Rotated(Trellis(window=8))]
)
def test_smoothed_weights_at_their_price(base: Spec, trained: tuple[Tensor, Statistics]) -> None:
    w, statistics = trained
    tokens = some(200, w.shape[1], torch.float32) @ statistics.hessian
    statistics = replace(statistics, sample=tokens, peaks=tokens.abs().amax(0)[None])
    spec = Smoothed(base, points=1)
    solved = Feedback(sweeps=0).solve(w, statistics, spec)
    packed, shape = solved.packed, (w.shape[0], w.shape[1])
    assert isinstance(packed, PackedSmoothed)
    assert spec_from_dict(spec.to_dict()) == spec
    assert spec.nbytes(shape) == base.nbytes(shape) + 2 * shape[1]
    stored = packed.tensors()
    assert sum(t.nbytes for t in stored.values()) == spec.nbytes(shape)
    again = LAYOUTS["smoothed"].from_tensors(spec, shape, stored)
    again.validate()
    assert torch.equal(again.dequantize(), packed.dequantize())
    assert torch.equal(packed.dequantize(torch.float32, 7, 33), packed.dequantize()[7:33])
    assert torch.allclose(packed.dequantize(), packed.base.dequantize() * packed.smooth.float())
    x, bias = some(5, shape[1], torch.float32), some(1, shape[0], torch.float32)[0]
    out = dispatch.matmul(x, packed, bias)
    assert torch.equal(out, dispatch.matmul(packed.inputs(x), packed.base, bias))
    if not rounds_inputs(spec):
        torch.testing.assert_close(out, x @ packed.dequantize().T + bias, rtol=1e-4, atol=1e-3)
    ordered = kernel_order(packed, 0, shape[0])
    assert dispatch.matmul(x, weight_of(spec, shape, ordered), bias).shape == out.shape
    back = checkpoint_order(spec, shape, ordered).tensors()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
    stored["smooth"] = stored["smooth"].clone().index_fill_(0, torch.tensor(2), 0.0)
    with pytest.raises(LayoutError, match="smooth"):
        LAYOUTS["smoothed"].from_tensors(spec, shape, stored).validate()


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    rerun(__file__)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([1, 3, 9]), rows=st.sampled_from([8, 40, 17]), columns=st.integers(1, 1400),
    bits=st.integers(1, 8), symmetric=st.booleans(), group=st.sampled_from([32, 64, 96, 128, 256, -1]),
    dtype=st.sampled_from([torch.float32, torch.float16]), biased=st.booleans(),
)  # fmt: skip
def interpreted_bits_are_the_same(
    tokens: int, rows: int, columns: int, bits: int, symmetric: bool, group: int, dtype: torch.dtype, biased: bool
) -> None:
    """Of both kernels, whatever shares K."""
    packed, x = weight(rows, columns, grid(bits, group, symmetric)), some(tokens, columns, dtype)
    bias = some(1, rows, dtype, 2)[0] if biased else None
    expected = integer.matmul(x, packed, bias)
    for few in (0, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(integer_launch, "UNPACK_FROM", few)
            assert torch.equal(integer_launch.matmul(x, arrange(packed), bias), expected)


def interpreted_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked a few rows at a time; what lies around the output stays as it was."""
    packed, x = weight(150, 100, grid(8, 32)), some(70, 100, torch.float32)
    monkeypatch.setattr(integer_launch, "UNPACK_FROM", 0)
    monkeypatch.setattr(integer_launch, "slices", lambda rows, _: [(n, min(rows, n + 64)) for n in range(0, rows, 64)])
    held, (codes, scale) = arrange(packed), integer.round_tokens(x)
    assert torch.equal(integer_launch.matmul(x, held), integer.matmul(x, packed))
    out, buffer = guarded((70, 150), torch.float32)
    unpacked = launch.dequantize(held, torch.int8, 64, 128)
    assert torch.equal(unpacked, (packed.codes(64, 128).int() - 128).to(torch.int8))
    integer_launch.multiply(codes, scale, unpacked, held.scales, held.zeros, None, out, 64, 8, 32)
    assert torch.equal(out[:, 64:128], integer.matmul(x, packed)[:, 64:128])
    assert torch.isnan(out[:, :64]).all()
    assert torch.isnan(out[:, 128:]).all()
    assert intact(buffer)
    turned = x.T.contiguous().T  # columns apart
    assert torch.equal(integer_launch.matmul(turned, held), integer.matmul(x, packed))
    single = weight(9, 100, grid(1, 32, symmetric=True))  # whose zero point is a half
    assert torch.equal(integer_launch.matmul(x, arrange(single)), integer.matmul(x, single))


def interpreted_module() -> None:
    """A wrapped weight in kernel order runs the int8 kernel and gives what the CPU gives."""
    from quant.linear import PackedLinear

    for spec in (grid(4, 64), Smoothed(grid(4, 64)), Smoothed(Rotated(grid(8, -1), measured=False))):
        module = PackedLinear(spec, 24, 256, bias=True)
        base = weight(24, 256, spec.core)  # pyright: ignore[reportArgumentType]
        own = {"smooth": torch.rand(256).half() + 0.5, "rotation": torch.tensor([1, 0]).byte()}
        own["input_signs"] = torch.randint(0, 256, (32,)).byte()
        tensors = {**own, **base.tensors()}
        tensors = {name: tensors[name] for name in spec.tensors((24, 256))}
        packed = LAYOUTS[spec.layout].from_tensors(spec, (24, 256), tensors)
        module.load_state_dict({**tensors, "bias": some(1, 24, torch.float32)[0]})
        x = some(5, 256, torch.float32)
        assert "triton-int8: runs" in dispatch.explain(x, module.operand)
        assert torch.equal(module(x), dispatch.matmul(x, packed, module.bias))
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in tensors.items())


TYPES = {"x_scale": "*fp32", "scales": "*fp16", "zeros": "*u8", "bias": "*fp16", "out": "*fp16", "M": "i32", "N": "i32"}


def compiled_without_fused_steps() -> None:
    """Each step of the definition is rounded once on a GPU too."""
    from quant.kernels.skinny import skinny_kernel

    types = {**TYPES, "x": "*fp16", "weight": "*i32", "residual": "*fp16", "partial": "*fp32", "counters": "*i32"}
    types |= dict.fromkeys(("K", "stride", "count", "each", "mask"), "i32")
    constants = launch.constants(4, 128, 8192, True, "fp16", integer.LONGEST) | {
        "BM": 16, "TILES": 2, "SPLIT": True, "EVEN": True, "ROUNDED": True, "BIAS": True, "RESIDUAL": False,
        "NATIVE": True,
    }  # fmt: skip
    fused, alone = (compile_for(90, skinny_kernel, types, constants, 1, 1, fusion) for fusion in (True, False))
    assert any(op.startswith("FFMA") for op in fused.ops)
    assert not any(op.startswith("FFMA") for op in alone.ops)
    assert any(op.startswith("HMMA") for op in alone.ops)
    assert alone.fits()


SHAPES = [(tokens, carried) for carried in (False, True) for tokens in (16, 4096)]
PAIRS = {(capability, *SHAPES[number % 4]) for number, capability in enumerate(sorted(SHARED_LIMIT))}


# every GPU and every shape, not every pair: all 24 were compiled once
@pytest.mark.parametrize(("capability", "tokens", "carried"), sorted(PAIRS | {(90, *shape) for shape in SHAPES}))
def compiled_for(capability: int, tokens: int, carried: bool) -> None:
    from quant.kernels.integer_product import integer_kernel

    bm, bn, warps = integer_launch.blocks(tokens, capability == 90)
    types = {**TYPES, "x": "*i8", "sums": "*i32" if carried else "*i8", "weight": "*i8"}
    types |= dict.fromkeys(("K", "first", "count"), "i32")
    constants = {
        "GROUP": 128, "SPAN": 128, "PART": 1024, "SUMS": carried, "UNIT": 1.0, "BIAS": True, "BM": bm, "BN": bn,
    }  # fmt: skip
    made = compile_for(capability, integer_kernel, types, constants, warps, integer_launch.STAGES, fusion=False)
    assert made.fits(), (made.registers, made.spilled, made.shared)
    if capability < 100 or not OLD:  # Triton 3.6 makes packed ones where it was asked for none
        assert not any(op.startswith("FFMA") for op in made.ops)
    assert any("MMA" in op and not op.startswith("HMMA") for op in made.ops), made.ops


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 5, 17, 100, 300])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 128, False), (8, 64, False), (8, -1, True), (3, 32, True)]
)
def test_the_bits_of_the_cpu(tokens: int, bits: int, group: int, symmetric: bool) -> None:
    packed = weight(264, 2144, grid(bits, group, symmetric))
    x, bias = some(tokens, 2144, torch.float32), some(1, 264, torch.float32, 2)[0]
    there = PackedUniform.from_tensors(packed.spec, packed.shape, {k: v.cuda() for k, v in packed.tensors().items()})
    found = integer_launch.matmul(x.cuda(), arrange(there), bias.cuda())
    assert torch.equal(found.cpu(), integer.matmul(x, packed, bias))
