"""Mixed precision: bits per site by what its error costs at the model's output (MixDQ, arXiv 2405.17873, section 3.3).

One site at a time gets the error that each number of bits would leave in it, the others stay float, and the whole model
says what became of its output: for a diffusion transformer the squared error of the prediction, each timestep weighted
by how far an error there moves the final image (`calibration/effects.py`), so that the sum is the image's own error as
long as errors are small. (Of a language model gradients say it in far less time, `fisher.py`.) Then an integer program
picks one width for each site:

    minimise  sum cost[i, b] x[i, b]   with   sum_b x[i, b] = 1,   sum bytes[i, b] x[i, b] <= budget

Solving every site at every width would take as many runs as there are widths. What feedback leaves is known without:
rounding errors are white, `e` with a mean square of `4^-bits` of the row's, and the weight's error is `e V`, with `V`
the factor that feedback itself uses (`solvers/factor.py`).
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibration.batch import Batch
from quant.calibration.capture import Stage
from quant.calibration.statistics import Statistics
from quant.errors import CalibrationError, SettingsError
from quant.models.stream import first_tensor
from quant.models.walk import Site, Walk
from quant.recovery.placed import as_parameter, oriented
from quant.recovery.timesteps import output_error
from quant.solvers.anchor import without
from quant.solvers.factor import shaping

MANY = 256  # sites, from which on the program's proof of the very best can take minutes


@torch.no_grad()
def sensitivities(
    model: nn.Module, found: Walk, batches: Sequence[Batch], weights: Sequence[float], widths: Sequence[int],
    anchored: frozenset[str] = frozenset(),
) -> dict[str, tuple[float, ...]]:  # fmt: skip
    """For each site the cost at the model's output of each of `widths` bits. `batches`: what the whole float model is
    run on; `weights[n]`: how much batch `n` counts. `anchored`: sites whose first token stays in float."""
    targets = [first_tensor(model(**batch)) for batch in batches]
    costs: dict[str, tuple[float, ...]] = {}
    for site, error in errors(model, found, batches, anchored):
        parameter, found_costs = model.get_parameter(site.parameter), list[float]()
        kept = parameter.data
        for bits in widths:
            parameter.data = kept + error * 2.0**-bits
            outputs = (first_tensor(model(**batch)) for batch in batches)
            parts = [w * output_error(model, out, t) for w, out, t in zip(weights, outputs, targets, strict=True)]
            found_costs.append(sum(parts) / max(1e-30, sum(weights)))
        parameter.data = kept
        if not all(math.isfinite(cost) for cost in found_costs):
            raise CalibrationError(f"{site.name}: the model's output with an error in it is not finite; try float32")
        costs[site.name] = tuple(found_costs)
    return costs


def errors(
    model: nn.Module, found: Walk, batches: Sequence[Batch], anchored: frozenset[str]
) -> Generator[tuple[Site, Tensor]]:
    """Each site with the error that codes of 0 bits would leave in its parameter; `b` bits leave `2^-b` of it."""
    factors = _factors(model, found, batches, anchored)
    for number, site in enumerate(found.sites):
        kept = model.get_parameter(site.parameter).data
        generator = torch.Generator().manual_seed(number)
        white = torch.randn(site.shape, generator=generator).to(kept.device)
        matrix = oriented(kept, site).float().reshape(site.shape)
        error = white * matrix.square().mean(1, keepdim=True).sqrt()
        if (factor := factors.get(site.name)) is not None:
            order, feedback, anchor = factor
            error = torch.empty_like(error).index_copy_(1, order, error @ feedback)
            if anchor is not None:
                error -= torch.outer(error @ anchor, anchor) / anchor.square().sum()
        yield site, as_parameter(site, error).to(kept)


def _factors(
    model: nn.Module, found: Walk, batches: Sequence[Batch], anchored: frozenset[str]
) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Order of the columns and `V` for every linear, and the token that stays in float; sites of a stage share them."""
    stages = [stage for block in found.blocks for stage in block.stages if stage[0].kind == "linear"]
    watched = [Stage(model, stage, cross=False) for stage in stages]
    with ExitStack() as watching:
        for stage in watched:
            watching.enter_context(stage.watch(stage.take(None), alone=False))
        for batch in batches:
            model(**batch)
    factors: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    for stage, one in zip(stages, watched, strict=True):
        statistics: Statistics = one.finish()[0]
        anchor = statistics.anchor if stage[0].name in anchored else None
        statistics = statistics if anchor is None else without(statistics)
        if (shaped := shaping(statistics)) is not None:
            factors |= {site.name: (*shaped, anchor) for site in stage}
    return factors


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: float) -> list[int]:
    """For each row the number of the option chosen: least sum of costs with a sum of sizes of at most `budget`.

    Raises:
        SettingsError: the smallest options are already too large.
    """
    least = sum(min(row) for row in sizes)
    if least > budget:
        raise SettingsError(f"a budget of {budget:.0f} bytes; the narrowest widths take {least}: give more")
    import numpy as np
    from scipy import optimize  # what most runs need not wait for

    flat_costs, flat_sizes = (np.array([x for row in rows for x in row], dtype=float) for rows in (costs, sizes))
    rows = np.array([n for n, row in enumerate(costs) for _ in row])
    one_each = (rows[None] == np.arange(len(costs))[:, None]).astype(float)
    with unheard():
        solved: Any = optimize.milp(
            flat_costs / max(flat_costs.max(), 1e-300),
            integrality=np.ones(len(rows)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(flat_sizes[None] / budget, -np.inf, 1),
            ],
            options={"mip_rel_gap": 1e-6 if len(costs) <= MANY else 1e-3},
        )
    if solved.x is None:
        raise SettingsError(f"the integer program of {len(costs)} sites found no solution ({solved.message})")
    chosen = np.asarray(solved.x).round().astype(bool)
    picked = [int(np.flatnonzero(chosen[rows == n])[0]) for n in range(len(costs))]
    excess = sum(row[choice] for row, choice in zip(sizes, picked, strict=True)) - budget
    if excess <= 0:
        return picked
    if budget - excess < least:  # within the program's tolerance of its constraints
        return [row.index(min(row)) for row in sizes]
    return cheapest(costs, sizes, budget - excess)


@contextmanager
def unheard() -> Generator[None]:
    """What compiled code writes to standard output goes nowhere: HiGHS prints a line now and then though told not to
    (ERGO-Code/HiGHS#2783), and --json is there to be parsed."""
    with ExitStack() as closing:
        with suppress(OSError, AttributeError):  # there is no standard output
            sys.stdout.flush()
            kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
            closing.callback(os.close, kept)
            closing.callback(os.close, nowhere)
            closing.callback(os.dup2, kept, 1)
            closing.callback(ctypes.CDLL(None).fflush, None)  # first: what it holds back would come later
            os.dup2(nowhere, 1)
        yield


def allocate(
    sites: Sequence[Site], widths: Sequence[int], costs: Mapping[str, Sequence[float]],
    nbytes: Callable[[Site, int], int], budget: float,
) -> dict[str, int]:  # fmt: skip
    """Bits of each site, at most `budget` bytes in all, overhead included."""
    sizes = [[nbytes(site, bits) for bits in widths] for site in sites]
    picked = cheapest([costs[site.name] for site in sites], sizes, budget)
    return {site.name: widths[choice] for site, choice in zip(sites, picked, strict=True)}
