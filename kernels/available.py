"""Whether Triton's kernels can run: the one place that asks.

Modules that hold kernels import Triton when they are imported, so they are imported only after `runs_triton` has said
yes; elsewhere plain torch does the same, so that nothing needs Triton to be installed.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor

INTERPRET = "BITWRIGHT_INTERPRET"
"""Set to 1, together with `TRITON_INTERPRET=1`: kernels run on a CPU, very slowly, under Triton's interpreter."""


def runs_triton(x: Tensor) -> bool:
    """Whether a kernel can take `x`: it is on a GPU, or the environment asks for the interpreter."""
    return (x.is_cuda or os.environ.get(INTERPRET) == "1") and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
