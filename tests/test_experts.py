"""Expert stacks: what their module's own code sees, in the checkpoint's order and in that of the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quant.experts import PackedExpert, PackedExperts, PackedStack, pack_experts
from quant.held import Holder
from quant.kernels import dispatch, launch
from quant.kernels.available import INTERPRET
from quant.kernels.layouts import PackedUniform
from quant.kernels.spec import Spec, Uniform
from quant.linear import put_packed
from quant.models.walk import Site
from tests.architectures import batch, make
from tests.rerun import rerun

EXPERTS, WIDTH, INNER = 3, 48, 40


class Mixture(nn.Module):
    """Its experts are stored `[out, in]` or `[in, out]`, and multiplied as transformers multiplies either."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        shape = (EXPERTS, WIDTH, INNER) if transposed else (EXPERTS, INNER, WIDTH)
        self.up = nn.Parameter(torch.zeros(shape), requires_grad=False)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        bias = torch.ones(INNER, dtype=x.dtype)
        if self.transposed:
            return torch.stack([x @ self.up[i] + bias for i in which])
        return torch.stack([linear(x, self.up[i], bias) for i in which])


class Delegating(Mixture):
    """Leaves the work to a method of its own, as diffusers' Nucleus does."""

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        return self.one_by_one(x, self.known(which))

    def known(self, which: Tensor) -> Tensor:
        assert not super().extra_repr()  # a method that no view of the module could call
        self.seen = which
        return which

    def one_by_one(self, x: Tensor, which: Tensor) -> Tensor:
        if self.transposed:
            return torch.stack([x @ self.up[i] + 1 for i in which])
        return torch.stack([linear(x, self.up[i]) + 1 for i in which])


def filled(owner: Any, leaf: str, spec: Spec, site: Site) -> PackedUniform:
    """Packs a stack and fills it with random codes."""
    draw = torch.Generator().manual_seed(len(leaf))
    assert isinstance(spec, Uniform)
    rows, groups = site.shape[0], spec.groups(site.shape[1])
    codes = torch.randint(0, 2**spec.bits, site.shape, generator=draw, dtype=torch.uint8)
    scales = ((0.5 + torch.rand((rows, groups), generator=draw)) * 0.3 / 2**spec.bits).half()
    zeros = torch.randint(0, 2**spec.bits, (rows, groups), generator=draw, dtype=torch.uint8)
    packed = PackedUniform.from_codes(spec, site.shape, codes, scales, zeros)
    owner.load_state_dict({leaf if k == "weight" else f"{leaf}_{k}": t for k, t in packed.tensors().items()}, False)
    return packed


def mixture(transposed: bool, bits: int = 3, kind: type[Mixture] = Mixture) -> tuple[Any, PackedUniform]:
    module, spec = kind(transposed), Uniform(bits=bits, group_size=32)
    site = Site("up", "experts", INNER, WIDTH, experts=EXPERTS, transposed=transposed)
    pack_experts(module, "up", spec, site)
    return module, filled(module, "up", spec, site)


@pytest.mark.parametrize("kind", [Mixture, Delegating])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_is_the_float_parameter_to_its_module(transposed: bool, kind: type[Mixture]) -> None:
    module, packed = mixture(transposed, kind=kind)
    whole = packed.dequantize().unflatten(0, (EXPERTS, -1))
    x, which = torch.randn(5, WIDTH), torch.tensor([2, 0])
    expected = torch.stack([linear(x, whole[i]) + 1 for i in which])
    torch.testing.assert_close(module(x, which), expected)
    stack = PackedStack(module.slots()[0], transposed, torch.float32)
    stored = whole.mT if transposed else whole
    assert stack.shape == tuple(stored.shape)
    assert torch.equal(torch.bmm(x.expand(EXPERTS, -1, -1), stack if transposed else stack.mT), x @ whole.mT)  # pyright: ignore[reportArgumentType]
    module.unpack(torch.float32)
    assert type(module) is kind
    assert torch.equal(module.up, stored)


def test_under_the_interpreter() -> None:
    rerun(__file__)


def arranged(module: Any) -> list[bool]:
    return [slot.arranged for part in module.modules() if isinstance(part, Holder) for slot in part.slots()]


@pytest.mark.parametrize("transposed", [False, True])
def interpreted_experts_multiply_in_kernel_order(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, packed = mixture(transposed)
    assert arranged(module) == [True]  # loading settles it
    module.half()
    assert module.up.shape[0] == EXPERTS
    for key, tensor in packed.tensors().items():
        assert torch.equal(module.state_dict()["up" if key == "weight" else f"up_{key}"], tensor)
    module.load_state_dict(module.state_dict())  # which is in the checkpoint's order
    x, which = torch.randn(5, WIDTH).half(), torch.tensor([2, 0, 2])
    whole = packed.dequantize(torch.float64).unflatten(0, (EXPERTS, -1))
    exact = torch.stack([linear(x.double(), whole[i]) + 1 for i in which])
    with monkeypatch.context() as patch:
        patch.setattr(PackedExpert, "dequantize", None)
        patch.setenv(dispatch.VARIABLE, "triton")
        found = module(x, which)
    # two roundings to float16, of the product and of the sum, and those of float32 on the way
    size = x.double().abs() @ whole[which].abs().mT + 1
    assert bool(((found.double() - exact).abs() <= 2.0**-10 * size).all())
    expert = PackedStack(module.slots()[0], transposed, torch.float16)[1]
    matrix = whole[1].mT if transposed else whole[1]
    assert expert.shape == matrix.shape
    assert torch.equal(expert.float(), matrix.half().float())
    assert torch.equal(torch.add(expert, 1), matrix.half() + 1)
    monkeypatch.delenv(INTERPRET)
    module.to("cpu")
    assert arranged(module) == [False]
    assert torch.equal(module.slots()[0].packed.dequantize(), packed.dequantize())


def interpreted_mixtral_is_the_same_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec, calls = make("mixtral").half(), Uniform(bits=4, group_size=32), list[int]()
    for index, layer in enumerate(model.model.layers):
        for leaf in ("gate_up_proj", "down_proj"):
            experts, rows, columns = getattr(layer.mlp.experts, leaf).shape
            site = Site(f"model.layers.{index}.mlp.experts.{leaf}", "experts", rows, columns, experts=experts)
            put_packed(model, site, spec)
            filled(layer.mlp.experts, leaf, spec, site)
        assert isinstance(layer.mlp.experts, PackedExperts)
    assert all(arranged(model))
    ids, real = batch(1, 2), launch.matmul

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(len(x))
        return real(x, *rest)

    table = tuple(replace(row, run=counted) if row.name == "triton" else row for row in dispatch.KERNELS)
    monkeypatch.setattr(dispatch, "KERNELS", table)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for kernel in ("triton", "torch"):
            monkeypatch.setenv(dispatch.VARIABLE, kernel)
            found[kernel] = model(**ids).logits.double()
            monkeypatch.delenv(INTERPRET, raising=False)  # unpacking is slow under the interpreter
        exact = model.float()(**ids).logits.double()
    assert sum(calls) == 2 * 2 * 2 * 2  # layers, stacks, experts of a token, tokens
    wrong = {kernel: float((logits - exact).abs().max()) for kernel, logits in found.items()}
    assert 0 < wrong["triton"] <= 2 * wrong["torch"]  # one rounding to float16 for each product either way
