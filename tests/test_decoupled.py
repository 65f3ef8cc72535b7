"""Two metrics of the final image: groups found by role, and a plan that keeps to its bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'bitwright[diffusers]'")

import quant
from quant.decoupled import ssim
from quant.errors import SettingsError
from quant.models.arguments import build, find_form
from quant.models.folding import Folding
from quant.prepare import prepare
from quant.recipe import Calibration, Recipe, Trajectory
from tests import tiny, tiny_dit

ROLES = {
    "DiTTransformer2DModel": {"ff.net.0.proj", "ff.net.2"},
    "PixArtTransformer2DModel": {
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"
    },
    "WanTransformer3DModel": {
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"
    },
    "QwenImageTransformer2DModel": {
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(ROLES))
def test_content_is_attention_to_a_text_and_feed_forward(name: str, tmp_path: Path) -> None:
    found = prepare(str(tiny_dit.folder(name, tmp_path)), Recipe(calibration=None)).walk
    block = found.blocks[-1]
    assert {site.name.removeprefix(block.name + ".") for site in block.sites if site.content} == ROLES[name]


def test_similarity_is_one_only_for_equal_images() -> None:
    image = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert ssim(image, image) == pytest.approx(1)
    assert ssim(image + 0.2 * torch.rand_like(image), image) > ssim(1 - image, image)


def test_bits_by_the_image_keep_to_the_average_and_come_again(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "demo" / "dit"
    recipe = Recipe(
        spec=quant.Uniform(bits=2, group_size=64),
        calibration=Calibration(samples=4, batch_size=4),
        trajectory=Trajectory(steps=4, keep=2),
        average=3.0,
        widths=(2, 4),
        sensitivity="image",
    )
    plan = prepare(str(source), recipe).plan
    sites = {site.name: site for site in prepare(str(source), recipe).walk.sites}
    used = sum(spec.nbytes(sites[name].shape) for name, spec in plan.specs.items() if spec)
    weights = sum(site.shape[0] * site.shape[1] for site in sites.values())
    assert 2.7 < 8 * used / weights <= 3.0
    assert prepare(str(source), recipe).plan == plan
    with pytest.raises(SettingsError, match="2-bit codes take"):
        prepare(str(source), replace(recipe, average=2.1))


@pytest.mark.parametrize("sensitivity", ["output", "image"])
def test_sites_of_a_plan_file_are_left_out_of_the_choice(sensitivity: Any, tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float", "DDIMScheduler")
    recipe = Recipe(
        spec=quant.Uniform(bits=2, group_size=16),
        calibration=Calibration(samples=2, batch_size=2),
        trajectory=Trajectory(steps=2, keep=1),
        average=6.8,
        widths=(2, 4),
        sensitivity=sensitivity,
    )
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"*.ff.*": quant.Uniform(bits=8, group_size=16).to_dict()}))
    prepared = prepare(str(source), recipe, quant.Settings(plan=file))
    shapes = {site.name: site.shape for site in prepared.walk.sites}
    specs = {name: spec for name, spec in prepared.plan.specs.items() if spec is not None}
    told = {name for name in specs if ".ff." in name}
    assert 0 < len(told) < len(specs)
    assert {specs[name].core.to_dict()["bits"] for name in told} == {8}
    assert {specs[name].core.to_dict()["bits"] for name in specs.keys() - told} == {2, 4}
    used = sum(spec.nbytes(shapes[name]) for name, spec in specs.items())
    assert 6.5 < 8 * used / sum(rows * columns for rows, columns in shapes.values()) <= 6.8
    with pytest.raises(SettingsError, match=r"of which the plan file leaves \S+ to all others: 2-bit codes take 3.25"):
        prepare(str(source), replace(recipe, average=5.5), quant.Settings(plan=file))


def test_folded_weights_are_judged_by_the_image_too(tmp_path: Path) -> None:
    source = tiny_dit.folder("PixArtTransformer2DModel", tmp_path / "float", "DDIMScheduler")
    recipe = Recipe(
        spec=quant.Uniform(bits=4, group_size=16),
        calibration=Calibration(samples=2, batch_size=2),
        trajectory=Trajectory(steps=2, keep=1),
        only=("*0.attn?.*",),
        average=7.0,
        widths=(4, 8),
        sensitivity="image",
        folding=Folding(),
    )
    report = quant.quantize(str(source), tmp_path / "packed", recipe).report
    assert len(report["folding"]["folded"]) == 4
    assert {site["spec"]["bits"] for site in report["sites"]} == {4, 8}
    assert report["bits"]["measured"] <= 7.0
    original, packed = (
        tiny_dit.library().PixArtTransformer2DModel.from_pretrained(source),
        quant.load(tmp_path / "packed"),
    )
    form = find_form(original)
    batch = build(original, form.layout, form.traced, 2)
    with torch.no_grad():
        made, wanted = (model(**batch).sample for model in (packed, original))
    assert float((made - wanted).norm() / wanted.norm()) < 0.05


def test_what_draws_no_image_is_refused(tmp_path: Path, llama: Path, words: Path) -> None:
    own = replace(tiny.recipe(words, bits=2), average=4.2, widths=(2, 4), sensitivity="image")
    with pytest.raises(SettingsError, match="which this model does not draw"):
        _ = prepare(str(llama), own).plan
    source = tiny_dit.folder("FluxTransformer2DModel", tmp_path / "flux", "FlowMatchEulerDiscreteScheduler")
    own = replace(own, calibration=Calibration(samples=2, batch_size=2), average=7.5, trajectory=Trajectory(2, 1))
    with pytest.raises(SettingsError, match="leave it at output"):
        _ = prepare(str(source), own).plan
