"""The kernel of codebooks whose tables lie in shared memory: against the reference, on ragged sizes with poisoned
outputs, and what compiles for GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quant.kernels import codebook_launch
from quant.kernels.blocks import Config
from quant.kernels.codebook import Codebook
from quant.kernels.codebook_launch import choose_shared, is_shared
from quant.kernels.codebook_order import arrange, column_tiles
from tests.ahead import Compiled, compile_for
from tests.guarded import guarded, intact
from tests.rerun import rerun
from tests.test_codebook_kernel import bound, some, weight


def fast(rows: int = 4096) -> Codebook:
    return Codebook(length=4, index_bits=8, rows=rows)


def test_configurations() -> None:
    """What was fastest on an H200, with clusters where their blocks find room; no program is without columns."""
    for rows, columns, splits, blocks in (
        (28672, 8192, 2, 2), (8192, 28672, 8, 1), (8192, 8192, 4, 1), (4096, 4096, 4, 4), (1024, 8192, 8, 8),
    ):  # fmt: skip
        config = choose_shared(1, rows, columns, 132)
        assert config == Config(4, 128, 4, 1, splits)
        assert codebook_launch.blocks_of(config, -(-rows // 128), 132, True) == blocks
        assert codebook_launch.blocks_of(config, -(-rows // 128), 132, False) == 1
    assert choose_shared(16, 8192, 8192, 132) == Config(16, 128, 4, 1, 8)
    assert choose_shared(1, 20, 100, 132).splits == 1
    assert codebook_launch.choose(5, 8192, 8192, 4, 132, shared=True).bm == 8
    for columns in (100, 256, 1000, 8192, 28672):
        for config in codebook_launch.candidates(1, 4096, columns, 4, 132, shared=True):
            units = 2 * column_tiles(columns)
            part = codebook_launch.takes_of(2, units, config.splits, config.warps)[0] * config.warps
            assert (config.splits - 1) * part < units <= config.splits * part
        best = choose_shared(1, 4096, columns, 132)
        assert codebook_launch.busy(2 * column_tiles(columns), best.splits, best.warps)
    assert is_shared(4, 8, 0)
    assert not is_shared(4, 8, 2)
    assert not is_shared(4, 7, 0)


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    rerun(__file__)


CASES = [
    (1, 44, 90, fast(40), torch.float16, Config(4, 64, 1, 1, 1)),
    (1, 100, 330, fast(), torch.bfloat16, Config(4, 128, 2, 1, 2)),
    (3, 60, 72, fast(39), torch.bfloat16, Config(4, 128, 2, 1, 1)),
    (7, 30, 140, fast(), torch.float16, Config(8, 64, 2, 1, 2)),
    (18, 20, 72, fast(), torch.bfloat16, Config(16, 64, 8, 1, 1)),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("clusters", [False, True])
def interpreted_matmul(case: tuple[Any, ...], clusters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that end amid a program and amid a vector, units that are missing, tokens of very different size."""
    monkeypatch.setattr(codebook_launch, "clusters", lambda device: clusters)
    tokens, rows, columns, spec, dtype, config = case
    packed = weight(rows, columns, spec)
    x = (some(tokens, columns, dtype) * torch.tensor(0.5) ** (torch.arange(tokens) % 8)[:, None]).to(dtype)
    held, bias = arrange(packed), some(1, rows, dtype, 2)[0] if tokens < 4 else None
    exact = x.double() @ packed.dequantize(torch.float64).T
    out, buffer = guarded((tokens, rows), dtype)
    parts = held.weight, held.codebook, None, None, held.scales, held.peaks, bias, out
    codebook_launch.launch(x, *parts, rows, columns, 4, 8, 0, 0, spec.rows, config)
    expected = exact if bias is None else exact + bias.double()
    error = (out.double() - expected).abs()
    allowed = bound(x, packed, exact) + 2 * torch.finfo(dtype).eps * expected.abs()
    assert bool((error <= allowed).all()), float(error.max())
    assert intact(buffer)
    assert torch.equal(held.dequantize(torch.float32), packed.dequantize())


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of infinity times 0
def interpreted_bfloat16_of_any_size() -> None:
    packed = weight(20, 140, fast())
    held, x = arrange(packed), some(5, 140, torch.bfloat16)
    x *= torch.tensor([2.0**-118, 2.0**110, 0.0, 1.0, torch.inf], dtype=torch.bfloat16)[:, None]
    found = codebook_launch.matmul(x, held)
    exact = x.double() @ packed.dequantize(torch.float64).T
    assert bool(((found.double() - exact).abs()[:4] <= (bound(x, packed, exact) + 2.0**-126)[:4]).all())
    assert not torch.isfinite(found[4, 1:7]).any()


SHAPES = [(1, "fp16"), (1, "bf16"), (4, "bf16"), (8, "bf16"), (16, "bf16"), (16, "fp16")]
# every shape and three GPUs, not every pair
PAIRS = list(zip((90, 80, 100, 80, 90, 100), SHAPES, strict=True))


@pytest.mark.parametrize(("capability", "case"), PAIRS)
def compiled_for(capability: int, case: tuple[Any, ...]) -> None:
    """A unit takes 16 lookups per 8 vector rows and half as many products for every 4 tokens; 128 registers let a
    multiprocessor have 16 warps (of 16 tokens, 8), and 48 KiB need no leave."""
    made, tiles, parts = compiled(capability, *case), 4, -(-case[0] // 4)
    assert made.fits(), (made.registers, made.spilled, made.shared, made.static)
    assert made.registers <= (128 if case[0] < 16 else 255)
    assert 32768 <= made.static <= 33792 + (case[0] == 1) * 9216  # one table, what the driver keeps, and one token
    assert made.shared + made.static <= 48 * 1024
    assert sum(n for op, n in made.ops.items() if op.startswith("LDS.64")) == 16 * tiles
    assert sum(n for op, n in made.ops.items() if op.startswith("HMMA")) == 8 * tiles * parts


def compiled(capability: int, tokens: int, dtype: str, config: Config | None = None) -> Compiled:
    """The default configuration for a matrix of 28672 x 8192."""
    from quant.kernels.codebook_shared import codebook_shared_kernel

    config = config or choose_shared(tokens, 28672, 8192, 132)
    ctas = codebook_launch.blocks_of(config, 224, 132, capability // 10 == 9)
    types = dict.fromkeys(("x", "bias", "out"), f"*{dtype}") | dict.fromkeys(("table", "partial"), "*fp32")
    types |= dict.fromkeys(("codebook", "peaks"), "*fp16") | {"scales": "*u8"}
    types |= dict.fromkeys(("weight", "counters"), "*i32")
    types |= dict.fromkeys(("M", "N", "K", "stride", "units", "each", "tiles", "per"), "i32")
    constants = {"GROUP": 4096, "BM": config.bm, "TILES": config.bn // 32, "WARPS": config.warps, "ONE": tokens == 1}
    constants |= {
        "CTAS": ctas,
        "STEPS": codebook_launch.takes_of(tokens, 128, config.splits, config.warps)[1],
        "SPLIT": config.splits > ctas,
        "EVEN": True,
        "BIAS": True,
        "NATIVE": True,
        "EARLY": capability // 10 == 9,
    }
    return compile_for(capability, codebook_shared_kernel, types, constants, config.warps, config.stages, blocks=ctas)
