"""What the tests of products by every kind of packed weight share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels.layouts import Packed


def some(tokens: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn((tokens, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_many_tokens(module: Any, packed: Packed, held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight `[70, 40]`, `held` in kernel order: decoded and left to torch, in slices; inputs of any strides;
    gradients. `module`: what launches its kernels."""
    x, bias = some(6, 40, torch.float16), some(1, 70, torch.float16, 2)[0]
    expected = module.matmul(x, held, bias)
    assert torch.equal(module.matmul(x.view(2, 3, 40), held, bias), expected.view(2, 3, 70))
    assert torch.equal(module.matmul(x.T.contiguous().T, held, bias), expected)
    assert module.matmul(x[:0], held).shape == (0, 70)
    with pytest.raises(ValueError, match="last dimension must be 40"):
        module.matmul(x[:, :39], held)
    assert "float32" in str(module.refuses(x.float(), held))
    monkeypatch.setattr(module, "UNPACK_FROM", 0)
    many = module.matmul(x.requires_grad_(), held, bias.requires_grad_())
    exact = x.double() @ packed.dequantize(torch.float16).double().T + bias
    allowed = 2.0**-8 * (x.double().abs() @ packed.dequantize(torch.float64).abs().T + 1)
    assert bool(((many - exact).abs() <= allowed).all())
    upstream = some(6, 70, torch.float16, 3)
    grads = torch.autograd.grad(many, (x, bias), upstream)
    torch.testing.assert_close(grads[0], upstream @ packed.dequantize(torch.float16))
    torch.testing.assert_close(grads[1], upstream.sum(0))
