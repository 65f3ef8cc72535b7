"""After writing: the checkpoint is read back from disk and must give the logits that the run had in memory.

Files and tensors are checked first (`manifest.verify`); then the packed model runs, one block in memory at a time, on
the probe that the pipeline carried along. What is compared went through the disk, the packing and the packed modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant.checkpoint.loader import put_site
from quant.checkpoint.manifest import verify
from quant.errors import CheckpointError
from quant.kernels.spec import rounds_inputs
from quant.models.source import Source
from quant.models.stream import stream_all
from quant.prepare import Prepared, skeleton_of

# relative to the largest logit. The weights are the same numbers; only the order of sums differs (a packed matrix is
# multiplied in row chunks, a rotated one after its inputs were rotated): a few units of roundoff, times the square root
# of the depth, times what the model makes of them (a random CPM-Ant 1.3e-4). What is wrong with a matrix is far more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
ROUNDED = 2e-2  # at least, where inputs are rounded: one that lies between two of 127 levels may go either way


def compare_logits(out: Path, prepared: Prepared, expected: torch.Tensor) -> dict[str, Any]:
    """Raises `CheckpointError` if the checkpoint in `out` does not give `expected` on the probe."""
    sites = verify(out)

    def put(model: nn.Module) -> None:
        for packed in sites.values():
            put_site(model, packed)

    settings = prepared.settings
    dtype = getattr(torch, settings.dtype)
    skeleton = skeleton_of(Source(out, str(out)), settings, put, prepared.skeleton.lent)
    (got,) = stream_all(skeleton, prepared.walk.chain, [prepared.probe()])
    worst = float((got - expected).abs().max())
    scale = float(expected.abs().max())
    allowed = scale * max(TOLERANCE[dtype], ROUNDED * any(rounds_inputs(site.spec) for site in sites.values()))
    if not worst <= allowed:
        raise CheckpointError(
            f"{out}: the checkpoint read back differs from the model in memory: logits off by {worst:.3g} of "
            f"{scale:.3g} (allowed {allowed:.3g}); the disk or this version of bitwright is at "
            "fault: do not use it"
        )
    return {
        "tokens": int(expected.shape[1]) if expected.dim() > 1 else 1,
        "worst_difference": worst,
        "largest_logit": scale,
    }
