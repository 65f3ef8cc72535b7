"""Block tuning: after a block's sites were solved, train together what they left free, against the float block.

A solver sees one matrix and the covariance of its inputs; the block's output also knows what attention, activation and
residual make of the errors, and how one site can undo another's. For `steps` steps of one calibration batch each, the
squared distance between the block's output, on what the quantized path gives it, and the float path's output of the
same tokens is lowered by

    codes    p -= codes * decay / steps * sign(gradient)       learned rounding, SignRound of arXiv 2309.05516
    scales   Adam, rate `scales` * decay                       as in ApiQ (arXiv 2402.05147) and QTIP

with `decay` falling from 1 to 0, so a code moves by at most `codes / 2` levels. Codes start where the solver left them,
not at the float weight's nearest. Because the target is the float path, each block also undoes what the earlier ones
lost. The result replaces the solved one only if it is better over all batches.

`saliency` pulls scales towards the float weights, by `saliency * sum g^2 (W - W_float)^2` with `g^2` the squared
gradient of the block's error at the solved weights (ULB-SAPR, arXiv 2504.13932), in units of that sum at the start.
Codes do not feel it: straight through a rounding, the pull on one that is the nearest already would push it over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant.errors import SettingsError, SolverError
from quant.kernels.packed import Packed
from quant.models.walk import Site
from quant.recovery.placed import as_parameter, placed
from quant.recovery.trainable import Tunable
from quant.recovery.tunable import tunable

REHEARSED = 3  # steps


@dataclass(frozen=True, eq=False)
class Task:
    """A solved block. `output(b)`: what the model's weights make of batch `b`; `target(b)`: what they should.

    `packed` and `weights`: what each site was solved to, and its float weight `[rows, in]` as the packed one lies.
    `seed`: the block's own. `on_step(done, steps, loss)`: `loss` relative to the untuned one. `metric`: of each site,
    how much errors count when codes are found; for the rehearsal of a tuning that knows it.
    """

    model: nn.Module
    name: str
    sites: Sequence[Site]
    packed: Mapping[str, Packed]
    weights: Mapping[str, Tensor]
    batches: int
    output: Callable[[int], Any]
    target: Callable[[int], Any]
    seed: int
    on_step: Callable[[int, int, float], None]
    metric: Callable[[str], Tensor | None] = lambda _: None


@dataclass(frozen=True, eq=False)
class Recovered:
    """`packed` by site. `before`, `after`: squared error of the block's output over its energy, all batches."""

    packed: Mapping[str, Packed]
    before: float
    after: float


def improved(task: Task, train: Callable[[float], Mapping[str, Packed]]) -> Recovered:
    """The block as `train` makes it, which is told a batch's loss before; as it was solved where that is no better."""
    before, energy = losses(task, {name: packed.dequantize() for name, packed in task.packed.items()})
    share = before / energy if energy > 0 else 0.0
    if not before > 0:
        return Recovered(task.packed, share, share)
    packed = train(before / task.batches)
    after, _ = losses(task, {name: one.dequantize() for name, one in packed.items()})
    return Recovered(packed, share, after / energy) if after < before else Recovered(task.packed, share, share)


class Recovery(Protocol):
    def recover(self, task: Task) -> Recovered:
        """A better block: never one of more error than `task` came with. Same task, same bytes."""
        ...

    def rehearse(self, task: Task, batches: int) -> float:
        """Seconds that `recover` would take on a task like this one with so many batches."""
        ...


@dataclass(frozen=True)
class BlockTuning:
    """See the module. A step takes one calibration batch, so `calibration.batch_size` sets its cost. `codes`: levels; 0
    leaves them. `scales`: 0 leaves them. The defaults are for 3 and 4 bits; at 2 bits `codes` 3 and `scales` 0.005 did
    better (one model's validation text: 0.658 for 0.701 over the float model's log perplexity).
    """

    steps: int = 200
    codes: float = 1.0
    scales: float = 0.002
    saliency: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rates = (self.codes, self.scales, self.saliency)
        if self.steps < 1 or not all(0 <= rate < math.inf for rate in rates) or not self.codes + self.scales:
            raise SettingsError(
                f"recovery: steps is {self.steps}, codes {self.codes}, scales {self.scales}, saliency {self.saliency}; "
                "steps is at least 1, the others finite and not negative, and codes or scales above 0"
            )
        if self.saliency and not self.scales:
            raise SettingsError("recovery: saliency pulls scales, which scales=0 leaves; set saliency to 0, or scales")

    def recover(self, task: Task) -> Recovered:
        return improved(task, lambda usual: self._trained(task, usual))

    def rehearse(self, task: Task, batches: int) -> float:
        seconds = rehearsed(replace(self, saliency=0.0), task, batches)
        if not self.saliency:
            return seconds
        began = time.perf_counter()
        with torch.enable_grad():
            saliencies(task)
        return seconds + (time.perf_counter() - began) * batches / task.batches

    def _trained(self, task: Task, usual: float) -> dict[str, Packed]:
        tunables = {
            name: tunable(packed, task.weights[name], self.codes > 0, task.metric(name))
            for name, packed in task.packed.items()
        }
        with torch.enable_grad():
            self._train(task, tunables, usual, saliencies(task) if self.saliency else {})
        return {name: one.pack() for name, one in tunables.items()}

    def _train(self, task: Task, tunables: Mapping[str, Tunable], usual: float, pull: Mapping[str, Tensor]) -> None:
        """`usual`: a batch's loss before training; `pull`: see `saliencies`."""
        codes = [parameter for one in tunables.values() for parameter in one.codes()]
        scales = [parameter for one in tunables.values() for parameter in one.scales()] if self.scales else []
        adam = torch.optim.Adam(scales, lr=self.scales) if scales else None
        for step, batch in enumerate(in_turn(task.batches, self.steps, self.seed + task.seed)):
            decay = 1 - step / self.steps
            weights = {name: one.weight() for name, one in tunables.items()}
            loss = distance(task, weights, batch)[0] / usual
            if not bool(torch.isfinite(loss)):
                raise SolverError(
                    f"{task.name}: the tuning loss is not finite at step {step}; lower recovery.codes and "
                    "recovery.scales, or compute in float32"
                )
            far = sum(((weights[n] - task.weights[n]).square() * salient).sum() for n, salient in pull.items())
            pulled = _gradients(self.saliency * far, scales, keep=True) if isinstance(far, Tensor) else []
            gradients = _gradients(loss, [*codes, *scales])
            for gradient, more in zip(gradients[len(codes) :], pulled, strict=False):
                if gradient is not None and more is not None:
                    gradient.add_(more)
            with torch.no_grad():
                for parameter, gradient in zip(codes, gradients[: len(codes)], strict=True):
                    if gradient is not None:
                        parameter.sub_(gradient.sign_(), alpha=self.codes * decay / self.steps)
                for one in tunables.values():
                    one.settle(step)
                if adam is not None:
                    for parameter, gradient in zip(scales, gradients[len(codes) :], strict=True):
                        parameter.grad = gradient
                    adam.param_groups[0]["lr"] = self.scales * decay
                    adam.step()
            task.on_step(step + 1, self.steps, float(loss.detach()))


def rehearsed(recovery: Any, task: Task, batches: int) -> float:
    """See `Recovery.rehearse`: a few of its `steps`, and the two passes over all batches apart from them."""
    began = time.perf_counter()
    few = replace(recovery, steps=min(recovery.steps, REHEARSED))
    few.recover(task)
    whole = time.perf_counter() - began
    began = time.perf_counter()
    losses(task, {name: packed.dequantize() for name, packed in task.packed.items()})
    passing = time.perf_counter() - began
    step = max(0.0, whole - 2 * passing) / few.steps
    return step * recovery.steps + 2 * passing * batches / task.batches


def _gradients(loss: Tensor, parameters: Sequence[Tensor], keep: bool = False) -> list[Tensor | None]:
    """None for experts that no token of this batch reached. `keep`: the graph, for another loss."""
    found: Any = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=keep)
    return list(found)


def saliencies(task: Task) -> dict[str, Tensor]:
    """Squared gradient of the block's error by each weight at what was solved, mean over batches, by site: in units in
    which the solved weights' squared distance to the float ones, weighted so, is 1 in all."""
    weights = {name: packed.dequantize().requires_grad_() for name, packed in task.packed.items()}
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in range(task.batches):
        gradients = _gradients(distance(task, weights, batch)[0], list(weights.values()))
        for salient, gradient in zip(found.values(), gradients, strict=True):
            if gradient is not None:
                salient.add_(gradient.square())
    far = sum(float(((weights[n].detach() - task.weights[n]).square() * found[n]).sum()) for n in found)
    return {name: salient / far for name, salient in found.items()} if far > 0 else {}


def in_turn(batches: int, steps: int, seed: int) -> list[int]:
    """Batches as they are taken: every one once before any comes again, each round in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // batches)
    return torch.cat([torch.randperm(batches, generator=generator) for _ in range(rounds)])[:steps].tolist()


@torch.no_grad()
def losses(task: Task, weights: Mapping[str, Tensor]) -> tuple[float, float]:
    """Squared error and energy of the block's output, summed over all batches."""
    found = [distance(task, weights, batch) for batch in range(task.batches)]
    return sum(float(error) for error, _ in found), sum(float(energy) for _, energy in found)


def distance(task: Task, weights: Mapping[str, Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """Squared error and energy of the block's output on one batch."""
    with placed(task.model, {site.parameter: as_parameter(site, weights[site.name]) for site in task.sites}):
        outputs = floats(task.output(batch))
    targets = floats(task.target(batch))
    pairs = [(output.float(), target.float()) for output, target in zip(outputs, targets, strict=True)]
    errors = [(output - target).square().sum() for output, target in pairs]
    return torch.stack(errors).sum(), torch.stack([target.square().sum() for _, target in pairs]).sum()


def floats(nest: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
