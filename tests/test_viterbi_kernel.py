"""The Triton search for paths against the one in torch, state by state; and what compiles for GPUs."""

from __future__ import annotations

import pytest
import torch

from quant.kernels import viterbi
from tests.ahead import OLD, SHARED_LIMIT, compile_for
from tests.rerun import rerun


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    rerun(__file__)


@pytest.mark.parametrize("largest", [13, 3])
@pytest.mark.parametrize(
    ("bits", "window", "length", "vector"),
    [(1, 5, 9, 1), (2, 8, 14, 1), (3, 9, 8, 1), (4, 8, 7, 1), (2, 10, 1, 1), (4, 8, 6, 2), (6, 9, 5, 2)],
)
def interpreted_the_states_of_torch(
    bits: int, window: int, length: int, vector: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With costs in registers and in memory, whatever the seam, with many ties, and in more than one launch."""
    from quant.kernels import viterbi_kernel

    monkeypatch.setattr(viterbi_kernel, "LARGEST", largest)
    monkeypatch.setattr(viterbi_kernel, "CHUNK", 1 << window - 1)
    monkeypatch.setattr(viterbi_kernel, "MEMORY", 20 << window if largest == 3 else 1 << 28)
    source = torch.Generator().manual_seed(bits)
    x, weight = (make((3, length * vector), generator=source) for make in (torch.randn, torch.rand))
    states = (vector, 1 << window)
    seam = torch.tensor([viterbi.FREE, 0, (1 << window - bits) - 1], dtype=torch.int32)
    for table in (torch.randn(states, generator=source), torch.randint(-2, 3, states, generator=source).float()):
        expected = viterbi.reference(x, weight, table, bits, seam)
        assert torch.equal(viterbi_kernel.best(x, weight, table, bits, seam), expected)


@pytest.mark.parametrize(
    ("capability", "bits", "window", "vector"),
    [*((capability, 2, 12, 1) for capability in sorted(SHARED_LIMIT)), (90, 3, 16, 1), (90, 4, 12, 2)],
)
def compiled_for(capability: int, bits: int, window: int, vector: int) -> None:
    from quant.kernels import viterbi_kernel as kernels

    types = dict.fromkeys(("x", "weight", "values"), "*fp32") | {"seam": "*i32", "came": "*u8", "states": "*i32"}
    constants, small = {"STATES": 1 << window, "BITS": bits, "VECTOR": vector}, window <= kernels.LARGEST
    if not small:
        types, constants = types | {"scratch": "*fp32"}, constants | {"GROUPS": kernels.CHUNK >> bits}
    kernel = kernels.small_kernel if small else kernels.large_kernel
    made = compile_for(capability, kernel, types | {"length": "i32"}, constants, 8, 3, fusion=False)
    assert made.fits(), (made.registers, made.spilled, made.shared)
    if capability < 100 or not OLD:  # rounded after every operation, as in torch
        assert not any(op.startswith("FFMA") for op in made.ops)
    assert "allow_reorder" not in made.ttgir  # costs may not move when their numbers do not


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("bits", "window"), [(2, 12), (3, 14)])
def test_the_states_of_the_cpu(bits: int, window: int) -> None:
    x = torch.randn((40, 256), generator=torch.Generator().manual_seed(0))
    table = torch.randn((1, 1 << window), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    expected = viterbi.search(x, weight, table, bits)
    found = viterbi.search(x.cuda(), weight.cuda(), table.cuda(), bits).cpu()
    assert torch.equal(found, expected.to(found.dtype))
