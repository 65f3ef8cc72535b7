"""What a block leaves beside its output reaches the blocks that read it, and nothing else is carried."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quant.calibration.activations import Activations
from quant.calibration.notes import Left, before, left, merged, parted, pin, written
from quant.calibration.replay import Replay
from quant.models.stream import first_tensor
from quant.models.walk import walk


class Layer(nn.Module):
    def __init__(self, reads: str, writes: str) -> None:
        super().__init__()
        self.reads, self.writes, self.linear = reads, writes, nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, board: Any, tables: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.linear(x) * tables["two"]
        if self.reads:
            x = x + board[self.reads][0]
        if self.writes:
            board[self.writes] = (x, x)  # one tensor, and the output's memory
        return x


class Model(nn.Module):
    """Layer 2 reads what layer 0 wrote; layer 3 what layer 1 wrote, and layer 2 again."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([Layer("", "a"), Layer("", "b"), Layer("a", "b"), Layer("b", "")])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        board, tables = self.kind(), {"two": x.new_full((), 2.0)}
        for layer in self.layers:
            x = layer(x, board, tables=tables)
        return x


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_notes_travel_with_outputs(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Model(kind), {"x": torch.randn(2, 16)}
    found = walk(model, batch)
    assert [len(block.sites) for block in found.blocks] == [1] * 4
    whole, store = model(**batch), Activations(1, tmp_path, 0)  # what it holds goes to the disk
    with torch.no_grad(), Replay(model, found.chain) as replay:
        for index in range(4):
            store[0] = replay.output(index, batch, store[0])
            assert isinstance(store[0], Left)
            assert torch.is_tensor(first_tensor(store[0]))
        assert set(store[0].notes) == {1}  # not the tables, which nobody writes
        assert set(store[0].notes[1]) == {"a", "b"}
        torch.testing.assert_close(replay.head(batch, store[0]), whole)


def test_only_what_was_written() -> None:
    same, board = torch.ones(1), {"old": torch.zeros(1)}
    kwargs = {"board": board, "other": {"same": same}, "x": same}
    seen = before((), kwargs)
    assert written(seen, (), kwargs) == {}
    assert left(same, {}) is same
    board["old"], board["new"] = torch.ones(1), same
    notes = merged({"board": {"first": same, "new": torch.zeros(1)}}, written(seen, (), kwargs))
    assert notes == {"board": {"first": same, "new": same, "old": board["old"]}}
    output, kept = parted(left(same, notes))
    assert output is same
    assert kept == notes
    empty: dict[str, Any] = {"board": {}}
    pin(notes, (), empty)
    assert empty["board"] == notes["board"]
