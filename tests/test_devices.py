"""Runs on a pretended GPU (`pretend.py`): no tensor meets one of another device, and no column is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import quant
from quant import Settings, load_recipe
from quant.recipe import override
from tests import pretend, tiny
from tests.processes import PATIENCE, Start

SHORT = ["calibration.samples=4", "calibration.sequence_length=64", "calibration.batch_size=2"]
RUNS = {
    "pairs": (
        "llama",
        "best",
        [*SHORT, "spec.base.window=8", "solver.tries=1", "distillation.samples=8", "distillation.steps=2"],
    ),
    "experts": ("mixtral", "balanced", [*SHORT, "spec.base.window=8", "solver.sweeps=0"]),
    "grids": ("gpt2", "gptq", SHORT),
    "branch": ("llama", "svdquant", [*SHORT, "solver.sweeps=0"]),
}


def work(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads of transformers' own would see no GPU
    model, recipe, settings = RUNS[name]
    text = f'calibration.text="{tiny.text(folder)}"'
    source, gpu = tiny.model(model, folder / "model"), pretend.begin()
    wanted = override(load_recipe(recipe), [*settings, text])
    found = quant.quantize(str(source), folder / "out", wanted, settings=Settings(device="cuda", dtype="float32"))
    columns = min(site["shape"][1] for site in found.report["sites"]) * len(found.report["sites"])
    asked = {line: count for line, count in gpu.waits.items() if not line.startswith("kernels/viterbi")}
    assert name == "branch" or max(asked.values()) < columns / 2, gpu.waits.most_common(5)  # it solves many times


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu(name: str, tmp_path: Path, started: Start) -> None:
    child = started(work, name, tmp_path)
    child.join(5 * PATIENCE)  # it works, and others may too
    assert child.exitcode == 0


def both() -> None:
    pretend.begin()
    here, there = torch.ones(3, device="cuda"), torch.ones(3)
    for mixes in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: torch.where(here > 0, there, here),
        lambda: there[torch.zeros(1, dtype=torch.int64, device="cuda")],
        lambda: here.mul_(there),
        lambda: torch.nn.functional.linear(here, torch.ones(3, 3)),
        lambda: here.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            mixes()
    there[:] = here
    assert not there.is_cuda
    assert (here.cpu() + there).tolist() == [2.0] * 3
    assert (here + there.to("cuda")).device.type == "cuda"
    linear = torch.nn.Linear(3, 3).to("cuda")
    linear(here).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.is_cuda


def test_what_is_pretended_is_noticed(started: Start) -> None:
    child = started(both)
    child.join(5 * PATIENCE)
    assert child.exitcode == 0
