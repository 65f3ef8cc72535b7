"""Sums are added in one order: what is asked of torch for it, and on a GPU the bytes of two runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quant
from quant import Recipe, Settings, load_recipe
from quant.kernels.spec import Codebook
from quant.order import deterministic
from quant.recipe import override
from quant.recovery.tuning import BlockTuning
from quant.solvers.feedback import Feedback
from tests import tiny

SHORT = ["calibration.samples=8", "calibration.sequence_length=64"]
RECIPES = {
    "best": override(load_recipe("best"), [*SHORT, "distillation.samples=16"]),
    "blocks": Recipe(spec=Codebook(bits=2), solver=Feedback(), recovery=BlockTuning()),
    "gptq": load_recipe("gptq"),
}


def asked() -> tuple[bool, bool, bool]:
    """Of torch: one order, by a warning only; attention by other forms than the plain one."""
    warns, flash = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cuda.flash_sdp_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns, flash


def test_torch_is_asked_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic("cpu", True):
        assert asked() == (False, False, True)
    with deterministic("cuda:0", False):
        assert asked() == (True, True, True)
    with deterministic("cuda", True):
        assert asked() == (True, True, False)
    assert asked() == (False, False, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_two_runs_on_a_gpu_give_the_same_bytes(name: str, demo: Path, tmp_path: Path) -> None:
    recipe, settings = override(RECIPES[name], SHORT), Settings(device="cuda")
    first, second = (quant.quantize(str(demo), tmp_path / each, recipe, settings=settings).out for each in "ab")
    assert tiny.contents(first) == tiny.contents(second)
