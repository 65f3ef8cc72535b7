"""The first text token in float: BOS-aware cross-attention (MixDQ, arXiv 2405.17873, section 3.2).

Many text encoders begin every prompt with one token whose embedding is always the same, and tens of times larger than
the others'. Through the quantized keys and values of a cross-attention its error would outweigh all of theirs. MixDQ
computes what becomes of it in float once and puts it in its place when the model runs; which is wrong for a text
without it. Here nothing is put in place: with `c` that token, `P = I - c cT / |c|^2` and `Q` the codes,

    W' = Q + (W - Q) c cT / |c|^2   so that   W' c = W c   and   (W - W') x = (W - Q) P x

for every other token `x`: the token is exact, what the others have of its direction too, and a text that never has it
loses nothing. `c` leaves the Hessian (`P H P`), and `Q` is solved for the rest. The second term is a branch of rank 1:
what stores, counts, loads, multiplies by and tunes low-rank branches takes it as it is.

Which sites have such a token is found on the calibration inputs (`calibration/anchors.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quant.calibration.statistics import Statistics
from quant.errors import SolverError
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.spec import DTYPES, LowRank
from quant.solvers.solution import Problem, Solution, Solver, solution


def solve_anchored(solver: Solver, problem: Problem, spec: LowRank) -> Solution:
    """`solver`'s solution for `problem` with the token `statistics.anchor` in float; a branch of rank above 1 has its
    other components from the rest of the inputs."""
    weight, statistics = problem.weight, problem.statistics
    c = statistics.anchor
    if c is None or not float(c.norm()) > 0:
        raise SolverError("no first token was seen to keep in float; give this site its base spec with --plan")
    shape = (weight.shape[0], weight.shape[1])
    others = spec.width(shape) - 1
    inner = replace(spec, rank=others, anchor=False) if others else spec.base
    base = solver.solve(weight, without(statistics), inner, problem.metric)
    dtype = DTYPES[spec.factor_dtype]
    lora_a = (c / c.norm())[None].to(dtype)
    lost = ((weight.float() - base.weight) @ c) / (lora_a[0].float() @ c)
    lora_b = lost[:, None].to(dtype)
    packed = base.packed
    if isinstance(packed, PackedLowRank):
        lora_a, lora_b = torch.cat([packed.lora_a, lora_a]), torch.cat([packed.lora_b, lora_b], 1)
        packed = packed.base
    return solution(PackedLowRank(spec, shape, packed, lora_a, lora_b), weight, statistics, base.notes, base.noise)


def without(statistics: Statistics) -> Statistics:
    """The statistics of `P x`; computed once for all weights that share them. The float path's `x_float` becomes what
    is left to be aimed at once `c cT x / |c|^2` went through the float weight."""

    def compute() -> Statistics:
        assert statistics.anchor is not None
        c = statistics.anchor.double()
        along = torch.outer(c, c) / c.square().sum()
        P = torch.eye(len(c), dtype=torch.float64, device=c.device) - along
        H = statistics.hessian.double()
        cross = None if statistics.cross is None else ((statistics.cross.double() - along @ H) @ P).float()
        return replace(statistics, hessian=(P @ H @ P).float(), cross=cross, anchor=None)

    return statistics.cached("anchored", compute)
