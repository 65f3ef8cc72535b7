"""Assignments of vectors learned on a block (VQ4DiT): better than the solver's, in the same bytes, twice the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quant
from quant.calibration.statistics import HessianCollector
from quant.errors import SettingsError
from quant.kernels.codebook import PackedCodebook
from quant.kernels.packed import Packed
from quant.kernels.spec import Codebook, Spec, Uniform
from quant.models.walk import Site
from quant.recipe import override, recipe_from_dict, with_spec
from quant.recovery.assignments import Assignments, Candidates
from quant.recovery.tuning import Task
from quant.solvers.codebook import CodebookRounder
from quant.solvers.feedback import Feedback
from tests import tiny
from tests.conftest import ROOT


def solved(spec: Spec) -> tuple[torch.Tensor, Packed, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(64, 96, generator=generator).cumsum(1) / 4 for _ in range(6)]
    weight = torch.randn(128, 96, generator=generator) / 10
    collector = HessianCollector(96)
    for x in inputs:
        collector.update(x)
    return weight, Feedback().solve(weight, collector.finish(), spec).packed, inputs


def task(spec: Spec) -> Task:
    """A gated pair of linears of which one is a site."""
    weight, packed, inputs = solved(spec)
    torch.manual_seed(3)
    model = nn.ModuleDict({"a": nn.Linear(96, 128), "b": nn.Linear(96, 128)}).requires_grad_(False)
    model["a"].weight.data = packed.dequantize()
    run: Any = lambda x, w: torch.tanh(nn.functional.linear(x, w)) * model["b"](x)  # noqa: E731
    return Task(
        model, "block", [Site("a", "linear", 128, 96, bias=True)], {"a": packed}, {"a": weight}, len(inputs),
        lambda number: run(inputs[number], model["a"].weight), lambda number: run(inputs[number], weight),
        0, lambda *_: None,
    )  # fmt: skip


SPECS = [Codebook(length=2, index_bits=4), Codebook(length=4, index_bits=5, second_bits=3, share=0.25, rows=64)]


@pytest.mark.parametrize("spec", SPECS)
def test_assignments_and_codebooks_get_better_in_the_same_bytes(spec: Codebook) -> None:
    work = task(spec)
    found, again = (Assignments(steps=150, ratios=0.05).recover(work) for _ in range(2))
    assert found.after < 0.995 * found.before
    tensors, before = found.packed["a"].tensors(), work.packed["a"].tensors()
    assert {name: (x.shape, x.dtype) for name, x in tensors.items()} == {
        name: (x.shape, x.dtype) for name, x in before.items()
    }
    assert not torch.equal(tensors["weight"], before["weight"])
    assert all(torch.equal(x, again.packed["a"].tensors()[name]) for name, x in tensors.items())
    found.packed["a"].validate()
    without = Assignments(steps=150, ratios=0).recover(work)
    assert torch.equal(without.packed["a"].tensors()["weight"], before["weight"])
    assert without.after < without.before


@pytest.mark.parametrize("spec", SPECS)
def test_frozen_candidates_are_what_is_stored(spec: Codebook) -> None:
    weight, packed, _ = solved(spec)
    assert isinstance(packed, PackedCodebook)
    one = Candidates(packed, weight, 3)
    assert all(torch.equal(x, packed.tensors()[name]) for name, x in one.pack().tensors().items())
    with torch.no_grad():
        one.logits.add_(torch.randn(one.logits.shape, generator=torch.Generator().manual_seed(0)), alpha=3)
        for move in one.moves:
            move.add_(0.05)
    one.freeze(1.0)
    stored = one.pack()
    assert not torch.equal(stored.tensors()["weight"], packed.tensors()["weight"])
    torch.testing.assert_close(one.weight().detach(), stored.dequantize(), rtol=0, atol=0)


def test_what_does_not_help_is_not_kept() -> None:
    work = task(SPECS[0])
    found = Assignments(steps=3, codebooks=100.0).recover(work)
    assert found.packed is work.packed
    assert found.after == found.before


@pytest.mark.parametrize("spec", SPECS)
def test_candidates_are_the_nearest_to_what_a_second_vector_leaves(spec: Codebook) -> None:
    weight, packed, _ = solved(spec)
    assert isinstance(packed, PackedCodebook)
    one, rounder = Candidates(packed, weight, 3), CodebookRounder.of(packed)
    x, counts = rounder.vectors(weight * rounder.inverse[:, None]), rounder.vectors(rounder.energy[:, None])
    for column in range(weight.shape[1]):
        for group, (first, last) in enumerate(rounder.ranges):
            left = x[first:last, column]
            if rounder.fine[column] and len(rounder.tables) > 1:
                left = left - rounder.tables[1][group][rounder.index[1, first:last, column]]
            lost = (left[:, None] - rounder.tables[0][group]).square() * counts[first:last]
            chosen, lost = one.choices[first:last, column], lost.sum(2)
            assert torch.equal(chosen[:, 0], rounder.index[0, first:last, column])
            lost.scatter_(1, chosen[:, :1], torch.inf)
            limit = lost.sort(dim=1)[0][:, 1:2]
            assert bool((lost.gather(1, chosen[:, 1:]) <= limit * (1 + 1e-4) + 1e-6).all())


def test_settings_and_other_layouts() -> None:
    with pytest.raises(SettingsError, match="candidates at least 2"):
        Assignments(candidates=1)
    with pytest.raises(SettingsError, match="uniform has no assignments to learn, codebooks have"):
        Assignments().recover(task(Uniform(bits=2, group_size=32)))
    recipe = quant.load_recipe("vq4dit")
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_on_the_trained_transformer_blocks_get_better(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="not installed; pip install 'bitwright[diffusers]'")
    few = [
        "calibration.samples=8",
        "trajectory.steps=4",
        "trajectory.keep=2",
        "recovery.steps=30",
        "recovery.ratios=0.05",
    ]
    recipe = with_spec(override(quant.load_recipe("vq4dit"), few), bits=2)
    recipe = replace(recipe, only=("*.0.attn1.*",), solver=Feedback(sweeps=0))
    made = [quant.quantize(str(ROOT / "demo" / "dit"), tmp_path / name, recipe) for name in "ab"]
    recovery = made[0].report["blocks"][0]["recovery"]
    assert recovery["after"] < recovery["before"]
    assert tiny.contents(tmp_path / "a") == tiny.contents(tmp_path / "b")
