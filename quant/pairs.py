"""How errors in two rows that share bits count together, from the gradients that say what each costs (`fisher.py`).

    A = mean of G VT V GT,   G the gradient of a weight, V the factor of its inputs' Hessian,

is one of the two factors by which YAQA (arXiv 2505.22988) approximates what errors cost, the Hessian the other. It is
kept among the rows of a sequence alone, so it is small beside the weight: a byte for each row and each that shares bits
with it, and only where it is of use. It is kept as correlations `A_ij / sqrt(A_ii A_jj)`, by as much as two halves of
the text agree on them. With `c` the cosine between those of one half and of the other, `2 c / (1 + c)` of what the
whole text shows would be seen again (Spearman, Brown, 1910); the rest is chance, to which codes would be fitted. Less
than half is not worth a search. More than 0.6 is not taken: with 0.9 KL is as low on text of the calibration's kind,
and 2 to 7 % higher on other text (two models, validation text). An expert sees too few tokens for any of this.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.models.walk import Site

AGREED = 0.5
TRUSTED = 0.6
LONGEST = 512  # rows that share bits; `A` and a search's steps grow with their square
UNIT = 127

Factors = Mapping[int, tuple[Tensor, Tensor]]  # by expert: order of the columns and `V`


class Pairs:
    """`A` of a site, among each `length` rows, summed over either half of the text."""

    def __init__(self, site: Site, length: int, device: torch.device) -> None:
        self.site, self.length = site, min(length, site.out)
        shape = (2, max(1, site.experts), -(-site.out // self.length), self.length, self.length)
        self.halves = torch.zeros(shape, device=device)

    def add(self, gradient: Tensor, factors: Factors, half: int) -> None:
        """`gradient` `[out, in]`, or of all experts. An expert that saw no token has no factor, and no gradient."""
        for number, G in enumerate(gradient.reshape(-1, self.site.out, self.site.inputs)):
            if number in factors:
                order, V = factors[number]
                shaped = G.float()[:, order] @ V.T
            else:
                shaped = G.float()
            if self.length == 1:
                self.halves[half, number] += shaped.square().sum(1)[:, None, None]
                continue
            spare = self.halves.shape[2] * self.length - len(shaped)
            parts = pad(shaped, (0, 0, 0, spare)).view(-1, self.length, shaped.shape[1])
            self.halves[half, number].baddbmm_(parts, parts.mT)

    def rows(self) -> Tensor:
        """`A_ii`, float32 `[rows of all experts]`."""
        return self._flat(self.halves.diagonal(dim1=-2, dim2=-1).sum(0).flatten(1))

    def correlations(self) -> Tensor | None:
        """Int8 `[rows, length]`, in 127ths: of each row with those of its sequence, 1 with itself, and 0 beyond the
        last; None where too little of them is seen again."""
        if self.length == 1 or self.site.experts:
            return None
        first, second, both = (_correlations(A) for A in (*self.halves, self.halves.sum(0)))
        dot = lambda a, b: float((a * b).sum(dtype=torch.float64))  # noqa: E731
        norms = dot(first, first) * dot(second, second)
        agreement = dot(first, second) / norms**0.5 if norms > 0 else 0.0
        share = min(2 * agreement / (1 + agreement), TRUSTED) if agreement > 0 else 0.0
        if share < AGREED:
            return None
        both.mul_(share).diagonal(dim1=-2, dim2=-1).fill_(1)
        return self._flat(both.mul_(UNIT).round_().to(torch.int8).flatten(1, 2))

    def _flat(self, of_each: Tensor) -> Tensor:
        """`[experts, padded rows, ...]` as one expert's rows after another's."""
        return of_each[:, : self.site.out].flatten(0, 1).cpu()


def _correlations(A: Tensor) -> Tensor:
    """Those of different rows; 0 where nothing is known."""
    deviation = A.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(deviation > 0, 1 / deviation, 0.0)
    found = A * inverse[..., None] * inverse[..., None, :]
    found.diagonal(dim1=-2, dim2=-1).zero_()
    return found
