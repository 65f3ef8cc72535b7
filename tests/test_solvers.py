"""Statistics against plain means, grids against brute force, round to nearest, and what every solver refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quant.calibration.statistics import HessianCollector, Statistics
from quant.errors import CalibrationError, SettingsError, SolverError
from quant.kernels.spec import DTYPES, Binary, Codebook, Spec, Trellis, Uniform
from quant.solvers.feedback import Feedback
from quant.solvers.grid import MINMAX, SEARCH, Search, encode, fit, storable
from quant.solvers.nearest import Nearest
from quant.solvers.solution import relative_error

specs = st.builds(
    Uniform,
    bits=st.integers(1, 8),
    group_size=st.sampled_from([-1, 3, 16, 64]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
)


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated, and of very different size from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn((tokens, features), generator=generator) @ torch.randn(
        (features, features), generator=generator
    )
    return mixed * torch.logspace(-1, 1, features)


def statistics(x: Tensor) -> Statistics:
    collector = HessianCollector(x.shape[-1])
    collector.update(x)
    return collector.finish()


def loss(weight: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((encode(weight, scale, zero, bits) - zero).mul(scale).sub(weight).square() * importance).sum(1)


def test_a_stream_gives_the_mean_over_its_tokens() -> None:
    x, reference = inputs(60, 9), inputs(60, 9, 1)
    collector = HessianCollector(9, cross=True)
    for part in torch.arange(60).split(17):
        collector.update(x[part][None], reference=reference[part][None])
    found, seen = collector.finish(), x.double()
    assert found.tokens == 60
    torch.testing.assert_close(found.hessian.double(), seen.T @ seen / len(seen), rtol=1e-5, atol=1e-4)
    assert found.cross is not None
    torch.testing.assert_close(found.cross.double(), reference.double().T @ seen / len(seen), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.diagonal, found.hessian.diagonal())
    half = HessianCollector(9)
    half.update(x.bfloat16())
    rounded = x.bfloat16().float()
    torch.testing.assert_close(half.finish().hessian, rounded.T @ rounded / len(seen))  # products in float32


def test_inputs_that_cannot_calibrate_are_refused() -> None:
    x = inputs(10, 5)
    x[3, 2] = torch.inf
    collector = HessianCollector(5)
    collector.update(x)
    with pytest.raises(CalibrationError, match=r"inputs of channels \[2\] of 5 are not finite, .* \(10 tokens seen\)"):
        collector.finish()
    with pytest.raises(CalibrationError, match="inputs have 4 channels; the layer takes 5"):
        collector.update(torch.zeros(3, 4))
    with pytest.raises(CalibrationError, match="one of them is missing"):
        collector.update(inputs(3, 5), reference=inputs(3, 5))
    matched = HessianCollector(5, cross=True)
    matched.update(inputs(10, 5), reference=x)
    with pytest.raises(CalibrationError, match="the float path"):
        matched.finish()


def test_a_prior_is_so_many_more_tokens() -> None:
    mine, prior = inputs(30, 6), inputs(90, 6, 1)
    mixed = statistics(mine).with_prior(statistics(prior).hessian, 90, "the layer's mean")
    torch.testing.assert_close(mixed.hessian, statistics(torch.cat([mine, prior])).hessian)
    assert (mixed.tokens, mixed.prior) == (30, "the layer's mean counted as 90 tokens beside 30 seen")
    matched = replace(statistics(mine), cross=statistics(mine).hessian)  # the prior's two paths count as equal
    torch.testing.assert_close(matched.with_prior(statistics(prior).hessian, 90, "it").cross, mixed.hessian)
    empty = HessianCollector(6).finish()
    assert (empty.tokens, float(empty.hessian.abs().sum())) == (0, 0.0)
    torch.testing.assert_close(empty.with_prior(mixed.hessian, 5, "it").hessian, mixed.hessian)
    assert torch.equal(Statistics.identity(3).hessian, torch.eye(3))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_search_is_near_the_best_grid_there_is(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight, importance = torch.randn((32, 24), generator=generator), torch.rand(24, generator=generator) ** 2
    spec = Uniform(bits=bits, group_size=-1, symmetric=symmetric)
    scales, zeros = fit(weight, importance, spec, SEARCH)
    sizes = torch.linspace(0.02, 3, 600)
    points = [(2.0 ** (bits - 1) if bits > 1 else 0.5)] if symmetric else [float(z) for z in range(2**bits)]
    best = torch.full((32,), torch.inf)
    for size, zero, sign in itertools.product(sizes.tolist(), points, (1, -1) if symmetric else (1,)):
        grid = torch.full((32, 1), size * sign), torch.full((32, 1), zero)
        best = best.minimum(loss(weight, importance, *grid, bits))
    found = loss(weight, importance, scales, zeros, bits)
    assert float((found / best).mean()) < 1.02
    assert float((found / best).max()) < 1.2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(spec=specs, rows=st.integers(1, 5), columns=st.integers(1, 40), size=st.sampled_from([1e-9, 1.0, 1e4]))
def test_search_is_never_worse_than_the_extremes(spec: Uniform, rows: int, columns: int, size: float) -> None:
    weight = torch.randn((rows, columns), generator=torch.Generator().manual_seed(columns)) * size
    whole = Statistics(torch.eye(columns), 1)
    searched, plain = Nearest().solve(weight, whole, spec), Nearest(MINMAX).solve(weight, whole, spec)
    for solved in (searched, plain):
        solved.packed.validate()
        assert torch.equal(solved.packed.dequantize(), solved.weight)
        assert solved.error == pytest.approx(relative_error(weight, solved.weight, whole.hessian))
    lost = (searched.weight - weight).square().sum(), (plain.weight - weight).square().sum()
    assert lost[0] <= lost[1] * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_data_no_group_shrinks(bits: int, trained: tuple[torch.Tensor, Statistics]) -> None:
    weight, statistics = trained
    spec = Uniform(bits=bits, group_size=64)

    def slope(seen: Statistics) -> torch.Tensor:
        made = Nearest().solve(weight, seen, spec).weight
        whole = weight.square().unflatten(1, (-1, 64)).sum(-1)
        return (made * weight).unflatten(1, (-1, 64)).sum(-1) / whole

    free = slope(Statistics.identity(statistics.features))
    torch.testing.assert_close(free, torch.ones_like(free), rtol=2e-3, atol=0)  # float16 scales
    fitted = slope(Statistics(torch.eye(statistics.features), 1))
    assert float(fitted.mean()) < 1 - 0.3 * 4.0**-bits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_on_a_grid_is_kept_exactly(bits: int, symmetric: bool) -> None:
    zero = 2 ** (bits - 1)
    levels = torch.arange(2**bits)[torch.randint(0, 2**bits, (6, 40))] - zero
    levels[:, :2] = torch.tensor([-zero, 2**bits - 1 - zero])
    weight = levels * torch.tensor([1.0, 0.5, 2.0**-9, 7.0, -1.0, -3.0])[:, None]
    kept = Nearest().solve(weight, Statistics.identity(40), Uniform(bits=bits, group_size=-1, symmetric=symmetric))
    assert torch.equal(kept.weight[:4], weight[:4])
    assert not symmetric or torch.equal(kept.weight, weight)  # the long side faces up: a negative scale
    assert not symmetric or kept.error == 0


def test_scales_stay_within_their_dtype() -> None:
    least = 2.0**-24  # float16's smallest subnormal
    found = storable(torch.tensor([0.0, 1e-12, -1e-12, 1e9, -1e9]), torch.float16)
    assert found.tolist() == [0.0, least, -least, 65504.0, -65504.0]
    for symmetric, scale_dtype in itertools.product((True, False), ("float16", "bfloat16")):
        spec = Uniform(bits=3, group_size=4, symmetric=symmetric, scale_dtype=scale_dtype)
        weight = torch.tensor([[0.0] * 4 + [1e30, -1e30, 5e29, 0.0] + [1e-30, -1e-30, 0.0, 0.0] + [3.0] * 3])
        solved = Nearest().solve(weight, Statistics.identity(15), spec)
        solved.packed.validate()
        assert bool(torch.isfinite(solved.weight).all())
        assert solved.weight[0, :4].tolist() == [0.0] * 4
        torch.testing.assert_close(solved.weight[0, 12:], weight[0, 12:], rtol=1e-2, atol=0)
        if scale_dtype == "bfloat16":  # the squares of 1e30 leave float32: the extremes' grid remains
            torch.testing.assert_close(solved.weight[0, 4:8] / 1e30, weight[0, 4:8] / 1e30, rtol=0, atol=0.3)


def test_importance_decides_what_is_clipped() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([9.0])])[None]
    spec, importance = Uniform(bits=2, group_size=-1), torch.ones(32)
    kept = fit(weight, importance.index_fill(0, torch.tensor([31]), 50.0), spec, SEARCH)
    clipped = fit(weight, importance.index_fill(0, torch.tensor([31]), 1e-4), spec, SEARCH)
    assert float(clipped[0] * (3 - clipped[1])) < 2 < 6 < float(kept[0] * (3 - kept[1]))
    none = fit(weight, torch.zeros(32), spec, SEARCH)  # inputs never seen: all alike
    assert torch.equal(none[0], fit(weight, torch.ones(32), spec, SEARCH)[0])


def test_rows_and_groups_do_not_know_of_each_other() -> None:
    weight, importance = torch.randn(9, 50), torch.rand(50)
    spec = Uniform(bits=3, group_size=16)
    scales, zeros = fit(weight, importance, spec, Search(steps=8))
    alone = [fit(weight[3:4, part], importance[part], spec, Search(steps=8)) for part in torch.arange(50).split(16)]
    assert torch.equal(scales[3], torch.cat([scale for scale, _ in alone], 1)[0])
    assert torch.equal(zeros[3], torch.cat([zero for _, zero in alone], 1)[0])


@pytest.mark.parametrize("solver", [Nearest(), Feedback()])
def test_numbers_that_no_solver_can_use_are_refused(solver: Nearest | Feedback) -> None:
    whole, spec = statistics(inputs(50, 8)), Uniform(bits=4, group_size=4)
    weight = torch.randn(3, 8)
    weight[1, 1] = torch.nan
    with pytest.raises(SolverError, match="1 of 24 values of the weight are not finite; check the checkpoint"):
        solver.solve(weight, whole, spec)
    broken = whole.hessian.clone()
    broken[0, :] = torch.inf
    with pytest.raises(SolverError, match="8 of 64 values of the Hessian are not finite"):
        solver.solve(torch.randn(3, 8), Statistics(broken, 50), spec)
    with pytest.raises(SolverError, match=r"a matrix \[out, 8\] is expected"):
        solver.solve(torch.randn(3, 7), whole, spec)
    with pytest.raises(SolverError, match="Spec"):
        solver.solve(torch.randn(3, 8), whole, Spec())


def test_the_error_is_the_share_of_the_outputs_energy() -> None:
    x, weight, other = inputs(500, 7), torch.randn(4, 7), torch.randn(4, 7)
    expected = (x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum()
    assert relative_error(weight, other, statistics(x).hessian) == pytest.approx(float(expected), rel=1e-4)
    assert relative_error(torch.zeros(4, 7), torch.zeros(4, 7), statistics(x).hessian) == 0
    assert relative_error(torch.zeros(4, 7), other, statistics(x).hessian) == float("inf")


def test_without_data_no_product_is_computed() -> None:
    """With ones and zeros, twice for each matrix; the error is the same number."""
    weight = torch.randn((48, 80), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counted:
        free = Nearest().solve(weight, Statistics.identity(80), Uniform(group_size=16))
    assert counted.get_total_flops() == 0
    assert free.error == relative_error(weight, free.packed.dequantize(), torch.eye(80))


def test_stored_scales_are_what_the_fit_promised() -> None:
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        scales, _ = fit(torch.randn(5, 40), torch.ones(40), Uniform(group_size=16, scale_dtype=name), SEARCH)
        assert torch.equal(scales, scales.to(DTYPES[name]).float())
        assert DTYPES[name] == dtype


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"damp is -1, block 128, sweeps 2, tries 4; damp is finite and at least 0"):
        Feedback(damp=-1)
    with pytest.raises(SettingsError, match="block at least 1"):
        Feedback(block=0)
    with pytest.raises(SettingsError, match="steps is at least 1"):
        Search(steps=0)
    with pytest.raises(SettingsError, match="stretches are positive"):
        Search(stretches=(1.1, -1.0))


@pytest.mark.parametrize("spec", [Trellis(window=8), Codebook(length=3, index_bits=4), Binary(share=0.2)])
def test_dead_rows_and_columns_stay_zero(spec: Spec, trained: tuple[Tensor, Statistics]) -> None:
    weight = trained[0][:40].clone()
    weight[3] = 0
    found = Feedback().solve(weight, trained[1], spec)
    assert bool((found.weight[3] == 0).all())
    assert bool(torch.isfinite(found.weight).all())
    assert Feedback().solve(torch.zeros_like(weight), trained[1], found.packed.spec).weight.abs().max() == 0
