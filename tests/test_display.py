"""What the command line shows while it works."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import quant
from quant import display
from quant.display import Display
from quant.models.walk import Site
from tests import tiny


def shown(watch: Display, width: int) -> str:
    out = Console(width=width, file=io.StringIO())
    out.print(watch.bars.get_renderable())
    return out.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def solved(name: str, weights: int) -> Any:
    return SimpleNamespace(error=1.234e-3, site=Site(name, "linear", weights, 1), notes=[])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(display.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("width", [80, 200])
def test_a_line_says_what_people_look_for(width: int, clock: list[float]) -> None:
    watch = Display(Console(width=width, file=io.StringIO(), force_terminal=True))
    watch.begin(28, 28_000, 0)
    for index in range(12):
        watch.block(index, f"model.layers.{index}")
        watch.site(solved(f"model.layers.{index}.self_attn.q_proj", 400))
        clock[0] += 60
        if index < 11:
            watch.advanced(index, 1000)
    watch.site(solved("model.layers.11.self_attn.o_proj", 400))
    line = shown(watch, width)
    for words in ("block 12/28", "42%", "self_attn.o_proj", "error 1.23e-03", "0:16:28 left"):
        assert words in line
    assert line.count("\n") == 1


def test_a_prediction_waits_for_the_first_block(clock: list[float]) -> None:
    """Its first sites come late: what they share, the statistics of all of them, comes first."""
    watch = Display(Console(width=120, file=io.StringIO(), force_terminal=True))
    watch.begin(2, 2000, 0)
    watch.block(0, "model.layers.0")
    clock[0] += 100
    watch.site(solved("model.layers.0.mlp.up_proj", 10))
    assert "left" not in shown(watch, 120)
    watch.advanced(0, 1000)
    assert "0:01:40 left" in shown(watch, 120)


def test_blocks_of_a_journal_say_nothing_of_the_pace(clock: list[float]) -> None:
    log = io.StringIO()
    watch = Display(Console(width=120, file=log))
    watch.begin(4, 4000, 2)
    for index in range(2):
        watch.block(index, f"model.layers.{index}")
        clock[0] += 1
        watch.advanced(index, 1000)
    watch.block(2, "model.layers.2")
    clock[0] += 50
    watch.site(solved("model.layers.2.mlp.up_proj", 1000))
    watch.advanced(2, 1000)
    assert log.getvalue().splitlines() == [
        "resuming: 2 of 4 blocks are done",
        "block 3/4: worst error 1.23e-03, 0:00:50 left",
    ]


def test_a_second_component_begins_anew_and_a_line_is_said_once_as_it_is(clock: list[float]) -> None:
    log = io.StringIO()
    watch = Display(Console(width=120, file=log))
    for _ in range(2):
        watch.begin(2, 2000, 0)
        watch.say("recipe [red]/x]: 2-bit")
        for index in range(2):
            watch.block(index, f"layers.{index}")
            clock[0] += 7
            watch.site(solved(f"layers.{index}.up", 1000))
            watch.advanced(index, 1000)
    part = ["block 1/2: worst error 1.23e-03, 0:00:07 left", "block 2/2: worst error 1.23e-03"]
    assert log.getvalue().splitlines() == ["recipe [red]/x]: 2-bit", *part, *part]


def test_quantize_shows_it_on_a_terminal(llama: Path, words: Path, tmp_path: Path) -> None:
    """As a program gives it, which does not enter it."""
    watch = Display(Console(file=io.StringIO(), force_terminal=True))
    quant.quantize(str(llama), tmp_path / "out", tiny.recipe(words), progress=watch)
    assert "block 2/2" in watch.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert not watch.bars.live.is_started
