"""Block Hadamard transform with random signs: an orthonormal change of basis that spreads outliers over a whole block.

    y = H s x   and back   x = s H^T y,     H = (F (x) W) / sqrt(block)

on each block of the last dimension, `s` a vector of signs. `W` is the Walsh-Hadamard matrix of a power of two, applied
as `log2` rounds of sums and differences, and `F` a Hadamard matrix of order 12, 20, 28 or 36 (Paley, J. Math. Phys. 12,
1933) for dimensions that no large power of two divides: 5120 = 4 x 20 x 64, 1152 = 36 x 32. Rotating weights and
activations like this before quantizing them: QuIP# (arXiv 2402.04396), QuaRot (arXiv 2404.00456).

The torch path, the loop for CPUs (`paths.py`) and the Triton kernel (`butterflies.py`) do the same operations in the
same order, so they agree bit for bit. The kernel reads and writes each value once and takes 8 to 28 instructions for
it, by block and dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant.kernels.available import runs_triton, transformed

FACTORS = {1: 0, 12: 11, 20: 19, 28: 13, 36: 17}
"""Orders of `F`, each with the prime that Paley's construction makes it from."""
LARGEST = 2048  # of W: what one warp holds in registers
TILE = 1 << 14  # of F (x) W, with F's order padded to a power of two: what one program holds in registers


def hadamard(x: Tensor, block: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """`x` `[..., n]`, any float dtype and strides, transformed in blocks of `block`; same shape and dtype, contiguous.

    `signs` `[n]` of +-1, any dtype: multiplied before the transform, and after the inverse one. Float32 arithmetic
    inside (float64 for float64). Differentiable. Raises `ValueError` on a block that has no matrix or does not divide
    `n`.
    """
    split_order(block)
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] % block:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; floats with a last dimension of blocks of {block} expected")
    if signs is not None and (signs.shape != x.shape[-1:] or signs.device != x.device):
        raise ValueError(f"signs {list(signs.shape)} on {signs.device}; {x.shape[-1]} on {x.device} are expected")
    return (reference if transformed() else torch.ops.bitwright.hadamard)(x, block, signs, inverse)


def reference(x: Tensor, block: int, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """`hadamard` in plain torch, for every device and dtype."""
    factor, size = split_order(block)
    work = x if x.dtype == torch.float64 else x.float()
    if signs is not None and not inverse:
        work = work * signs
    work = work.unflatten(-1, (-1, factor, size))
    if factor > 1:
        table = _table(factor, inverse, x.device).to(work.dtype)
        parts = (table[:, j, None] * work[..., j, None, :] for j in range(factor))
        work = sum(parts, start=torch.zeros(()))  # one after another, as the kernel adds them
    half = 1
    while half < size:
        even, odd = work.unflatten(-1, (-1, 2, half)).unbind(-2)
        work = torch.stack((even + odd, even - odd), -2).flatten(-3)
        half *= 2
    work = work.flatten(-3) * block**-0.5
    return (work if signs is None or not inverse else work * signs).to(x.dtype)


def block_for(n: int, largest: int = 128) -> int:
    """The largest block up to `largest` that divides `n`; 1, where only the signs do anything, for most odd `n`."""
    orders = (factor << k for factor in FACTORS for k in range(LARGEST.bit_length()))
    return max(order for order in orders if order <= largest and n % order == 0 and _fits(order))


def random_signs(n: int, seed: int) -> Tensor:
    """+-1 int8 `[n]`, the same on every device."""
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8) * 2 - 1


def split_order(block: int) -> tuple[int, int]:
    """`(order of F, order of W)`. Raises `ValueError` on a block for which there is none."""
    if not _fits(block):
        raise ValueError(f"block is {block}; a power of two to {LARGEST}, or 12, 20, 28 or 36 times one, is expected")
    size = block & -block
    factor = block // size
    return (1, size) if factor == 1 else (4 * factor, size // 4)


def paley(order: int) -> Tensor:
    """The Hadamard matrix of an order in `FACTORS` but 1: +-1 int8 `[order, order]`, rows orthogonal."""
    prime = FACTORS[order]
    character = torch.full((prime,), -1, dtype=torch.int8)  # 1 for squares, -1 for the others, 0 for 0
    character[[i * i % prime for i in range(prime)]] = 1
    character[0] = 0
    index = torch.arange(prime)
    core = torch.zeros((prime + 1, prime + 1), dtype=torch.int8)
    core[1:, 1:] = character[(index[:, None] - index) % prime]
    core[0, 1:] = 1
    core[1:, 0] = 1 if prime % 4 == 1 else -1
    eye = torch.eye(prime + 1, dtype=torch.int8)
    if prime % 4 == 3:
        return core + eye
    twos = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.int8)
    return torch.kron(core, twos[0]) + torch.kron(eye, twos[1])


def _fits(block: int) -> bool:
    size = max(1, block) & -max(1, block)
    factor = block // size
    if factor == 1:
        return 1 <= block <= LARGEST
    return 4 * factor in FACTORS and size >= 4 and (size // 4) << (4 * factor).bit_length() <= TILE


@cache
def _table(factor: int, inverse: bool, device: torch.device) -> Tensor:
    table = paley(factor).float()
    return (table.T if inverse else table).contiguous().to(device)


@torch.library.custom_op("bitwright::hadamard", mutates_args=())
def _operator(x: Tensor, block: int, signs: Tensor | None, inverse: bool) -> Tensor:
    """See `hadamard`. One operator, so that torch.compile sees a shape and a gradient and nothing else."""
    if x.dtype == torch.float64 or not x.numel() or not runs_triton(x):
        plain = _on_cpu if x.device.type == "cpu" and x.numel() else reference
        return plain(x, block, signs, inverse).contiguous()
    from quant.kernels.butterflies import launch

    factor, size = split_order(block)
    table = None if factor == 1 else _table(factor, inverse, x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(x.reshape(-1, x.shape[-1]), out, size, table, None if signs is None else signs.contiguous(), inverse)
    return out


def _on_cpu(x: Tensor, block: int, signs: Tensor | None, inverse: bool) -> Tensor:
    from quant.kernels.paths import rotate

    factor, size = split_order(block)
    work = (x if x.dtype == torch.float64 else x.float()).reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(work)
    known = torch.ones(x.shape[-1]) if signs is None else signs
    tables = known.to(work.dtype), torch.ones((1, 1)) if factor == 1 else _table(factor, inverse, x.device)
    arrays = (work.numpy(), *(table.to(work.dtype).contiguous().numpy() for table in tables))
    rotate(*arrays, size, inverse, arrays[0].dtype.type(block**-0.5), out.numpy())
    return out.view(x.shape).to(x.dtype)


@_operator.register_fake
def _(x: Tensor, block: int, signs: Tensor | None, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.block, signs, ctx.inverse = inputs[1:]
    ctx.save_for_backward(signs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of an orthonormal map is its inverse."""
    return torch.ops.bitwright.hadamard(grad, ctx.block, *ctx.saved_tensors, not ctx.inverse), None, None, None


_operator.register_autograd(_backward, setup_context=_keep)
