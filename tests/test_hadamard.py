"""The block Hadamard transform: what it is, that it undoes itself, and that the kernel is the reference bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.kernels import hadamard as module
from quant.kernels.hadamard import FACTORS, block_for, hadamard, paley, random_signs, reference, split_order
from tests.ahead import SHARED_LIMIT, compile_for
from tests.rerun import rerun

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCKS = (1, 2, 16, 128, 2048, 12, 40, 448, 1152)
GUARD = 64  # elements before and after a buffer


def some(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sylvester(block: int) -> Tensor:
    """The matrix of one block, from the definition."""
    factor, size = split_order(block)
    walsh = torch.ones((1, 1), dtype=torch.float64)
    for _ in range(size.bit_length() - 1):
        walsh = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), walsh)
    return walsh if factor == 1 else torch.kron(paley(factor).double(), walsh)


def roundoff(block: int) -> float:
    """Bound of the error of one transform in float32, as a share of the block's norm: each of the log2 rounds of sums,
    or the factor's sum of so many terms, adds a unit roundoff (Higham, Accuracy and Stability, lemma 3.1)."""
    factor, size = split_order(block)
    return (factor + size.bit_length() + 2) * 2.0**-24


@pytest.mark.parametrize("order", [order for order in FACTORS if order > 1])
def test_factors_are_hadamard_matrices(order: int) -> None:
    matrix = paley(order).long()
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.long))


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_the_matrix_product(block: int) -> None:
    x, signs, matrix = some((3, 2 * block), torch.float64), random_signs(2 * block, 1), sylvester(block) / block**0.5
    expected = ((x * signs).view(3, 2, block) @ matrix.T).view(3, -1)
    torch.testing.assert_close(hadamard(x, block, signs), expected, rtol=0, atol=1e-12)
    back = (x.view(3, 2, block) @ matrix).view(3, -1) * signs
    torch.testing.assert_close(hadamard(x, block, signs, inverse=True), back, rtol=0, atol=1e-12)
    single = hadamard(x.float(), block, signs)
    assert float((single - expected).abs().max()) <= (roundoff(block) + 2.0**-24) * float(x.norm())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    block=st.sampled_from(BLOCKS), count=st.integers(1, 3), rows=st.integers(0, 4), signed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_it_undoes_itself(block: int, count: int, rows: int, signed: bool, dtype: torch.dtype) -> None:
    x = some((rows, count * block), dtype)
    signs = random_signs(count * block, 2) if signed else None
    turned = hadamard(x, block, signs)
    assert (turned.dtype, turned.shape) == (dtype, x.shape)
    back = hadamard(turned, block, signs, inverse=True)
    assert torch.equal(turned, reference(x, block, signs))  # what numba compiled
    assert torch.equal(back, reference(turned, block, signs, inverse=True))
    # both transforms, and the rounding of the result of each to the dtype
    bound = (2 * roundoff(block) + 2 * torch.finfo(dtype).eps) * x.double().unflatten(-1, (-1, block)).norm(dim=-1)
    assert bool(((back - x).double().unflatten(-1, (-1, block)).abs() <= bound[..., None]).all())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own first jvp uses it
@pytest.mark.parametrize("block", [16, 12])
def test_strides_and_gradients(block: int) -> None:
    x = some((96, 5, 2), torch.float64).permute(2, 1, 0).requires_grad_()
    signs = random_signs(96, 0)
    assert torch.equal(hadamard(x, block, signs), hadamard(x.detach().contiguous(), block, signs))
    assert hadamard(x, block, signs).is_contiguous()
    assert hadamard(x[..., :0], block).shape == (2, 5, 0)
    for inverse in (False, True):
        (grad,) = torch.autograd.grad(hadamard(x, block, signs, inverse).square().sum(), x)
        torch.testing.assert_close(grad, 2 * x.detach(), rtol=0, atol=1e-12)  # orthonormal: the norm is kept
        _, along = torch.func.jvp(lambda x, i=inverse: hadamard(x, block, signs, i), (x.detach(),), (x.detach(),))
        torch.testing.assert_close(along, hadamard(x.detach(), block, signs, inverse), rtol=0, atol=1e-12)


def test_blocks_for_the_widths_of_real_models() -> None:
    widths = (4096, 11008, 13824, 14336, 5120, 3072, 1152, 4304, 8960, 2730, 7)
    assert [block_for(n) for n in widths] == [128, 128, 128, 128, 128, 128, 128, 16, 128, 2, 1]
    assert [block_for(n, 2048) for n in widths] == [2048, 256, 1536, 2048, 1280, 1536, 1152, 16, 1792, 2, 1]


def test_signs_come_from_the_seed() -> None:
    signs = random_signs(1000, 5)
    assert torch.equal(signs, random_signs(1000, 5))
    assert sorted(signs.unique().tolist()) == [-1, 1]
    assert not torch.equal(signs, random_signs(1000, 6))
    assert abs(int(signs.sum())) < 4 * 1000**0.5


def test_refusals() -> None:
    for block in (0, -2, 3, 24 * 1024, 4096, 100):
        with pytest.raises(ValueError, match=f"block is {block}; a power of two to 2048"):
            hadamard(torch.ones(100), block)
    with pytest.raises(ValueError, match="last dimension of blocks of 16 expected"):
        hadamard(torch.ones(100), 16)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        hadamard(torch.ones(16, dtype=torch.long), 16)
    with pytest.raises(ValueError, match=r"signs \[8\] on cpu; 16 on cpu are expected"):
        hadamard(torch.ones(16), 16, torch.ones(8))


def test_kernel_under_the_interpreter() -> None:
    rerun(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_kernel_on_a_gpu(block: int, dtype: torch.dtype) -> None:
    x, signs = some((37, 3 * block), dtype).cuda(), random_signs(3 * block, 0).cuda()
    for inverse in (False, True):
        assert torch.equal(hadamard(x, block, signs, inverse), reference(x, block, signs, inverse))


def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer of NaN, and the middle of it in the shape of `like`."""
    buffer = torch.full((like.numel() + 2 * GUARD,), torch.nan, dtype=like.dtype)
    return buffer, buffer[GUARD:-GUARD].view(like.shape)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    block=st.sampled_from(BLOCKS), count=st.integers(1, 3), rows=st.integers(1, 3), signed=st.booleans(),
    inverse=st.booleans(), turned=st.booleans(), dtype=st.sampled_from(DTYPES[:3]),
)  # fmt: skip
def interpreted_kernel_is_the_reference(
    block: int, count: int, rows: int, signed: bool, inverse: bool, turned: bool, dtype: torch.dtype
) -> None:
    from quant.kernels.butterflies import launch

    n = count * block
    around, x = guarded(some((n, rows) if turned else (rows, n), dtype))
    x.copy_(some(tuple(x.shape), dtype))
    x = x.T if turned else x
    buffer, out = guarded(torch.empty((rows, n), dtype=dtype))
    signs = random_signs(n, 3) if signed else None
    factor, size = split_order(block)
    table = None if factor == 1 else module._table(factor, inverse, x.device)
    launch(x, out, size, table, signs, inverse)
    assert bool(buffer[:GUARD].isnan().all())
    assert bool(buffer[-GUARD:].isnan().all())
    assert bool(around[:GUARD].isnan().all())
    if dtype == torch.bfloat16:  # the interpreter cuts where a GPU rounds: up to one unit of the last place
        exact = reference(x.float(), block, signs, inverse)
        assert bool(((out.float() - exact).abs() <= 2.0**-7 * exact.abs()).all())
    else:
        assert torch.equal(out, reference(x, block, signs, inverse))


def interpreted_dispatch_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, signs = some((96, 4, 3)).permute(1, 2, 0), random_signs(192, 0)[::2]
    expected = reference(x, 32, signs)
    assert hadamard(x[:0], 32, signs).shape == (0, 3, 96)
    assert hadamard(x[..., :0], 32).shape == (4, 3, 0)
    monkeypatch.setattr(module, "reference", None)
    assert torch.equal(hadamard(x, 32, signs), expected)


SHAPES = ((1, 128), (1, 2048), (28, 512))


@pytest.mark.parametrize(
    ("capability", "shapes"),
    [(n, SHAPES if n == 90 else SHAPES[index % 3 :][:1]) for index, n in enumerate(sorted(SHARED_LIMIT))],
)
def compiled_kernel_fits(capability: int, shapes: tuple[tuple[int, int], ...]) -> None:
    """Every block fits without spilling; the blocks that matter in few instructions. Every GPU and every shape, not
    every pair: all 18 were compiled once."""
    from quant.kernels.butterflies import hadamard_kernel, shape

    types = {"x": "*fp16", "out": "*fp16", "signs": "*i8", "table": "*fp32", "total": "i32", "chunks": "i32"}
    for factor, size in shapes:
        sizes, warps = shape(size, factor)
        constants = sizes | {"BEFORE": True, "AFTER": False, "row": 4096, "column": 1, "EARLY": capability // 10 == 9}
        made = compile_for(capability, hadamard_kernel, types | {"scale": "fp32"}, constants, warps, 3)
        assert made.fits()
        if factor == 1:
            each = sum(made.ops.values()) / (sizes["ROWS"] * size / 32)
            assert each < 32  # at 4.8 TB/s an H200 has time for 28 instructions for each float16 read and written
