"""The trained diffusion transformer in the repository: it draws digits, and fewer bits are seen in its images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="not installed; pip install 'bitwright[diffusers]'")

import quant
from quant.eval.draw import Rule
from quant.eval.gallery import judge_images
from quant.eval.judge import open_judge
from quant.recipe import override, with_spec
from quant.recovery.distillation import Distillation
from tests.conftest import ROOT

MODEL = ROOT / "demo" / "dit"


@pytest.mark.slow
def test_packed_digits_are_judged_against_the_float_ones(tmp_path: Path) -> None:
    for bits in (4, 1):
        recipe = with_spec(quant.load_recipe("rtn"), bits=bits, group_size=64)
        quant.quantize(str(MODEL), tmp_path / f"{bits}bit", recipe)
    judge = open_judge(MODEL / "judge.safetensors")
    rule = Rule(images=40, steps=10)
    hung = judge_images([tmp_path / "4bit", tmp_path / "1bit"], against=MODEL, rule=rule, judge=judge)
    original, (four, one) = hung.original, hung.pictures
    assert original is not None
    assert original.accuracy is not None
    assert original.accuracy >= 0.8  # 90 % of 500 images in 50 steps
    assert four.psnr is not None
    assert one.psnr is not None
    assert four.psnr > one.psnr + 8
    assert one.accuracy is not None
    assert one.accuracy < original.accuracy - 0.2
    assert four.size.linear_bits is not None
    assert four.size.linear_bits < 4.5
    assert four.size.measured == "safetensors headers"


def test_the_folder_is_small_and_holds_safetensors_only() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_tuning_end_to_end_counts_every_timestep(tmp_path: Path) -> None:
    """The error of the prediction falls at early and late timesteps, and the images come nearer to the float ones."""
    small = ["calibration.samples=40", "trajectory.steps=10", "spec.bits=2", "spec.group_size=32"]
    plain = override(quant.load_recipe("gptq"), small)
    quant.quantize(str(MODEL), tmp_path / "plain", plain)
    tuned = replace(plain, distillation=Distillation(steps=24))
    gain = quant.quantize(str(MODEL), tmp_path / "tuned", tuned).report["distillation"]
    assert gain["before"] == 1
    assert gain["after"] < 0.75
    hung = judge_images([tmp_path / "plain", tmp_path / "tuned"], against=MODEL, rule=Rule(images=40, steps=10))
    before, after = hung.pictures
    assert before.psnr is not None
    assert after.psnr is not None
    assert after.psnr > before.psnr + 0.7
    assert after.size.linear_bits == before.size.linear_bits
    errors = [(one.noise, two.noise) for one, two in zip(before.steps, after.steps, strict=True)]
    assert all(x is not None and y is not None and y < 0.95 * x for x, y in (errors[0], errors[-2]))


def test_bits_where_they_count_beat_as_many_spread_evenly(tmp_path: Path) -> None:
    """`average` on a diffusion transformer: the same bytes or fewer, better images."""
    small = ["calibration.samples=20", "trajectory.steps=10", "spec.bits=3", "spec.group_size=32", "modulation_bits=1"]
    even = override(quant.load_recipe("gptq"), small)
    quant.quantize(str(MODEL), tmp_path / "even", even)
    bits = json.loads((tmp_path / "even" / "transformer" / "report.json").read_text())["bits"]["promised"]
    mixed = quant.quantize(str(MODEL), tmp_path / "mixed", replace(even, average=bits, widths=(2, 3, 4)))
    assert mixed.report["bits"]["promised"] <= bits
    assert len({site["spec"]["bits"] for site in mixed.report["sites"]}) > 1
    hung = judge_images([tmp_path / "even", tmp_path / "mixed"], against=MODEL, rule=Rule(images=40, steps=10))
    before, after = hung.pictures
    assert before.psnr is not None
    assert after.psnr is not None
    assert after.psnr > before.psnr + 0.5
