"""The kernel of the feedback loop against the loop in torch: the same codes wherever rounding could not tip a tie."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.calibration.statistics import HessianCollector, Statistics
from quant.kernels.spec import Uniform
from quant.solvers.factor import Factor, Order, factorise
from quant.solvers.feedback import Feedback, _pieces, feed
from quant.solvers.grid import SEARCH, encode
from quant.solvers.rounder import Rehearsal, UniformRounder
from tests.ahead import SHARED_LIMIT, compile_for
from tests.rerun import rerun

UNIT = 2.0**-24  # roundoff of float32
GUARD = 64  # elements before and after a buffer


@dataclass(frozen=True)
class Problem:
    """As `round_columns` takes it."""

    work: Tensor
    lines: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    held: Tensor | None
    share: Tensor | None


def problem(batch: int, columns: int, rows: int, bits: int, one_grid: bool, descent: bool, seed: int) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    lines = min(0.1, 4 / columns) * torch.randn((batch, columns, columns), generator=draw)
    lines = lines + lines.mT if descent else lines.triu(1)
    lines.diagonal(dim1=1, dim2=2).fill_(1.0)
    grids = (batch, 1 if one_grid else columns, rows)
    scales = (3 / 2**bits * (0.5 + torch.rand(grids, generator=draw))).half().float()
    scales[torch.rand(grids, generator=draw) < 0.05] = 0
    zeros = torch.randint(0, 2**bits, grids, generator=draw).float()
    scales, zeros = scales.expand(-1, columns, -1), zeros.expand(-1, columns, -1)
    work = torch.randn((batch, columns, rows), generator=draw)
    if not descent:
        return Problem(work, lines, scales, zeros, bits, None, None)
    codes = torch.randint(0, 2**bits, work.shape, generator=draw)
    return Problem(0.2 * work, lines, scales, zeros, bits, (codes - zeros) * scales, torch.ones(columns))


def in_torch(p: Problem, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One matrix, column by column as `feed` and `descend` do it. Returns levels, errors and codes `[k, out]`, a bound
    on how far an error may lie from another correct float32 computation's, and where that is certain to have the same
    codes.

    A value is the sum of `i` products and a weight, each product and each sum rounded (or both at once): two
    computations differ by at most `2 (2 i u)` times the sum of the magnitudes (Higham, Accuracy and Stability, section
    3.1), and by what the errors that enter differ already.
    """
    work, scales, zeros = p.work[b].clone(), p.scales[b], p.zeros[b]
    size, drift = work.abs().double(), torch.zeros_like(work, dtype=torch.float64)
    levels, errors, codes, doubts = (torch.empty_like(drift) for _ in range(4))
    tie = torch.zeros_like(work, dtype=torch.bool)
    for i, line in enumerate(p.lines[b]):
        value = work[i] if p.held is None or p.share is None else torch.add(p.held[b, i], work[i] * p.share[i])
        code = encode(value, scales[i], zeros[i], p.bits)
        level = (code - zeros[i]) * scales[i]
        error = value - level if p.held is None else level - p.held[b, i]
        doubt = drift[i] + 4 * i * UNIT * size[i] + 4 * UNIT * value.abs()
        step = torch.where(scales[i] == 0, 1.0, scales[i]).double()
        position = value / step + zeros[i]
        away = (position - position.floor() - 0.5).abs()
        tie[i] = away <= doubt / step + 4 * UNIT * (position.abs() + zeros[i])
        levels[i], errors[i], codes[i], doubts[i] = level, error, code, doubt + 2 * UNIT * error.abs()
        work.addr_(line * (torch.arange(len(line)) > i), error, alpha=-1)
        size.addr_(line.abs().double(), error.abs().double())
        if p.held is None:
            drift.addr_(line.abs().double(), doubts[i])
    return levels.float(), errors.float(), codes.byte(), doubts, tie.cumsum(0) == 0


def guarded(like: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    buffer = torch.full((like.numel() + 2 * GUARD,), fill, dtype=like.dtype, device=like.device)
    return buffer, buffer[GUARD:-GUARD].view(like.shape)


def check(p: Problem) -> None:
    from quant.kernels.feedback import round_columns

    before = p.work.clone()
    kinds = (p.work, p.work, p.work.byte())
    (around_r, rounded), (around_e, errors), (around_c, codes) = (
        guarded(like, fill) for like, fill in zip(kinds, (torch.nan, torch.nan, 255), strict=True)
    )
    round_columns(p.work, p.lines, p.scales, p.zeros, p.bits, rounded, errors, codes, p.held, p.share)
    assert torch.equal(p.work, before)
    for around in (around_r, around_e, around_c):
        for guard in (around[:GUARD], around[-GUARD:]):
            assert bool((guard.isnan() | (guard == 255)).all())
    assert int(codes.max()) < 2**p.bits
    assert torch.equal(rounded, (codes - p.zeros) * p.scales)
    for b in range(len(p.work)):
        _, expected, wanted, doubts, certain = in_torch(p, b)
        assert float(certain.float().mean()) > 0.75  # else the test would say nothing
        assert torch.equal(codes[b][certain], wanted[certain])
        assert bool(((errors[b] - expected).abs() <= doubts)[certain].all())


problems = st.builds(
    problem, batch=st.integers(1, 3), columns=st.sampled_from([1, 2, 15, 16, 17, 33]), rows=st.integers(1, 150),
    bits=st.integers(1, 8), one_grid=st.booleans(), descent=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(p=problems)
def interpreted_kernel_is_the_loop_in_torch(p: Problem) -> None:
    check(p)


def interpreted_a_whole_block() -> None:
    check(problem(1, 128, 19, 3, True, False, 0))


def interpreted_a_shared_factor_is_not_copied() -> None:
    p = problem(2, 20, 9, 4, False, False, 1)
    shared = Problem(p.work, p.lines[:1].expand(2, -1, -1), p.scales, p.zeros, 4, None, None)
    check(shared)


@pytest.mark.parametrize("descent", [False, True])
def interpreted_more_columns_than_one_launch_takes(descent: bool) -> None:
    check(problem(2, 131, 5, 4, True, descent, 0))


def interpreted_matrices_that_are_not_contiguous_are_refused() -> None:
    from quant.kernels.feedback import round_columns

    p = problem(1, 4, 6, 4, True, False, 0)
    out = torch.empty((1, 6, 4)).mT
    with pytest.raises(ValueError, match=r"\[1, 4, 6\] came for \[1, 4, 6\], or matrices that are not contiguous"):
        round_columns(p.work, p.lines, p.scales, p.zeros, 4, out, out, out.byte())


def statistics(features: int) -> HessianCollector:
    draw = torch.Generator().manual_seed(0)
    collector = HessianCollector(features)
    collector.update(torch.randn((300, features), generator=draw) @ torch.randn((features, features), generator=draw))
    return collector


def some_weight(rows: int, columns: int) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("order", "group", "block", "static"),
    [
        ("gar", 16, 48, False),
        ("gar", -1, 32, False),
        ("none", 9, 200, False),
        ("gar", 16, 48, True),
        ("act", 16, 40, True),
    ],
)
def interpreted_feed_takes_the_kernel(
    order: Order, group: int, block: int, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that start inside a block, groups wider than one, columns of many groups in one piece."""
    stats, spec = statistics(70).finish(), Uniform(bits=3, group_size=group)
    weight, found = some_weight(11, 70), list[Tensor]()
    for kernel in (True, False):
        rounder = UniformRounder(spec, (11, 70), weight.device, SEARCH)
        factor = factorise(stats, order, 0.01, rounder.span, 1)
        assert isinstance(factor, Factor)
        with monkeypatch.context() as patch:
            if kernel:
                patch.setattr(rounder, "round", None)
            else:
                patch.delenv("BITWRIGHT_INTERPRET")
            quantized = feed(weight, factor, rounder, stats.diagonal, block, static)
        assert torch.equal(rounder.pack().dequantize(), quantized)
        found.append(rounder.codes)
    assert float((found[0] != found[1]).float().mean()) < 0.005  # a tie may tip


def interpreted_solve_takes_the_kernel_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 bits: with rehearsals, then feedback, then two sweeps of descent."""
    stats, spec, weight = statistics(40).finish(), Uniform(bits=2, group_size=16), some_weight(5, 40)
    with monkeypatch.context() as patch:
        patch.setattr(UniformRounder, "round", None)
        patch.setattr(Rehearsal, "loss", None)
        found = Feedback(block=24).solve(weight, stats, spec)
    monkeypatch.delenv("BITWRIGHT_INTERPRET")
    expected = Feedback(block=24).solve(weight, stats, spec)
    assert float((found.weight != expected.weight).float().mean()) < 0.005  # a tie may tip
    assert found.error == pytest.approx(expected.error, rel=1e-3)


# every GPU and both kernels, not every pair: all 12 were compiled once
@pytest.mark.parametrize(
    ("capability", "descents"),
    [(n, (False, True) if n == 90 else (index % 2 == 1,)) for index, n in enumerate(sorted(SHARED_LIMIT))],
)
def compiled_kernel_fits(capability: int, descents: tuple[bool, ...]) -> None:
    from quant.kernels.feedback import columns_kernel, shape

    arrays = ("work", "lines", "scales", "zeros", "held", "share", "rounded", "errors")
    types = dict.fromkeys(arrays, "*fp32") | {"codes": "*u8", "columns": "i32", "top": "fp32"}
    strides = ("work", "line", "scale", "held", "rounded", "error", "code")
    for descent in descents:
        sizes, warps = shape(128)
        constants = sizes | {"DESCENT": descent, "rows": 4096, "line_stride": 4096, "scale_stride": 0}
        constants |= {f"{name}_batch": 4096 * 4096 for name in strides}
        made = compile_for(capability, columns_kernel, types, constants, warps, 3)
        assert made.fits()
        # 64 values of a thread: chosen by their column, summed, updated, and as much again for all the rest
        assert sum(made.ops.values()) < 15 * 64


def test_pieces_end_where_groups_begin() -> None:
    assert list(_pieces(0, 6, 1, {0, 3})) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert list(_pieces(4, 20, 8, {0, 4, 10})) == [(4, 10), (10, 12), (12, 20)]
    assert list(_pieces(0, 5, 128, {0})) == [(0, 5)]


def test_the_bound_knows_the_loop() -> None:
    """`in_torch` is the loop of `feed`: same codes, bit for bit."""
    stats, spec = statistics(40).finish(), Uniform(bits=3, group_size=-1)
    weight = some_weight(6, 40)
    rounder = UniformRounder(spec, (6, 40), weight.device, SEARCH)
    factor = factorise(stats, "none", 0.01, 40, 1)
    assert isinstance(factor, Factor)
    feed(weight, factor, rounder, stats.diagonal, 64, True)
    scales, zeros = (grid[None].expand(1, 40, -1) for grid in (rounder.scales, rounder.zeros))
    p = Problem(weight.T[None].contiguous(), factor.feedback[None], scales, zeros, 3, None, None)
    assert torch.equal(in_torch(p, 0)[2], rounder.codes)


def test_kernel_under_the_interpreter() -> None:
    rerun(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_solving_on_a_gpu() -> None:
    weight = some_weight(300, 512)
    for spec in (Uniform(bits=4, group_size=32), Uniform(bits=2, group_size=-1)):
        stats = statistics(512).finish()
        here = Feedback().solve(weight, stats, spec)
        there = Feedback().solve(weight.cuda(), Statistics(stats.hessian.cuda(), stats.tokens), spec)
        assert there.error == pytest.approx(here.error, rel=1e-2)
