"""What a process is told about its memory, and that what is no longer used goes back, in memory and on disk."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from quant import cli as quantizing
from quant.calibration.activations import scratch
from quant.eval import cli as judging
from quant.memory import LARGE, peak_bytes
from tests.processes import FORK, PATIENCE, Children

CHILD = f"""
import ctypes, torch
from quant.memory import give_back, map_large, peak_bytes
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024
map_large()
large = [torch.ones({LARGE} // 4) for _ in range(16)]
before = resident()
del large
assert before - resident() > 15 * {LARGE}, "large tensors are unmapped when they are freed"
kept, small = [], []
for _ in range(4096):  # what lives on lies between what is freed
    small.append(torch.ones(4096))
    kept.append(torch.ones(1))
before = resident()
del small
give_back()
assert before - resident() > 4096 * 4096 * 3, "free pages go back though the heap's end is in use"
assert peak_bytes() > 0.9 * before  # the kernel counts in batches
"""


def test_peak_is_at_least_what_is_in_use() -> None:
    assert peak_bytes() > 50 << 20  # torch alone takes more


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's calls and Linux's account of them")
def test_freed_memory_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [judging, quantizing])
def test_both_commands_map_large_tensors(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or scores of chunks of logits hold the heap open: 780 MB more for a window of 512 where the vocabulary is
    151,936, and 19 MB so."""
    asked = list[bool]()
    monkeypatch.setattr(command, "map_large", lambda: asked.append(True))
    monkeypatch.setattr(command, "app", lambda **_: 0)
    monkeypatch.setattr(sys, "exit", lambda _: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    command.main()
    assert asked


def _hold(home: str, begun: Any) -> None:
    tempfile.tempdir = home
    with scratch() as folder:
        begun.send(folder.name)
        time.sleep(PATIENCE)


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "bitwright-scratch-young").mkdir()  # another process is about to lock it
    children, (begun, tells) = Children(), FORK.Pipe(duplex=False)
    try:
        killed, alive = (children.start(_hold, str(tmp_path), tells) for _ in range(2))
        names = {begun.recv() for _ in range(2)}
        killed.kill()
        killed.join(PATIENCE)
        with scratch() as own:
            left = {path.name for path in tmp_path.glob("bitwright-*")} - {own.name}
        assert len(left) == 2
        assert left - names == {"bitwright-scratch-young"}
        assert alive.is_alive()
        assert not own.exists()
    finally:
        children.end()
