"""Mixed precision: the integer program finds the optimum, and bits where they count beat as many spread evenly."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quant.allocation import cheapest
from quant.errors import SettingsError
from quant.prepare import Settings, prepare
from quant.recipe import Recipe, load_recipe, override
from tests import tiny


@pytest.mark.parametrize("seed", range(6))
def test_the_program_finds_what_brute_force_finds(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [sorted(draw.sample(range(10, 200), 4)) for _ in range(6)]
    costs = [sorted((draw.random() ** 4 for _ in range(4)), reverse=True) for _ in range(6)]
    low, high = sum(row[0] for row in sizes), sum(row[-1] for row in sizes)
    budget = low + draw.random() * (high - low)
    found = cheapest(costs, sizes, budget)
    assert sum(row[n] for row, n in zip(sizes, found, strict=True)) <= budget
    best = min(
        sum(row[n] for row, n in zip(costs, chosen, strict=True))
        for chosen in itertools.product(range(4), repeat=6)
        if sum(row[n] for row, n in zip(sizes, chosen, strict=True)) <= budget
    )
    assert sum(row[n] for row, n in zip(costs, found, strict=True)) == pytest.approx(best, rel=1e-5)


TALKS = """
import ctypes, sys
from scipy import optimize
from quant.allocation import cheapest
solve = optimize.milp
def talking(*given, **named):
    ctypes.CDLL(None).puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution")  # held back if it is a pipe
    return solve(*given, **named)
optimize.milp = talking
print("before", end="")
if {closed}:
    sys.stdout = None
print(cheapest([[1.0, 0.1], [1.0, 0.2]], [[1, 3], [1, 3]], 4.0))
"""


@pytest.mark.parametrize("closed", [False, True])
def test_what_the_solver_prints_is_not_heard(closed: bool) -> None:
    """--json is there to be parsed."""
    talks = [sys.executable, "-c", TALKS.format(closed=closed)]
    heard = subprocess.run(talks, capture_output=True, text=True, check=True).stdout
    assert "Highs" not in heard or closed
    assert closed or heard == "before[1, 0]\n"


@pytest.mark.parametrize("size", [10**6, 10**7, 10**9])
def test_a_byte_too_many_is_too_many(size: int) -> None:
    """The program takes constraints to a part in a million."""
    assert cheapest([[1.0, 0.1]], [[size // 2, size + 1]], float(size)) == [0]
    assert cheapest([[1.0, 0.1], [1.0, 0.5]], [[1, size + 1], [1, 2]], float(size)) == [0, 1]
    assert cheapest([[1.0, 0.1]], [[size, size + 1]], float(size)) == [0]


def test_a_budget_below_everything_is_refused() -> None:
    with pytest.raises(SettingsError, match="narrowest widths take 30"):
        cheapest([[1.0, 0.5], [1.0, 0.5]], [[10, 20], [20, 40]], 29)
    with pytest.raises(SettingsError, match="widths"):
        Recipe(widths=(2, 9))


def test_a_language_model_takes_it_when_asked(llama: Path, words: Path) -> None:
    """What an error costs decides, and the plan keeps to the average; without widths it stays as it was."""
    even = override(tiny.recipe(words, bits=2), ["average=4.2"])
    plain, chosen = (prepare(str(llama), recipe) for recipe in (even, replace(even, widths=(2, 3, 4, 8))))
    sizes = {site.name: site.shape for site in plain.walk.sites}
    bits = [
        8 * sum(spec.nbytes(sizes[name]) for name, spec in one.plan.specs.items() if spec)
        / sum(rows * columns for rows, columns in sizes.values())
        for one in (plain, chosen)
    ]  # fmt: skip
    assert bits[1] <= 4.2
    assert len({spec.core.to_dict()["bits"] for spec in chosen.plan.specs.values() if spec}) > 1
    again = prepare(str(llama), replace(even, widths=(2, 3, 4, 8)))
    assert again.plan == chosen.plan


@pytest.mark.parametrize("bits", [2, 2.5])
def test_what_a_plan_file_says_is_asked_of_no_recipe(bits: float, words: Path, tmp_path: Path) -> None:
    """Experts that no trellis fits, as the error says; and an average has room for what the file takes."""
    model, file = tiny.model("qwen3-moe", tmp_path / "model"), tmp_path / "plan.json"
    settings = ["spec.base.window=8", "solver.sweeps=0", "calibration.samples=4", "calibration.sequence_length=32"]
    recipe = override(load_recipe("balanced"), [*settings, f'calibration.text="{words}"'])
    recipe = replace(recipe, average=bits if bits % 1 else None)
    with pytest.raises(SettingsError, match=r"with --plan"):
        prepare(str(model), recipe)
    file.write_text('{"*.experts.*": {"layout": "uniform", "bits": 2, "group_size": 32}}')
    for mixed in (True, False):
        prepared = prepare(str(model), replace(recipe, mixed=mixed), Settings(plan=file))
        plan, sites = prepared.plan.specs, {site.name: site.shape for site in prepared.walk.sites}
        assert {spec.core.layout for name, spec in plan.items() if spec and "experts" in name} == {"uniform"}
        assert {spec.core.layout for name, spec in plan.items() if spec and "experts" not in name} == {"trellis"}
        assert [*plan] == [*sites]
        taken = sum(8 * spec.nbytes(sites[name]) for name, spec in plan.items() if spec)
        if bits % 1:
            assert 0.9 * bits < taken / sum(rows * columns for rows, columns in sites.values()) <= bits
