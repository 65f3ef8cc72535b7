"""Weights that are solved in lockstep get the codes that each would get alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quant
from quant import load_recipe
from quant.calibration.statistics import HessianCollector, Statistics
from quant.errors import SolverError
from quant.kernels.spec import Rotated, Spec, Trellis
from quant.recipe import override
from quant.solvers import lockstep
from quant.solvers.feedback import Feedback
from quant.solvers.lockstep import stackable, stacks
from quant.solvers.solution import Problem, Solution, solve_named
from quant.solvers.trellis import TrellisRounder
from tests import tiny


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(features: int, seed: int, matched: bool = False) -> Statistics:
    x = some(200, features, seed=seed) @ some(features, features, seed=seed + 1)
    collector = HessianCollector(features, cross=matched)
    collector.update(x, reference=x + 0.1 * some(200, features, seed=seed + 2) if matched else None)
    return collector.finish()


def metric(rows: int, width: int, seed: int) -> Tensor:
    """Correlations in blocks of `width` rows, `[rows, width]`."""
    blocks = some(-(-rows // width), width, 9, seed=seed)
    return (blocks @ blocks.mT / 9 + 0.1 * torch.eye(width)).flatten(0, 1)[:rows]


def same(one: Solution, other: Solution) -> None:
    for name, tensor in one.packed.tensors().items():
        assert torch.equal(tensor, other.packed.tensors()[name]), name
    assert one.missed == pytest.approx(other.missed, rel=1e-4)
    assert one.notes == other.notes


@pytest.mark.parametrize(
    "spec",
    [
        Trellis(window=8, length=32), Rotated(Trellis(window=8, length=32)),
        Rotated(Trellis(bits=3, window=8, length=32)),
        Rotated(Trellis(window=8, length=32, code="hyb", table_bits=4)), Trellis(window=9, length=64, code="inst"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("width", [0, 1, 32])
def test_together_as_alone(spec: Spec, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that share inputs, one of their shape that does not, one of another shape, one whose last sequence is short,
    two that are padded, one without a factor, and one whose inputs are not correlated."""
    counted = lambda rows, seed: metric(rows, width, seed) if width else None  # noqa: E731
    first, second = statistics(24, 1, matched=True), statistics(24, 5)
    problems = [
        Problem(some(96, 24, seed=10), first, counted(96, 20)),
        Problem(some(96, 24, seed=11), first, counted(96, 21)),
        Problem(some(96, 24, seed=12), second, counted(96, 22)),
        Problem(some(64, 24, seed=13), first, counted(64, 23)),
        Problem(some(72, 24, seed=14), second, counted(72, 24)),
        Problem(some(72, 24, seed=15), first, counted(72, 25)),
        Problem(some(70, 24, seed=18), first, counted(70, 28)),
        Problem(some(70, 24, seed=19), first, counted(70, 29)),
        Problem(some(96, 24, seed=16), Statistics(torch.zeros(24, 24), 0), counted(96, 26)),
        Problem(some(96, 24, seed=17), Statistics(torch.diag(some(24).square() + 0.1), 9), counted(96, 27)),
    ]
    made, solver = list[int](), Feedback()
    init = TrellisRounder.__init__

    def spied(self: TrellisRounder, *args: Any) -> None:
        made.append(len(args[3]))
        init(self, *args)

    monkeypatch.setattr(TrellisRounder, "__init__", spied)
    together = solver.solve_all(problems, spec)
    assert max(made) >= 2
    assert len(made) < len(problems) * (2 if isinstance(spec, Rotated) else 1)
    for one, problem in zip(together, problems, strict=True):
        same(one, solver.solve(problem.weight, problem.statistics, spec, problem.metric))


def test_stacks_hold_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, all_inputs = some(32, 8), [statistics(8, seed) for seed in range(5)]
    problems = [Problem(weight, inputs) for inputs in all_inputs for _ in range(3)]
    solver = Feedback()
    from quant.solvers.factor import Factor, factorise

    known = dict[int, Factor]()
    for number, one in enumerate(problems):
        factor = factorise(one.statistics, "gar", 0.01, 8, 1)
        assert not isinstance(factor, str)
        known[number] = factor
    assert [[len(part) for part in sets] for sets in stacks(problems, known)] == [[3] * 5]
    whole = solver.solve_all(problems, Trellis(window=8, length=32))
    for most in (1, 2, 3, 7):
        monkeypatch.setitem(lockstep.LIMIT, "cpu", most * 8 * (32 + 8))
        assert stackable((32, 8), weight.device) == most
        found = stacks(problems, known)
        assert sorted(n for sets in found for part in sets for n in part) == list(range(15))
        assert all(len({id(known[n]) for n in part}) == 1 for sets in found for part in sets)
        assert max(sum(map(len, sets)) for sets in found) <= most
        for one, other in zip(whole, solver.solve_all(problems, Trellis(window=8, length=32)), strict=True):
            same(one, other)


def test_the_one_at_fault_is_named() -> None:
    problems = [Problem(some(32, 8), statistics(8, 1)), Problem(some(32, 8) / 0, statistics(8, 1))]
    with pytest.raises(SolverError, match=r"^second: .*values of the weight are not finite"):
        solve_named(Feedback(), ["first", "second"], problems, Trellis(window=8, length=32))


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_a_model_has_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"calibration.text={tiny.text(tmp_path)}", "calibration.samples=6", "calibration.sequence_length=32"]
    recipe = override(load_recipe("balanced"), ["spec.base.window=8", *settings])
    model = tiny.model(name, tmp_path / "model")
    quant.quantize(str(model), tmp_path / "together", recipe)
    monkeypatch.setitem(lockstep.LIMIT, "cpu", 1)
    quant.quantize(str(model), tmp_path / "alone", recipe)
    assert tiny.contents(tmp_path / "together") == tiny.contents(tmp_path / "alone")
