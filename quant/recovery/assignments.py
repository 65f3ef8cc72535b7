"""Assignments of vectors learned among candidates (VQ4DiT, arXiv 2408.17131): block tuning for codebooks.

A vector's entry in a codebook is chosen once by the solver, by distances; which of the near ones serves the block best
is another question. So each vector keeps its `candidates` nearest entries (the solver's choice and the others nearest
to the float vector, section 3.2), and is their mean under a softmax of logits, in a block whose outputs are held to the
float path's: the teacher's trajectory, section 3.3. Logits and codebooks follow RMSprop. A vector whose largest ratio
passes `FREEZE` keeps that entry (section 3.4), and so many of the others, the surest first, that none is open when the
last `LAST` of the steps begin, in which only the codebooks move. That takes the place of the paper's term that pulls
ratios to 0 or 1: frozen all at once, vectors lost more than learning had gained.

Other than there, a block is tuned at a time, so that the logits of one block are all that is in memory, as many floats
as `candidates` / vector length for each of its weights; the start is the solver's error feedback, not k-means; biases
and row scales stay. The result replaces the solved block only if it is better over all batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from quant.errors import SettingsError, SolverError
from quant.kernels.codebook import PackedCodebook
from quant.kernels.packed import Packed
from quant.recovery.trainable import through
from quant.recovery.tuning import Recovered, Task, distance, improved, in_turn, rehearsed
from quant.solvers.codebook import CodebookRounder
from quant.solvers.kmeans import nearest

FREEZE = 0.99  # a ratio this large is taken for 1
LAST = 0.3  # of the steps, in which only the codebooks move
LEAD = 2.0  # the logit of the solver's choice above the others'


class Candidates:
    """One packed matrix in training. `logits` float32 `[vector rows, in, candidates]`; `moves`: what was added to each
    table."""

    def __init__(self, packed: PackedCodebook, weight: Tensor, count: int) -> None:
        self.packed, self.rounder = packed, (rounder := CodebookRounder.of(packed))
        wanted = rounder.vectors(weight * rounder.inverse[:, None])
        if len(rounder.tables) > 1:
            wanted[:, rounder.fine] -= rounder.second(rounder.tables)
        energy = rounder.vectors(rounder.energy[:, None].expand_as(weight))
        solved = rounder.index[0]
        count = min(count, rounder.tables[0].shape[1])
        self.choices = solved.new_zeros((*solved.shape, count))
        for group, (first, last) in enumerate(rounder.ranges):
            part, counts = wanted[first:last].flatten(0, 1), energy[first:last].flatten(0, 1)
            found = nearest(part, counts, rounder.tables[0][group], count)
            self.choices[first:last] = found.view(last - first, -1, count)
        there = self.choices == solved[..., None]
        place = torch.where(there.any(-1), there.int().argmax(-1), count - 1)[..., None]
        self.choices.scatter_(-1, place, self.choices[..., :1].clone())
        self.choices[..., 0] = solved
        self.logits = torch.zeros(self.choices.shape, device=weight.device)
        self.logits[..., 0] = LEAD
        self.logits.requires_grad_()
        self.moves = [torch.zeros_like(table, requires_grad=True) for table in rounder.tables]

    def weight(self) -> Tensor:
        """The mixture, float32 `[out, in]`; what would be stored once every ratio is 0 or 1."""
        rounder = self.rounder
        tables = [table + move for table, move in zip(rounder.tables, self.moves, strict=True)]
        tables = [through(table, table.detach().half().float()) for table in tables]
        levels = embedding(self.choices + rounder.offsets[0][..., None], tables[0].flatten(0, 1))
        mixture = (levels * self.ratios()[..., None]).sum(-2)
        return rounder.completed(mixture, tables) * rounder.scales[:, None]

    def ratios(self) -> Tensor:
        return self.logits.softmax(-1)

    @torch.no_grad()
    def freeze(self, share: float) -> None:
        """Vectors whose largest ratio is above `FREEZE` keep that entry for good, and of the others so many, from the
        largest ratio down, that at least `share` of all do."""
        top, which = self.ratios().max(-1)
        most = top.flatten().sort(stable=True)[0][int((1 - share) * (top.numel() - 1))]
        hard = torch.zeros_like(self.logits).scatter_(-1, which[..., None], 1e4)
        self.logits.copy_(torch.where((top >= most.clamp_max(FREEZE))[..., None], hard, self.logits))

    @torch.no_grad()
    def pack(self) -> Packed:
        made, which = CodebookRounder.of(self.packed), self.logits.argmax(-1)[..., None]
        made.index[0] = self.choices.gather(-1, which)[..., 0]
        made.tables = [table + move for table, move in zip(made.tables, self.moves, strict=True)]
        return made.pack()


@dataclass(frozen=True)
class Assignments:
    """See the module. `ratios`, `codebooks`: rates of RMSprop, the second in units of a row's scale and falling to 0.
    `ratios` 0 leaves the assignments."""

    steps: int = 200
    candidates: int = 3
    ratios: float = 0.02
    codebooks: float = 0.003
    seed: int = 0

    def __post_init__(self) -> None:
        rates = (self.ratios, self.codebooks)
        if self.steps < 1 or self.candidates < 2 or not all(0 <= rate < float("inf") for rate in rates):
            raise SettingsError(
                f"recovery: steps is {self.steps}, candidates {self.candidates}, ratios {self.ratios}, codebooks "
                f"{self.codebooks}; steps is at least 1, candidates at least 2, the rates finite and not negative"
            )

    def recover(self, task: Task) -> Recovered:
        soft = {
            name: Candidates(packed, task.weights[name], self.candidates)
            for name, packed in task.packed.items()
            if isinstance(packed, PackedCodebook)
        }
        if not soft:
            known = ", ".join(sorted({packed.layout for packed in task.packed.values()}))
            raise SettingsError(
                f"{task.name}: {known} has no assignments to learn, codebooks have; set recovery to null"
            )

        def trained(usual: float) -> dict[str, Packed]:
            with torch.enable_grad():
                self._train(task, soft, usual)
            return {**task.packed, **{name: one.pack() for name, one in soft.items()}}

        return improved(task, trained)

    def rehearse(self, task: Task, batches: int) -> float:
        return rehearsed(self, task, batches)

    def _train(self, task: Task, soft: Mapping[str, Candidates], usual: float) -> None:
        """`usual`: a batch's loss before training."""
        others = {name: packed.dequantize() for name, packed in task.packed.items() if name not in soft}
        ends = int(self.steps * (1 - LAST)) if self.ratios else 0  # from there on all vectors are frozen
        ratios = torch.optim.RMSprop([one.logits for one in soft.values()], lr=self.ratios, alpha=0.9)
        tables = torch.optim.RMSprop(
            [move for one in soft.values() for move in one.moves], lr=self.codebooks, alpha=0.9
        )
        for step, batch in enumerate(in_turn(task.batches, self.steps, self.seed + task.seed)):
            if step == ends:
                for one in soft.values():
                    one.freeze(1.0)
            weights = {**others, **{name: one.weight() for name, one in soft.items()}}
            loss = distance(task, weights, batch)[0] / usual
            if not bool(torch.isfinite(loss)):
                raise SolverError(
                    f"{task.name}: the tuning loss is not finite at step {step}; lower recovery.codebooks, or compute "
                    "in float32"
                )
            task.on_step(step + 1, self.steps, float(loss.detach()))
            ratios.zero_grad()
            tables.zero_grad()
            loss.backward()
            if step < ends:
                ratios.step()
                for one in soft.values():
                    one.freeze(step / ends)
            tables.param_groups[0]["lr"] = self.codebooks * (1 - step / self.steps)
            tables.step()
