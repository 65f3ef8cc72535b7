"""Weights whose columns are rounded in lockstep: the next column of each, all of them at once.

A column of a trellis has few sequences, and most of its time goes into beginning operations, on a GPU nearly all of it.
Weights of one shape take the same steps, so they are stacked: those that read the same inputs (gate and up, keys and
values) one below the other, and such sets that each have a Hessian of their own (one basis and another, one expert and
the next) behind each other, `[S, rows, in]`. Each set's columns are put into the order in which they are rounded, and
back when they are packed. No sequence of a trellis knows of another, so each weight gets the codes that it would get
alone, but for the last bits of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quant.kernels.spec import Rotated, Spec, Trellis
from quant.solvers.factor import Factor
from quant.solvers.solution import Problem

LIMIT = {"cpu": 1 << 26, "cuda": 1 << 29}
"""Numbers, of weights and of Hessians, up to which weights are stacked; a solver holds about eight times as many: 2 GB
on a CPU, 16 GB or a quarter of its memory on a GPU."""


def goes(spec: Spec) -> bool:
    """Whether weights of this spec go in lockstep."""
    return isinstance(spec.base if isinstance(spec, Rotated) else spec, Trellis)


def stackable(shape: Sequence[int], device: torch.device) -> int:
    """How many weights of `shape` `[out, in]`, each with its own inputs, are stacked at most."""
    most = LIMIT.get(device.type, LIMIT["cpu"])
    if device.type == "cuda":  # a quarter of the card's memory, whatever else lies there: the same stacks in every run
        most = min(most, torch.cuda.get_device_properties(device).total_memory // 128)
    return max(1, most // (shape[1] * (shape[0] + shape[1])))


def stacks(problems: Sequence[Problem], factors: Mapping[int, Factor]) -> list[list[list[int]]]:
    """Which of the problems that have a factor to solve together: for each stack its sets, of as many problems each,
    with one factor."""
    sets = dict[tuple[object, ...], list[int]]()
    for number, factor in factors.items():
        weight, metric = problems[number].weight, problems[number].metric
        width = 0 if metric is None else metric.shape[1]
        sets.setdefault((id(factor), factor.diagonal, *weight.shape, width), []).append(number)
    alike = dict[tuple[object, ...], list[list[int]]]()
    for key, numbers in sets.items():
        most = _most(problems[numbers[0]])
        for part in (numbers[start : start + most] for start in range(0, len(numbers), most)):
            alike.setdefault((*key[1:], len(part)), []).append(part)
    found = list[list[list[int]]]()
    for parts in alike.values():
        step = max(1, _most(problems[parts[0][0]]) // len(parts[0]))
        found += [parts[start : start + step] for start in range(0, len(parts), step)]
    return found


def stacked(weights: Sequence[Tensor], factors: Sequence[Factor]) -> tuple[Tensor, Factor]:
    """The targets `[S, rows, in]` and the factor of a stack, with columns in each set's order; from the weights
    `[out, in]`, set after set, and the sets' factors."""
    each, rows = len(weights) // len(factors), list[Tensor]()
    orders = [factor.order.to(weights[0].device) for factor in factors]
    for number, (factor, order) in enumerate(zip(factors, orders, strict=True)):
        whole = torch.cat([one.float() for one in weights[number * each : (number + 1) * each]])
        rows.append((whole if factor.match is None else whole @ factor.match)[:, order])
    hessians = [factor.hessian[order][:, order] for factor, order in zip(factors, orders, strict=True)]
    feedback, variance = _stack([factor.feedback for factor in factors]), _stack([f.variance for f in factors])
    order = torch.arange(weights[0].shape[1])
    return _stack(rows), Factor(order, feedback, _stack(hessians), variance, None, ())


def laid(matrix: Tensor, order: Tensor) -> Tensor:
    """A copy of `[out, in]` as `[in, out]`, in the order of rounding, which a stack has already."""
    if matrix.ndim == 3:
        return matrix.mT.clone(memory_format=torch.contiguous_format)
    return matrix.T[order.to(matrix.device)].contiguous()


def put_back(columns: Tensor, order: Tensor) -> Tensor:
    """The inverse of `laid`."""
    if columns.ndim == 3:
        return columns.mT
    return torch.empty_like(columns).index_copy_(0, order.to(columns.device), columns).T


def _stack(parts: list[Tensor]) -> Tensor:
    """Without a copy if it is one."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _most(problem: Problem) -> int:
    return stackable(problem.weight.shape, problem.weight.device)
