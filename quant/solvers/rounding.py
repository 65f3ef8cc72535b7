"""What rounding the inputs of a weight to 8 bits costs, so that solvers see the inputs that it will be multiplied by.

A rounded token is `x + e`, where `e` has about no correlation with `x` or between channels (it depends on what is left
after many levels). So of the layer's output, with `N = E[e eT]` taken as diagonal,

    E |W x - Q (x + e)|^2 = tr(D H DT) + tr(Q N QT),   D = W - Q,

and the Hessian of the rounded inputs is `H + N`. `N` is measured on the tokens that calibration kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.kernels.integer import rounded
from quant.kernels.spec import Spec, rounds_inputs


def noise(statistics: Statistics, spec: Spec) -> Tensor | None:
    """Mean square `[in]` float32 of what rounding adds to each input; None where nothing is rounded or known."""
    sample = statistics.sample
    if sample is None or not len(sample) or not rounds_inputs(spec):
        return None
    return statistics.cached("noise", lambda: (rounded(sample) - sample).square_().mean(0))


def noise_energy(quantized: Tensor, statistics: Statistics, spec: Spec) -> float:
    """`tr(Q N QT)` of a weight `quantized` `[out, in]`."""
    added = noise(statistics, spec)
    return 0.0 if added is None else float((quantized.square() @ added).sum(dtype=torch.float64))


def of_rounded(statistics: Statistics, spec: Spec) -> Statistics:
    """The statistics of the inputs as a weight of this spec takes them; of its own basis, without wrappers."""
    added = noise(statistics, spec)
    if added is None:
        return statistics
    return statistics.cached(
        "rounded", lambda: replace(statistics, hessian=statistics.hessian + torch.diag(added), sample=None)
    )
