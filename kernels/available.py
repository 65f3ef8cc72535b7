"""Whether Triton's kernels can run, and if not, why: the one place that asks.

Modules that hold kernels import Triton when they are imported, so they are imported only after `runs_triton` has said
yes; elsewhere plain torch does the same, so that nothing needs Triton to be installed.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

INTERPRET = "BITWRIGHT_INTERPRET"
"""Set to 1, together with `TRITON_INTERPRET=1`: kernels run on a CPU, very slowly, under Triton's interpreter."""

INSTALLED = find_spec("triton") is not None
OLDEST = (8, 0)  # compute capability


def runs_triton(x: Tensor) -> bool:
    """Whether a kernel can take `x`: it is on a GPU that Triton supports, or the environment asks for the
    interpreter."""
    return missing(x) is None


def missing(x: Tensor) -> str | None:
    """Why no kernel can take `x`; None where one can."""
    if not INSTALLED:
        return "Triton is not installed; pip install triton"
    if os.environ.get(INTERPRET) == "1":
        return None
    return unsupported(x.device) if x.is_cuda else f"x is on {x.device}: Triton kernels run on CUDA devices"


def transformed() -> bool:
    """Whether derivatives are carried forward, which operators of our own would drop without a word, or a transform of
    `torch.func` is at work, which they do not know."""
    active = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return active or torch.autograd.forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def unsupported(device: torch.device) -> str | None:
    """Why the kernels do not run on a GPU; None where they do."""
    if torch.version.hip:
        return f"{torch.cuda.get_device_name(device)}: the kernels are for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


def hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9.x."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def clusters(device: torch.device) -> bool:
    """Whether blocks may be a cluster, and reach into each other's shared memory: on compute capability 9.x, where it
    was tried. `BITWRIGHT_CLUSTERS=0` turns it off."""
    return hopper(device) and os.environ.get("BITWRIGHT_CLUSTERS") != "0"


def early(device: torch.device) -> dict[str, bool]:
    """What to give a kernel that calls `warp.waited`: it may be launched while the one before it is still at work
    (programmatic dependent launch), and waits for it itself. On compute capability 9.x, where it was tried; elsewhere
    it is said to fail in CUDA graphs (12.0), or nobody here has seen it. `BITWRIGHT_EARLY=0` turns it off."""
    can = hopper(device) and os.environ.get("BITWRIGHT_EARLY") != "0"
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}
