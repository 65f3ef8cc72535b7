"""What errors of two rows cost together: from gradients, as a metric, and in the search of a trellis."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant import fisher, load_recipe
from quant.calibration.statistics import Statistics
from quant.kernels.spec import Trellis
from quant.kernels.trellis import deviation, read, state_values
from quant.kernels.viterbi import search
from quant.models.walk import Site
from quant.pairs import TRUSTED, UNIT, Pairs
from quant.plan import Plan
from quant.prepare import prepare
from quant.recipe import override
from quant.recovery.placed import oriented
from quant.recovery.tunable_trellis import TunableTrellis
from quant.solvers.coupling import Coupling
from quant.solvers.feedback import Feedback
from quant.solvers.metric import cut, own, scaled, weighed
from quant.solvers.solution import solution
from quant.solvers.trellis import start_table

RAGGED = [(10, 4), (8, 4), (3, 4), (5, 1), (7, 7)]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def metric(out: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One of positive definite blocks, and the same as a whole matrix."""
    root = some(out, 3 * out, seed=seed)
    whole = root @ root.T / (3 * out)
    rows = torch.arange(out)
    whole = torch.where(rows[:, None] // width == rows // width, whole, 0.0)
    flat = torch.zeros((out, width))
    for r in range(out):
        first = r - r % width
        flat[r, : min(width, out - first)] = whole[r, first : first + width]
    return flat, whole


@pytest.mark.parametrize(("out", "width"), RAGGED)
def test_a_metric_is_the_matrix_of_its_blocks(out: int, width: int) -> None:
    flat, whole = metric(out, width)
    errors, factors = some(out, 5, seed=1), some(out, seed=2)
    torch.testing.assert_close(weighed(flat, errors), whole @ errors)
    torch.testing.assert_close(own(flat), whole.diagonal())
    torch.testing.assert_close(
        weighed(scaled(flat, factors), errors), factors[:, None] * whole @ (factors[:, None] * errors)
    )
    for length in (1, 3, width, 16):
        rows = torch.arange(out)
        kept = torch.where(rows[:, None] // length == rows // length, whole, 0.0)
        torch.testing.assert_close(torch.block_diag(*cut(flat, length))[:out, :out], kept)
        assert not torch.block_diag(*cut(flat, length))[out:].any()


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize(("out", "length"), [*RAGGED, (4, 256)])
def test_pairs_are_those_of_the_shaped_gradients(out: int, length: int, experts: int) -> None:
    """Of the whole text twice over, so that both halves agree. Of experts only the rows."""
    site = Site("x", "experts" if experts else "linear", out, 6, experts=experts)
    pairs, count = Pairs(site, length, torch.device("cpu")), max(1, experts)
    order, V = torch.randperm(6, generator=torch.Generator().manual_seed(0)), some(6, 6, seed=1).triu()
    sums = torch.zeros((count, out, out))
    for number in range(4):
        gradient = some(count, out, 6, seed=number)
        for half in (0, 1):
            pairs.add(gradient, {0: (order, V), 1: (order, V)}, half)
        for expert in range(count):  # the third has no factor
            shaped = gradient[expert][:, order] @ V.T if expert < 2 else gradient[expert]
            sums[expert] += 2 * shaped @ shaped.T
    torch.testing.assert_close(pairs.rows(), sums.diagonal(dim1=1, dim2=2).flatten())
    found, width = pairs.correlations(), min(length, out)
    if width == 1 or experts:
        assert found is None
        return
    assert found is not None
    deviation = sums[0].diagonal().sqrt()
    wanted = TRUSTED * sums[0] / (deviation[:, None] * deviation)
    wanted.fill_diagonal_(1.0)
    for r in range(out):
        first = r - r % width
        last = min(first + width, out)
        torch.testing.assert_close(found[r, : last - first] / UNIT, wanted[r, first:last], rtol=0, atol=0.51 / UNIT)
        assert not found[r, last - first :].any()


def test_what_one_half_of_the_text_shows_alone_is_no_correlation() -> None:
    """Independent rows correlate by chance, correlated ones by as much as they do; dead ones do not."""
    site = Site("x", "linear", 64, 16)
    device = torch.device("cpu")
    chance, real = Pairs(site, 64, device), Pairs(site, 64, device)
    mixing = torch.eye(64) + 0.5 * torch.eye(64).roll(1, 0)
    mixing[5] = 0.0
    for number in range(300):
        gradient = some(64, 16, seed=number)
        chance.add(gradient, {}, number % 2)
        real.add(mixing @ gradient, {}, number % 2)
    assert chance.correlations() is None
    found = real.correlations()
    assert found is not None
    share = found / UNIT
    assert float(share[20, 21]) == pytest.approx(0.4 * TRUSTED, abs=0.04)  # 0.5 / (1 + 0.5^2)
    assert float(share[20, 40]) == pytest.approx(0.0, abs=0.05)
    assert share[5].count_nonzero() == 1
    assert share[5, 5] == 1
    empty = Pairs(site, 64, device)
    empty.add(some(64, 16), {}, 0)  # one window: no second half
    assert empty.correlations() is None


@pytest.mark.parametrize(
    "spec", [Trellis(window=8), Trellis(window=8, bits=3), Trellis(window=8, code="hyb", table_bits=5)]
)
def test_a_settled_path_costs_less(spec: Trellis) -> None:
    values = state_values(spec, start_table(5) if spec.code == "hyb" else None)
    values = values / deviation(values)
    x, scales = some(6, 64), (some(384, seed=1) / 3).exp()
    root = torch.nn.functional.normalize(some(6, 64, 12, seed=2), dim=2)
    correlated, alone = 0.8 * root @ root.mT + 0.2 * torch.eye(64), torch.eye(64).expand(6, 64, 64)
    found = list[list[float]]()
    for blocks in (correlated, alone):
        coupling = Coupling([blocks.flatten(0, 1)], 64)
        together = coupling.together(scales)
        states = search(x, together.weight, values, spec.step)
        paths = [together.settle(x, values, spec.step, states, tries, 0) for tries in range(7)]
        costs = torch.stack([together.cost(read(values, path) - x)[1][:, 0] for path in paths])
        assert (costs.diff(dim=0) <= 1e-5 * costs[0]).all()  # of each sequence
        found.append((costs.sum(1) / costs[0].sum()).tolist())
    assert found[0][4] < 0.9
    assert found[1][1] > 0.99  # nothing to gain but by the seam


def test_what_errors_cost_together_falls_on_text_not_seen(demo: Path) -> None:
    """Trained matrices, metrics from half of the windows: what solving with them costs by the other half's, against
    solving with the same rows alone."""
    recipe = override(
        load_recipe("balanced"), ["calibration.samples=64", "calibration.sequence_length=256", "widths=[]"]
    )
    recipe = replace(recipe, only=("*.1.self_attn.[kqv]_proj", "*.2.mlp.down_proj"))
    prepared = prepare(str(demo), recipe)
    names = {site.name: site for site in prepared.walk.sites}
    lengths = dict.fromkeys(names, 256)
    batches = prepared.samples.batches
    costs = [
        fisher.information(prepared.skeleton, prepared.walk, part, 1 << 30, lambda _: None, lengths)
        for part in (batches[::2], batches[1::2])
    ]
    prepared.skeleton.load(prepared.skeleton.names_under(""))
    ratios = list[float]()
    for name, site in names.items():
        metrics = list[Tensor]()
        for found in costs:
            pairs, rows = found[name].pairs, found[name].rows
            assert pairs is not None, name
            metrics.append(scaled(pairs / UNIT, (rows / rows.mean()).sqrt()))
        weight = oriented(prepared.skeleton.model.get_parameter(site.parameter).detach(), site)
        alike, spec, lost = Statistics.identity(site.inputs), Trellis(window=8), list[float]()
        for known in (metrics[0], own(metrics[0])[:, None]):
            solved = Feedback(sweeps=1).solve(weight, alike, spec, known)
            lost.append(solution(solved.packed, weight, alike, metric=metrics[1]).missed)
        ratios.append(lost[0] / lost[1])
    assert max(ratios) < 1.0, ratios
    assert sum(ratios) / len(ratios) < 0.95, ratios


def test_tries_of_none_are_rows_alone() -> None:
    weight = some(96, 8)
    flat, _ = metric(96, 32)
    alike, spec = Statistics.identity(8), Trellis(window=8, length=32)
    rows = Feedback().solve(weight, alike, spec, own(flat)[:, None])
    none = Feedback(tries=0).solve(weight, alike, spec, flat)
    both = Feedback().solve(weight, alike, spec, flat)
    assert torch.equal(none.weight, rows.weight)
    assert none.missed == rows.missed
    assert not torch.equal(both.weight, rows.weight)
    assert both.missed < solution(rows.packed, weight, alike, metric=flat).missed


def test_sequences_of_another_length_take_what_they_know() -> None:
    """A plan file may ask for shorter ones, and a matrix has a last one that is shorter."""
    weight, alike = some(80, 8), Statistics.identity(8)
    flat, _ = metric(80, 64)
    for length in (32, 64, 96, 256):
        solved = Feedback().solve(weight, alike, Trellis(window=8, length=length), flat)
        alone = Feedback(tries=0).solve(weight, alike, Trellis(window=8, length=length), flat)
        assert solved.missed < solution(alone.packed, weight, alike, metric=flat).missed, length


def test_the_plan_has_pairs_where_they_are_seen_again(demo: Path) -> None:
    recipe = override(
        load_recipe("balanced"), ["calibration.samples=32", "calibration.sequence_length=256", "widths=[]"]
    )
    prepared = prepare(str(demo), replace(recipe, only=("*.1.self_attn.*", "*.1.mlp.gate_proj")))
    plan = prepared.plan
    assert set(plan.rows) == {site.name for site in prepared.walk.sites}
    assert "model.layers.1.self_attn.k_proj" in plan.pairs
    for site in prepared.walk.sites:
        metrics = plan.metrics(site)
        assert metrics is not None
        counts = plan.counts(site.name)
        assert counts is not None
        torch.testing.assert_close(own(metrics[0]), counts)
        assert (metrics[0].shape[1] > 1) == (site.name in plan.pairs)
        correlated = scaled(metrics[0], counts.rsqrt())
        assert all(float(torch.linalg.eigvalsh(A)[0]) > 0.2 for A in cut(correlated, correlated.shape[1]))
    without = Plan(plan.specs, plan.rows)
    assert without.fingerprint() != plan.fingerprint()


def test_training_searches_for_what_errors_cost_together() -> None:
    """Sequences with a short last one: what is taken costs less, and less than where rows count by themselves."""
    weight, root = some(80, 24), torch.nn.functional.normalize(some(80, 8, seed=3), dim=1)
    rows = torch.arange(80)
    whole = torch.where(rows[:, None] // 32 == rows // 32, 0.8 * root @ root.T + 0.2 * torch.eye(80), 0.0)
    flat = torch.cat([torch.nn.functional.pad(whole[i : i + 32, i : i + 32], (0, max(0, i - 48))) for i in (0, 32, 64)])
    packed = Feedback(sweeps=0).solve(weight, Statistics.identity(24), Trellis(window=8, length=32)).packed
    found = list[Tensor]()
    for known in (flat, own(flat)[:, None]):
        made = TunableTrellis(packed, weight, train_codes=True)
        made.weigh(known)
        assert made.place is not None
        made.place.data += some(80, 24, seed=4) / 2  # as training would move them
        scale, unit = packed.dequantize(), made.unit
        aimed = (made.place.detach() * unit) * made.start[:, None]
        lost = [float((weighed(flat, scale - aimed) * (scale - aimed)).sum())]
        for step in range(60):
            made.settle(step)
            off = made.pack().dequantize() - aimed
            lost.append(float((weighed(flat, off) * off).sum()))
        if known is flat:
            assert all(now <= then * (1 + 1e-6) for then, now in pairwise(lost))
        found.append(torch.tensor(lost[-1]))
    assert found[0] < 0.98 * found[1]
