"""What every solver takes and gives back.

A solver is a pure function of a weight, the statistics of its inputs and a spec: no hooks, no modules, no device
policy, no prints. It works where the weight lies. Its error is relative to the float weight's own output on the
calibration tokens,

    error = tr(D H DT) / tr(W H WT),   D = W - Q,

plus, where its inputs are rounded, what that costs (`noise`, over the same energy; see `rounding.py`),
so 0.01 reads "one per cent of the output's energy" and sites of different size compare. A solver that aims at the float
path's outputs leaves these on purpose: it lowers `missed`, the same for the distance from `W x_float`, where errors of
rows count as codes were told that they do (`A`, `metric.py`). But for what no solver can change it is

    missed = (tr(DT A D H) - 2 tr(DT A W (H - C))) / tr(WT A W H),   C = mean of x_float xT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant.calibration.statistics import Statistics
from quant.errors import SolverError
from quant.kernels.layouts import Packed, PackedUniform
from quant.kernels.spec import Spec, Uniform
from quant.solvers.metric import weighed
from quant.solvers.rounding import noise_energy


@dataclass(frozen=True, eq=False)
class Solution:
    """`weight` `[out, in]` float32: `packed` dequantized. `error`, `missed`: see the module; of two solutions for the
    same statistics the one that missed by less is better. `notes`: what did not go as asked. `noise`: mean squared
    output error from rounding the inputs, counted in both.
    """

    packed: Packed
    weight: Tensor
    error: float
    missed: float
    notes: tuple[str, ...] = ()
    noise: float = 0.0


@dataclass(frozen=True, eq=False)
class Problem:
    """A `weight` `[out, in]` to be quantized. `metric` `[out, width]`: how much errors in the rows count (`metric.py`),
    where codes share bits among them; None: all the same."""

    weight: Tensor
    statistics: Statistics
    metric: Tensor | None = None


class Solver(Protocol):
    def solve_all(self, problems: Sequence[Problem], spec: Spec) -> list[Solution]:
        """Quantizes each; what they share, and what takes no longer for many than for one, is done once. With a uniform
        spec no row's result depends on another row: sites that share statistics are solved as one weight. Raises
        `SolverError` where the numbers do not allow it, naming what is wrong.
        """
        ...

    def solve(self, weight: Tensor, statistics: Statistics, spec: Spec, metric: Tensor | None = None) -> Solution:
        """One problem's solution."""
        return self.solve_all([Problem(weight, statistics, metric)], spec)[0]


def solve_named(solver: Solver, names: Sequence[str], problems: Sequence[Problem], spec: Spec) -> list[Solution]:
    """`solver`'s solutions; uniform weights, which share their statistics then, as one weight of more rows. Raises
    `SolverError` with the name of the first that it cannot solve."""
    try:
        if len(problems) > 1 and isinstance(spec, Uniform):
            return _as_one(solver, problems, spec)
        return solver.solve_all(problems, spec)
    except SolverError as error:
        if len(problems) == 1:
            raise SolverError(f"{names[0]}: {error}") from None
        return [solve_named(solver, [name], [one], spec)[0] for name, one in zip(names, problems, strict=True)]


def _as_one(solver: Solver, problems: Sequence[Problem], spec: Uniform) -> list[Solution]:
    statistics, found, stop = problems[0].statistics, list[Solution](), 0
    assert all(one.statistics is statistics for one in problems)
    whole = solver.solve(torch.cat([one.weight for one in problems]), statistics, spec)
    assert isinstance(whole.packed, PackedUniform)
    for one in problems:
        start, stop = stop, stop + one.weight.shape[0]
        rows = whole.packed.rows(torch.arange(start, stop, device=whole.packed.device))
        found.append(solution(rows, one.weight, statistics, whole.notes))
    return found


def solution(
    packed: Packed, weight: Tensor, statistics: Statistics, notes: tuple[str, ...] = (), noise: float | None = None,
    metric: Tensor | None = None,
) -> Solution:  # fmt: skip
    """Completes a `Solution`: dequantizes `packed` and measures its error against the float `weight`. `noise`: of the
    codes inside, for a spec that lies around them. `metric`: how much rows count in `missed`."""
    quantized, hessian = packed.dequantize(), _plain(statistics)
    noise = noise_energy(quantized, statistics, packed.spec) if noise is None else noise
    target = weight.float()
    lost, whole = target - quantized, _energy(target, hessian)
    error = missed = _share(_energy(lost, hessian) + noise, whole)
    counted = lost  # A D
    if metric is not None:
        counted = weighed(metric, lost)
        whole = _energy(target, hessian, weighed(metric, target))
        missed = _share(_energy(lost, hessian, counted) + noise, whole)
    if statistics.cross is not None and whole > 0:
        away = target @ (statistics.hessian - statistics.cross)
        missed -= 2 * float(away.mul_(counted).sum(dtype=torch.float64)) / whole
    return Solution(packed, quantized, error, missed, notes, noise)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor, noise: float = 0.0) -> float:
    """`(tr(D H DT) + noise) / tr(W H WT)`; 0 where the weight's own output is zero and nothing was lost, infinity where
    something was.
    """
    target = weight.float()
    return _share(_energy(target - quantized, hessian) + noise, _energy(target, hessian))


def check(weight: Tensor, statistics: Statistics) -> None:
    """Raises `SolverError` for a weight or Hessian that no solver can use."""
    if weight.ndim != 2 or weight.shape[1] != statistics.features:
        raise SolverError(
            f"weight of shape {list(weight.shape)} with statistics of {statistics.features} inputs; "
            f"a matrix [out, {statistics.features}] is expected"
        )
    for name, tensor in (("weight", weight), ("Hessian", statistics.hessian), ("cross moment", statistics.cross)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise SolverError(
                f"{count} of {tensor.numel()} values of the {name} are not finite; "
                "check the checkpoint, or calibrate in float32"
            )


def _share(lost: float, whole: float) -> float:
    return lost / whole if whole > 0 else 0.0 if lost <= 0 else float("inf")


def _energy(matrix: Tensor, hessian: Tensor, counted: Tensor | None = None) -> float:
    """`tr(MT A M H)`; `counted`: `A M`, without it `M`; `hessian`: `H`, or its diagonal where that is all."""
    product = matrix @ hessian if hessian.ndim == 2 else matrix * hessian
    return float(product.mul_(matrix if counted is None else counted).sum(dtype=torch.float64))


def _plain(statistics: Statistics) -> Tensor:
    """The Hessian; of `Statistics.identity` the diagonal, lest two products per matrix with ones and zeros take longer
    than rounding it to nearest. The same numbers."""
    H, d = statistics.hessian, statistics.diagonal
    alone = not statistics.tokens and statistics.cached("alone", lambda: bool(H.count_nonzero() == d.count_nonzero()))
    return d if alone else H
