"""Two sets of images compared as clouds of features: Fréchet distance, precision and recall.

The Fréchet distance between Gaussians fitted to both clouds (Heusel et al., arXiv:1706.08500; "FID" when the features
are those of one certain Inception network) is `|m - m'|² + tr(S + S' - 2 (S S')^1/2)`. With few samples it is biased
upwards by about the number of features over the number of samples, so it is only comparable at the same count, which
stands beside it. Precision and recall are those of Kynkäänniemi et al. (arXiv:1904.06991): the share of made samples
that fall into a ball around a real one which reaches to its third neighbour, and the other way round.

`N`, `M` samples, `F` features; covariances divide by N - 1; all in float64.
"""

from __future__ import annotations

import torch

NEIGHBOURS = 3


def frechet(made_NF: torch.Tensor, real_MF: torch.Tensor) -> float:
    """The Fréchet distance, 0 for equal clouds (up to 1e-6 of the traces, by rounding)."""
    mean, cov = _gaussian(made_NF)
    mean0, cov0 = _gaussian(real_MF)
    root = _root(cov)
    # S S' has the eigenvalues of the symmetric S^1/2 S' S^1/2
    cross = torch.linalg.eigvalsh(root @ cov0 @ root).clamp_min(0).sqrt().sum()
    distance = (mean - mean0).square().sum() + cov.trace() + cov0.trace() - 2 * cross
    return max(0.0, float(distance))


def precision_recall(
    made_NF: torch.Tensor, real_MF: torch.Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float] | None:
    """Precision and recall in [0, 1]; None where there are too few samples to have so many neighbours."""
    if min(len(made_NF), len(real_MF)) <= neighbours:
        return None
    made, real = made_NF.double(), real_MF.double()
    between_NM = _distances(made, real)
    precision = (between_NM <= _reach(real, neighbours)).any(1)
    recall = (_reach(made, neighbours) >= between_NM.T).any(1)
    return float(precision.double().mean()), float(recall.double().mean())


def _gaussian(x_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x_NF.double()
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / max(1, len(x) - 1)


def _root(cov_FF: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(cov_FF)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _reach(x_NF: torch.Tensor, neighbours: int) -> torch.Tensor:
    """`[N]`: how far each sample's `neighbours`-th neighbour lies; the sample itself is the nearest of all."""
    return _distances(x_NF, x_NF).kthvalue(neighbours + 1, dim=1).values


def _distances(x_NF: torch.Tensor, y_MF: torch.Tensor) -> torch.Tensor:
    # by differences: the shorter way over scalar products leaves 1e-8 instead of 0 between equal samples
    return torch.cdist(x_NF, y_MF, compute_mode="donot_use_mm_for_euclid_dist")
