"""Runs some functions of a test file in a process of its own, where Triton interprets its kernels or compiles them.

Which of the two is settled when Triton is first imported, and importing transformers imports it. So a test file names
its functions `interpreted_*` and `compiled_*`, which pytest does not collect, and has a test that calls `rerun`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def rerun(file: str, prefix: str) -> None:
    """`prefix`: "interpreted" or "compiled"."""
    interpret = "1" if prefix == "interpreted" else "0"
    # fusion on is the default, but unset it warns
    settings = {"TRITON_INTERPRET": interpret, "BITWRIGHT_INTERPRET": interpret, "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"python_functions={prefix}_*", file],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
