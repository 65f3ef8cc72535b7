"""The rounder of codebooks: a column at a time, in vectors along the outputs (VPTQ, arXiv 2409.17066).

k-means on the scaled weight, each value counted as its input's mean square times its row's scale squared, makes the
codebook; feedback then corrects after every column, as a vector lies in one. With all other columns fixed, rows do not
know of each other, so the nearest vector is the exact best one in descent too (with a second codebook: the best of the
pairs that begin with one of the `BEAM` nearest, and never worse than the pair it replaces).

Given the indices the weight is linear in the codebooks, so `refit` has the best ones from a linear system. Its matrix
is never formed: a few steps of conjugate gradients, each one product with the Hessian, come close enough.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding

from quant.kernels.codebook import Codebook, PackedCodebook, codebook_for
from quant.kernels.packed import Packed
from quant.kernels.scales import scale_codes, scale_values
from quant.solvers.kmeans import kmeans, nearest, nearest_pair
from quant.solvers.rounder import Rehearsal, refitted

STEPS = 4  # of conjugate gradients; more change nothing
WIDER = 1.15  # feedback adds to what a column holds
HEADROOM = 2**0.25  # what `refit` may add to a group's largest scale


class CodebookRounder:
    """Indices of vectors; see the module. `index` int64 `[2, vector rows, in]`: each into its table, the tables of all
    groups laid end to end. `fine`: the columns that have a second index."""

    granularity = 1

    def __init__(self, spec: Codebook, shape: tuple[int, int], device: torch.device) -> None:
        self.spec, self.shape, self.span = codebook_for(spec, shape), shape, shape[1]
        spec, rows = self.spec, torch.arange(shape[0], device=device)
        vectors = spec.vectors(shape[0])
        ends = torch.tensor([0, *vectors], device=device).cumsum(0)
        self.group = rows // spec.rows
        self.place = ends[self.group] * spec.length + rows % spec.rows  # of each row, in vectors laid end to end
        self.ranges = list(pairwise(ends.tolist()))
        bits = [bits for bits in (spec.index_bits, spec.second_bits) if bits]
        self.tables = [torch.zeros((len(vectors), 1 << b, spec.length), device=device) for b in bits]
        owner = torch.arange(len(vectors), device=device).repeat_interleave(torch.tensor(vectors, device=device))
        self.offsets = [(owner << b)[:, None] for b in bits]  # where each vector row's table begins
        self.index = torch.zeros((2, sum(vectors), shape[1]), dtype=torch.long, device=device)
        self.fine = torch.zeros(shape[1], dtype=torch.bool, device=device)
        self.peaks = torch.zeros(len(vectors), dtype=torch.float16, device=device)
        self.rounded = set[int]()
        self._scale(torch.zeros(shape[0], dtype=torch.uint8, device=device))

    @classmethod
    def of(cls, packed: PackedCodebook) -> CodebookRounder:
        """The rounder as it was when it packed this."""
        made = cls(packed.spec, packed.shape, packed.device)
        tensors, fine = packed.tensors(), packed.fine(0)
        made.tables = [tensors[name].float() for name in ("codebook", "second") if name in tensors]
        made.peaks = tensors["peaks"]
        made.fine = made.fine.index_fill(0, fine, True)
        first, second = packed.indices()
        made.index[0] = first
        made.index[1][:, fine] = second.long()
        made._scale(tensors["scales"])
        return made

    def fit(self, start: int, weight: Tensor, importance: Tensor, rehearsal: Rehearsal | None = None) -> None:
        share = importance.float() / importance.sum().clamp_min(1e-30)
        scales = (weight.float().square() @ share).sqrt() * WIDER
        top = torch.zeros_like(self.peaks, dtype=torch.float32).scatter_reduce_(0, self.group, scales, "amax")
        self.peaks = (top * HEADROOM).clamp_max(torch.finfo(torch.float16).max).half()
        self._scale(scale_codes(scales, self.peaks[self.group]))
        ranked = importance.sort(descending=True, stable=True)[1]
        self.fine = torch.zeros_like(self.fine).index_fill_(0, ranked[: self.spec.finer(self.shape[1])], True)
        x = self.vectors(weight.float() * (WIDER * self.inverse)[:, None])
        counts = self.vectors(self.energy[:, None] * share)
        for group, (first, last) in enumerate(self.ranges):
            part, count = x[first:last], counts[first:last]
            for number, table in enumerate(self.tables):
                if number:  # what the first codebook leaves in the columns that have a second index
                    part, count, before = part[:, self.fine], count[:, self.fine], self.tables[0][group]
                    part = part - before[nearest(part.flatten(0, 1), count.flatten(0, 1), before)].view_as(part)
                table[group] = kmeans(part.flatten(0, 1), count.flatten(0, 1), table.shape[1]).half().float()

    def round(self, columns: Tensor, values: Tensor) -> Tensor:
        column = int(columns)
        x, counts = (self.vectors(v)[:, 0] for v in (values * self.inverse[:, None], self.energy[:, None]))
        rounded = torch.empty_like(x)
        for group, (first, last) in enumerate(self.ranges):
            tables = [table[group] for table in self.tables]
            part, count, held = x[first:last], counts[first:last], self.index[:, first:last, column]
            if len(tables) > 1 and bool(self.fine[column]):
                held[:] = nearest_pair(part, count, tables[0], tables[1], held if column in self.rounded else None)
                rounded[first:last] = tables[0][held[0]] + tables[1][held[1]]
            else:
                held[0] = nearest(part, count, tables[0])
                rounded[first:last] = tables[0][held[0]]
        self.rounded.add(column)
        return (rounded.flatten()[self.place] * self.scales)[:, None]

    def refit(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The codebooks, kept if they help, and then each row's scale, that minimise `tr(D H DT)`."""
        weight, old = weight.float(), self.tables
        before = self._lost(weight, hessian)
        self.tables = [table.half().float() for table in self._solved(weight, hessian)]
        if self._lost(weight, hessian) > before:
            self.tables = old
        A = self.levels(self.tables)
        pulled = A @ hessian
        gain, curve = (pulled * weight).sum(1), (pulled * A).sum(1)
        best = gain / torch.where(curve > 0, curve, torch.inf)
        self._scale(refitted(self.codes, best, self.peaks[self.group]))
        return A * self.scales[:, None]

    def pack(self) -> Packed:
        tensors = {name: t.half() for name, t in zip(("codebook", "second"), self.tables, strict=False)}
        tensors |= {"scales": self.codes, "peaks": self.peaks}
        fine, (first, second) = self.fine.nonzero()[:, 0], self.index.int()
        return PackedCodebook.from_indices(self.spec, self.shape, first, second[:, fine], fine, tensors)

    def _scale(self, codes: Tensor) -> None:
        """The rows' scales, `codes` uint8 `[out]`; and of each its inverse and what its errors count."""
        self.codes, self.scales = codes, scale_values(codes, self.peaks[self.group])
        self.inverse = torch.where(self.scales > 0, 1 / self.scales, 0.0)
        self.energy = self.scales.square() / self.scales.square().mean().clamp_min(1e-30)

    def _solved(self, weight: Tensor, hessian: Tensor) -> list[Tensor]:
        """The tables, moved by conjugate gradients towards the best ones."""
        found = self.tables
        slope = self._gathered((weight - self.levels(found) * self.scales[:, None]) @ hessian)
        curve = self._gathered(self.scales[:, None] * hessian.diagonal())  # of each entry alone
        ease = [1 / torch.where(c > 0, c, torch.inf) for c in curve]
        step = [g * e for g, e in zip(slope, ease, strict=True)]
        size = _dot(slope, step)
        for _ in range(STEPS):
            bent = self._gathered((self.levels(step) * self.scales[:, None]) @ hessian)
            length = size / max(_dot(step, bent), 1e-30)
            found = [f + length * s for f, s in zip(found, step, strict=True)]
            slope = [g - length * b for g, b in zip(slope, bent, strict=True)]
            down = [g * e for g, e in zip(slope, ease, strict=True)]
            size, before = _dot(slope, down), size
            step = [d + size / max(before, 1e-30) * s for d, s in zip(down, step, strict=True)]
        return found

    def _lost(self, weight: Tensor, hessian: Tensor) -> float:
        D = weight - self.levels(self.tables) * self.scales[:, None]
        return float((D @ hessian).mul_(D).sum(dtype=torch.float64))

    def levels(self, tables: list[Tensor]) -> Tensor:
        """Unscaled rows `[out, in]` that the indices stand for, differentiable in the tables."""
        return self.completed(embedding(self.index[0] + self.offsets[0], tables[0].flatten(0, 1)), tables)

    def completed(self, levels: Tensor, tables: list[Tensor]) -> Tensor:
        """Unscaled rows `[out, in]`, of what vectors take of the first table `[vector rows, in, length]`."""
        if len(tables) > 1:
            fine = self.fine.nonzero()[:, 0]
            levels = levels.index_add(1, fine, self.second(tables))
        return levels.transpose(1, 2).flatten(0, 1)[self.place]

    def second(self, tables: list[Tensor]) -> Tensor:
        """What vectors take of the second table, `[vector rows, columns that have a second index, length]`."""
        index = (self.index[1] + self.offsets[1])[:, self.fine.nonzero()[:, 0]]
        return embedding(index, tables[1].flatten(0, 1))

    def _gathered(self, matrix: Tensor) -> list[Tensor]:
        """What each entry of the tables gathers of `matrix` `[out, in]`: the transpose of the scaled `levels`."""
        vectors, sums = self.vectors(matrix * self.scales[:, None]), list[Tensor]()
        for number, table in enumerate(self.tables):
            columns = self.fine if number else slice(None)
            index = (self.index[number][:, columns] + self.offsets[number]).flatten()
            flat = torch.zeros_like(table).flatten(0, 1)
            sums.append(flat.index_add_(0, index, vectors[:, columns].flatten(0, 1)).view_as(table))
        return sums

    def vectors(self, matrix: Tensor) -> Tensor:
        """`[out, k]` as vectors `[vector rows, k, length]`, zero where a vector is longer than its rows."""
        laid = matrix.new_zeros((self.index.shape[1] * self.spec.length, matrix.shape[1]))
        laid[self.place] = matrix
        return laid.unflatten(0, (-1, self.spec.length)).transpose(1, 2)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y).sum()) for x, y in zip(a, b, strict=True))
