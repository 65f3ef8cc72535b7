"""Functions run in processes of their own, to be killed, stopped and starved.

They are forked from a process that has imported everything, so that an attempt costs its work alone.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["quant.cli", "tests.sketches", "transformers.models.gemma3.modeling_gemma3"])
PATIENCE = 120  # seconds that a child may take on a busy machine

Start = Callable[..., Any]


class Children:
    """`start(target, ...)` gives a running process; `end()` leaves none behind."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def start(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        child = FORK.Process(target=target, args=args, kwargs=kwargs)
        child.start()
        self.started.append(child)
        return child

    def end(self) -> None:
        for child in self.started:
            if child.is_alive():
                child.kill()
            child.join(PATIENCE)
            child.close()


def wait_for(what: Callable[[], bool], child: Any = None) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < PATIENCE
        assert child is None or child.is_alive()
        time.sleep(0.001)


def quiet(target: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Runs in a child whose output nobody wants to see."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    target(*args, **kwargs)
