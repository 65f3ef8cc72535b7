"""The module that runs a packed matrix, how sites are replaced, and the names their tensors are stored under.

`PackedLinear` stands where a Linear or Conv1D stood and keeps the packed tensors as buffers (`held.py`); its forward is
one call into `kernels.dispatch`. Expert stacks are in `experts.py`.

Stored names: a site `a.b.q_proj` stores `a.b.q_proj.weight`, `.scales`, `.zeros`; a stack `a.experts.gate_up_proj`
stores `a.experts.gate_up_proj`, `_scales`, `_zeros`. The codes always take the float parameter's own name with a shape
of one dimension, so transformers without this package stops with a size mismatch and never runs on random weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.experts import pack_experts
from quant.held import Holder, Slot, register
from quant.kernels.dispatch import matmul
from quant.kernels.layouts import LAYOUTS, Packed
from quant.kernels.reference import Weight
from quant.kernels.spec import Spec
from quant.models.structure import owner_of
from quant.models.walk import Site


def stored_name(site: Site, tensor: str) -> str:
    """The checkpoint's name for one packed tensor of a site."""
    if site.kind == "linear":
        return f"{site.name}.{tensor}"
    return site.name if tensor == "weight" else f"{site.name}_{tensor}"


def stored_weight(site: Site, spec: Spec, tensors: Mapping[str, torch.Tensor]) -> Packed:
    """A site's packed weight, from tensors under their stored names."""
    parts = {key: tensors[stored_name(site, key)] for key in spec.tensors(site.shape)}
    return LAYOUTS[spec.layout].from_tensors(spec, site.shape, parts)


class PackedLinear(Holder):
    """`x [..., in] -> x @ W^T + bias [..., out]` with W packed. The tensors keep their dtypes under `.to(dtype)`."""

    def __init__(
        self, spec: Spec, out_features: int, in_features: int, *, bias: bool, transposed: bool = False
    ) -> None:
        super().__init__()
        self.spec = spec
        self.out_features = out_features
        self.in_features = in_features
        self.transposed = transposed
        register(self, spec, (out_features, in_features), "")
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def slots(self) -> list[Slot]:
        return [self.slot(self.spec, (self.out_features, self.in_features), 0, "")]

    @property
    def operand(self) -> Weight:
        """The weight as it is held."""
        return self.slots()[0].matrix()

    @property
    def packed(self) -> Packed:
        """The weight in the checkpoint's order."""
        return self.slots()[0].packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(x, self.operand, self.bias)

    def unpack(self, dtype: torch.dtype) -> nn.Module:
        """The float module it stands for: a Linear, or a Conv1D where the original was one."""
        weight = self.packed.dequantize(dtype)
        with torch.device("meta"):
            module = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        module.weight = nn.Parameter(weight.T.contiguous() if self.transposed else weight, requires_grad=False)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return module

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec}, bias={self.bias is not None}"


def put_packed(model: nn.Module, site: Site, spec: Spec) -> None:
    """Replaces one site of a float model by its packed module, with tensors still to be filled."""
    owner, leaf = owner_of(model, site.name)
    if site.kind == "experts":
        pack_experts(owner, leaf, spec, site)
        return
    old = owner.get_submodule(leaf)
    parameter: torch.Tensor = old.weight  # pyright: ignore[reportAssignmentType]
    with torch.device(parameter.device):
        new = PackedLinear(spec, site.out, site.inputs, bias=site.bias, transposed=site.transposed)
    if new.bias is not None:
        new.bias.data = new.bias.data.to(parameter.dtype)
    setattr(owner, leaf, new.train(old.training))
