"""Runs the functions `interpreted_*` of a test file in a process of their own, where Triton interprets its kernels.

Whether it does is settled when Triton is first imported, and importing transformers imports it. pytest does not collect
these functions here, so a test file has a test that calls `rerun`. Importing takes longer than many of them: the
process that runs them is forked from one that has imported everything, once for all files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def rerun(file: str) -> None:
    with tempfile.NamedTemporaryFile() as said:
        serving = _served()
        serving.stdin.write(json.dumps([file, said.name]) + "\n")
        serving.stdin.flush()
        code = serving.stdout.readline()
        assert code == "0\n", Path(said.name).read_text(encoding="utf-8", errors="replace")


@cache
def _served() -> Any:
    """It ends with this process, which closes its input."""
    settings = {"TRITON_INTERPRET": "1", "BITWRIGHT_INTERPRET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", "from tests import rerun; rerun.serve()"],
        cwd=ROOT, env=os.environ | settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def serve() -> None:
    import pytest

    from tests import conftest  # noqa: F401 (and with it all that takes long)

    for line in sys.stdin:
        file, said = json.loads(line)
        child = os.fork()
        if not child:
            for stream, path in ((0, os.devnull), (1, said), (2, said)):
                os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), stream)
            options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of imports
            options += ["-o", "python_functions=interpreted_*"]
            sys.exit(pytest.main([*options, file]))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
