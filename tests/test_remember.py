"""What is final inside a block is computed once, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import quant
from quant.blocks import BlockSolver
from quant.calibration.activations import Activations
from quant.calibration.remember import Remembered, finished
from quant.calibration.replay import Replay
from tests import tiny


@pytest.mark.parametrize("match", ["quantized", "float"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "falcon", "gemma4", "qwen3-moe", "bert"])
def test_the_bytes_are_those_of_computing_it_again(
    name: str, match: Literal["quantized", "float"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model = replace(tiny.recipe(tiny.text(tmp_path)), match=match), tiny.model(name, tmp_path / "model")
    attentions = list[int]()
    real = nn.functional.scaled_dot_product_attention

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        attentions[-1] += 1
        return real(*args, **kwargs)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    attentions.append(0)
    quant.quantize(str(model), tmp_path / "kept", recipe)
    monkeypatch.setattr(BlockSolver, "_remember", lambda *_: None)
    attentions.append(0)
    quant.quantize(str(model), tmp_path / "again", recipe)
    assert tiny.contents(tmp_path / "kept") == tiny.contents(tmp_path / "again")
    assert attentions[0] < attentions[1]


def test_what_counts_as_finished() -> None:
    block = nn.ModuleDict(
        {"attention": nn.ModuleDict({"q": nn.Linear(2, 2), "o": nn.Linear(2, 2)}), "up": nn.Linear(2, 2)}
    )
    sites = {"b.attention.q", "b.attention.o", "b.up", "c.up"}
    assert finished(block, "b", sites, {"b.attention.q"}) == []
    assert finished(block, "b", sites, {"b.attention.q", "b.attention.o"}) == ["b.attention"]
    assert finished(block, "b", sites, {"b.up"}) == []  # one linear is not worth a store
    assert finished(block, "b", sites, sites) == ["b.attention"]  # the block itself is stored anyway


def test_what_is_kept_is_not_written_into(tmp_path: Path) -> None:
    """Models may add to what a submodule gave them, in place."""
    module, x = nn.Linear(3, 3).requires_grad_(False), torch.ones(2, 3)
    with Replay(nn.ModuleDict({"a": module}), []) as replay:
        kept = Remembered("a", module, replay, [Activations(1, tmp_path / str(path), 1 << 20) for path in (0, 1)])
        expected, replay.number = module(x), 0
        for _ in range(3):
            given = module(x)
            assert torch.equal(given, expected)
            given.add_(1)
        replay.path = 1
        assert torch.equal(module(2 * x), nn.functional.linear(2 * x, module.weight, module.bias))  # has its own
        assert torch.equal(module(3 * x), nn.functional.linear(2 * x, module.weight, module.bias))
        kept.close()
    assert torch.equal(module(x), expected)
