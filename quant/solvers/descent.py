"""Coordinate descent on the codes: what feedback, which looks only forward, left on the table.

With all other columns fixed, `tr(D H DT)` is a parabola in column `i` with its minimum at

    W_i* = Q_i + (D H)_i / H_ii,   D = W - Q,

so the nearest representable value to `W_i*` is the best one and no step can raise the error. (For columns `K` rounded
together, `Q_K + (D H)_K H_KK^-1`; nearest is then an approximation, so `descend` takes rounders of one column only.) A
sweep over all columns costs as much as the feedback itself: `D H` is formed block by block and kept up to date inside
the block. The idea is QuantEase's (arXiv 2309.01885); alternating it with the closed-form scale of `Rounder.refit` is
what pays at 2 and 3 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.solvers.lockstep import laid, put_back
from quant.solvers.rounder import Rounder, in_one_kernel


def descend(
    weight: Tensor, quantized: Tensor, hessian: Tensor, order: Tensor, rounder: Rounder, block: int = 128
) -> Tensor:
    """One sweep over the columns in `order`. `quantized` `[out, in]`, or a stack `[S, rows, in]` (`lockstep.py`): what
    `rounder` holds now; returns what it holds then.

    `hessian` `[in, in]`, or one for each of the stack, positive definite, of `weight`'s dtype.
    """
    H = hessian if hessian.ndim == 3 else laid(laid(hessian, order), order)
    Q = laid(quantized, order)
    D = laid(weight, order) - Q
    kernel = in_one_kernel(rounder, Q)
    inverse = 1 / H.diagonal(dim1=-2, dim2=-1)[..., None]
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        slope = H[..., start:stop, :] @ D
        if kernel:
            part = slice(start, stop)
            Q[part], change = kernel.round_in_turn(order[part], slope, H[part, part], Q[part], inverse[part, 0])
            D[part] -= change
            continue
        for i in range(start, stop):
            held = Q[..., i, :]
            best = torch.addcmul(held, slope[..., i - start, :], inverse[..., i, :])
            rounded = rounder.round(order[i : i + 1], best.reshape(-1, 1)).view(held.shape)
            step = held - rounded  # D's change
            slope.addcmul_(H[..., start:stop, i, None], step[..., None, :])
            D[..., i, :] += step
            Q[..., i, :] = rounded
    return put_back(Q, order)
