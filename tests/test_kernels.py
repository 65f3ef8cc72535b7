"""Layouts against their spec and their definition; the torch reference against a plain product; the dispatch table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.kernels import dispatch, reference
from quant.kernels.dispatch import KernelError, explain
from quant.kernels.layouts import LAYOUTS, LayoutError, PackedUniform
from quant.kernels.packed import concatenate
from quant.kernels.spec import DTYPES, Uniform


def some_packed(spec: Uniform, shape: tuple[int, int], seed: int = 0) -> PackedUniform:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = spec.groups(columns)
    codes = torch.randint(0, 2**spec.bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.randn((rows, groups), generator=generator).to(DTYPES[spec.scale_dtype])
    zeros = torch.randint(0, 2**spec.bits, (rows, groups), dtype=torch.uint8, generator=generator)
    return PackedUniform.from_codes(spec, shape, codes, scales, None if spec.symmetric else zeros)


def slow_dequantize(packed: PackedUniform) -> Tensor:
    """The definition, weight by weight."""
    spec, (rows, columns) = packed.spec, packed.shape
    codes, zeros, width = packed.codes(), packed.zero_points(), spec.group_width(columns)
    weight = torch.full(packed.shape, torch.nan)
    for row in range(rows):
        for i in range(columns):
            scale = packed.scales[row, i // width].float()
            weight[row, i] = scale * (codes[row, i].float() - zeros[row, i // width])
    return weight


specs = st.builds(
    Uniform,
    bits=st.integers(1, 8),
    group_size=st.sampled_from([-1, 1, 3, 16, 64]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 40))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(spec=specs, shape=shapes)
def test_uniform_is_its_definition_and_its_spec(spec: Uniform, shape: tuple[int, int]) -> None:
    packed = some_packed(spec, shape)
    assert torch.equal(packed.dequantize(), slow_dequantize(packed))
    stored, promised = packed.tensors(), spec.tensors(shape)
    assert list(stored) == list(promised)
    for name, tensor in stored.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[promised[name].dtype], promised[name].shape)
    assert sum(tensor.nbytes for tensor in stored.values()) == spec.nbytes(shape)
    packed.validate()
    again = LAYOUTS[spec.layout].from_tensors(spec, shape, stored)
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_rows_can_be_cut_out_and_stacked() -> None:
    spec = Uniform(bits=3, group_size=16)
    parts = [some_packed(spec, (rows, 21), rows) for rows in (5, 1, 7)]
    whole = concatenate(parts)
    whole.validate()
    assert whole.shape == (13, 21)
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert torch.equal(whole.dequantize(start=5, stop=9), whole.dequantize()[5:9])
    assert torch.equal(whole.dequantize(torch.bfloat16, 6), whole.dequantize()[6:].bfloat16())
    assert whole.dequantize(start=13).shape == (0, 21)
    with pytest.raises(LayoutError, match="parts must share spec and columns"):
        concatenate([parts[0], some_packed(Uniform(bits=4, group_size=16), (2, 21))])


def test_moving_keeps_everything() -> None:
    packed = some_packed(Uniform(bits=5, group_size=8), (3, 20))
    moved = packed.to("meta")
    assert moved.device == torch.device("meta")
    assert moved.tensors()["zeros"].shape == packed.tensors()["zeros"].shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, r"weight: missing; uint8 \[24\] is expected"),
        (
            {"g_idx": torch.zeros(3)},
            "g_idx: a tensor that layout 'uniform' does not have",
        ),
        ({"scales": torch.zeros(3, 2)}, r"scales: float32 \[3, 2\] came; float16 \[3, 2\] is expected"),
        ({"zeros": torch.zeros((3, 2), dtype=torch.uint8)}, r"zeros: uint8 \[3, 2\] came; uint8 \[3, 1\] is expected"),
        ({"weight": torch.zeros((3, 8), dtype=torch.uint8)}, r"weight: uint8 \[3, 8\] came; uint8 \[24\] is expected"),
    ],
)
def test_other_tensors_than_promised_are_named(change: dict[str, Tensor | None], message: str) -> None:
    packed = some_packed(Uniform(bits=3, group_size=16), (3, 20))
    tensors = {name: tensor for name, tensor in {**packed.tensors(), **change}.items() if tensor is not None}
    with pytest.raises(LayoutError, match=message):
        PackedUniform.from_tensors(packed.spec, packed.shape, tensors)


def test_values_that_cannot_be_are_named() -> None:
    packed = some_packed(Uniform(bits=3, group_size=16), (3, 20))
    scales = packed.scales.clone()
    scales[1, 1] = torch.nan
    with pytest.raises(LayoutError, match="scales: 1 of 6 are not finite"):
        replace(packed, scales=scales).validate()
    for name in ("weight", "zeros"):
        altered = packed.tensors()[name].clone()
        altered[-1] |= 0x80  # 60 bits of codes in 8 bytes, 6 bits of zeros in 1
        with pytest.raises(LayoutError, match=f"{name}: the padding bits"):
            replace(packed, **{name: altered}).validate()
    with pytest.raises(LayoutError, match=r"codes have shape \[3, 20\]; \[3, 21\] is expected"):
        PackedUniform.from_codes(packed.spec, (3, 21), packed.codes(), packed.scales)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(spec=specs, shape=shapes, lead=st.sampled_from([(), (0,), (1,), (2, 3), (2, 0, 3)]), rows=st.integers(1, 3))
def test_product_in_chunks_is_the_plain_product(
    spec: Uniform, shape: tuple[int, int], lead: tuple[int, ...], rows: int
) -> None:
    packed, bias = some_packed(spec, shape), torch.randn(shape[0])
    x = torch.randn((*lead, shape[1]))
    chunked = reference.matmul(x, packed, bias, max_bytes=rows * shape[1] * 5)
    # a row's dot product does not depend on the rows beside it, up to the order of a float32 sum
    torch.testing.assert_close(chunked, x @ packed.dequantize().T + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_product_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    packed = some_packed(Uniform(bits=4, group_size=16), (24, 40))
    x = torch.randn(40, 6).T.to(dtype)  # not contiguous
    out = reference.matmul(x, packed, max_bytes=1)
    assert out.dtype == dtype
    expected = x.double() @ packed.dequantize(dtype).double().T
    # 40 products of size about 8, each rounding of their sum worth half an eps of it
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=40 * 8 * torch.finfo(dtype).eps)


def test_gradients_reach_x_and_bias() -> None:
    packed = some_packed(Uniform(bits=2, group_size=8), (7, 12))
    x, bias = torch.randn(2, 3, 12, requires_grad=True), torch.randn(7, requires_grad=True)
    weight, upstream = packed.dequantize(), torch.randn(2, 3, 7)
    reference.matmul(x, packed, bias, max_bytes=100).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ weight)
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))


def test_a_product_that_does_not_fit_is_refused() -> None:
    packed = some_packed(Uniform(), (3, 20))
    with pytest.raises(ValueError, match=r"x has shape \[4, 21\]; its last dimension must be 20"):
        reference.matmul(torch.zeros(4, 21), packed)
    with pytest.raises(KernelError, match=r"torch: refuses, x is torch.int64, not floating-point"):
        dispatch.matmul(torch.zeros((4, 20), dtype=torch.int64), packed)


def test_dispatch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = some_packed(Uniform(), (3, 20)), torch.randn(4, 20)
    never = dispatch.Kernel("never", lambda _x, _packed: "it is a test", lambda *_: torch.empty(0))
    rows = {kernel.name: kernel for kernel in dispatch.KERNELS}
    triton, last = rows["triton"], rows["torch"]
    monkeypatch.setattr(dispatch, "KERNELS", (never, triton, last, replace(last, name="spare")))
    lines = explain(x, packed).splitlines()
    assert lines[::2] == ["never: refuses, it is a test", "torch: runs"]
    assert lines[1].startswith("triton: refuses, the weight is not in kernel order")
    assert lines[3] == "spare: also accepts"
    assert torch.equal(dispatch.matmul(x, packed), reference.matmul(x, packed))
    assert "x is on cpu, the weight on meta" in explain(x, packed.to("meta"))

    monkeypatch.setenv("BITWRIGHT_KERNEL", "spare")
    assert dispatch.select(x, packed).name == "spare"
    assert explain(x, packed).startswith("never: passed over, BITWRIGHT_KERNEL=spare\n")
    monkeypatch.setenv("BITWRIGHT_KERNEL", "never")
    with pytest.raises(KernelError, match="never: refuses, it is a test"):
        dispatch.matmul(x, packed)
    monkeypatch.setenv("BITWRIGHT_KERNEL", "cuda")
    with pytest.raises(KernelError, match="BITWRIGHT_KERNEL='cuda' names no kernel; there are: never, triton, torch, "):
        dispatch.matmul(x, packed)
