"""Packed products in a larger whole: torch.compile, autocast, gradients, fake devices, and what cannot run."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.functional import linear

import quant
from quant.kernels import available, counters, dispatch, integer, integer_launch, launch, measure, scales, trellis
from quant.kernels.dispatch import KernelError, explain, matmul
from quant.kernels.hadamard import hadamard, random_signs
from quant.kernels.layouts import PackedUniform
from quant.kernels.order import Arranged, arrange
from quant.kernels.spec import DTYPES, Codebook, Rotated, Spec, Trellis, Uniform
from quant.linear import PackedLinear
from tests.rerun import rerun
from tests.test_kernels import some_packed

COLUMNS = 64


def layer(bits: int = 4, rows: int = 24) -> PackedLinear:
    """Random, of about unit gain."""
    packed = some_packed(Uniform(bits=bits, group_size=32), (rows, COLUMNS))
    module = PackedLinear(packed.spec, rows, COLUMNS, bias=True)
    scales = packed.scales / (8 * 2**bits)
    module.load_state_dict({**packed.tensors(), "scales": scales, "bias": torch.randn(rows)})
    return module


class Graphs:
    """A backend of torch.compile that runs what it is given and counts it; with `ops`, what the last graph called."""

    def __init__(self) -> None:
        self.count, self.ops = 0, list[str]()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        self.ops = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return graph.forward


def compiled(call: Any, graphs: Graphs, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(call, backend=graphs, fullgraph=True, **options)


def test_a_layer_in_the_order_of_the_checkpoint_is_one_graph() -> None:
    module, graphs, x = layer(), Graphs(), torch.randn(3, 5, COLUMNS)
    assert torch.equal(compiled(module, graphs)(x), module(x))
    assert graphs.count == 1
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


def test_a_compiled_trellis_makes_no_tables() -> None:
    """They are constants of the graph, also where nothing was run before it was compiled."""
    module, graphs, x = turned(Trellis(bits=2, window=12), (True, False)), Graphs(), torch.randn(3, COLUMNS)
    trellis._values.cache_clear()
    scales._table.cache_clear()
    assert torch.equal(compiled(module, graphs)(x), module(x))
    assert not any("stack" in op for op in graphs.ops)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


def test_compiled_experts_run_as_they_are(packed_moe: Path) -> None:
    """Which of them are hit is data: what is around them is compiled, in two parts."""
    layer, graphs, x = quant.load(packed_moe).model.layers[0].mlp, Graphs(), torch.randn(1, 5, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend=graphs)(x), layer(x))
    assert graphs.count <= 2


def turned(spec: Spec, sides: tuple[bool, bool]) -> PackedLinear:
    """A layer in a basis of which `sides`, that of the inputs and that of the outputs, are rotated."""
    rows, promised = 24, Rotated(spec, outputs=True).tensors((24, COLUMNS))
    stored = {k: torch.randint(0, 200, t.shape).to(torch.uint8) for k, t in promised.items() if t.dtype == "uint8"}
    stored |= {k: torch.rand(t.shape).to(DTYPES[t.dtype]) / 64 for k, t in promised.items() if k not in stored}
    module = PackedLinear(Rotated(spec, outputs=True), rows, COLUMNS, bias=True)
    module.load_state_dict({**stored, "rotation": torch.tensor(sides).byte(), "bias": torch.randn(rows)})
    return module


BASES = (Uniform(group_size=32), Uniform(group_size=32, symmetric=True, activations=8), Trellis(bits=2))
of_torch = pytest.mark.filterwarnings(  # its own ways; and of a cache, of tables that never change
    "ignore:Dynamo detected a call to a `functools.lru_cache`",
    "ignore:.*(should not be instantiated|torch.jit.script):DeprecationWarning",
)


@of_torch
@pytest.mark.parametrize("spec", BASES, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_one_graph_serves_whatever_side_is_rotated(spec: Spec, grad: bool) -> None:
    run = compiled(lambda module, x: module(x), Graphs(), dynamic=True)
    for tokens, sides in enumerate([(True, True), (True, False), (False, True), (False, False)], 2):
        module, x = turned(spec, sides), torch.randn(3, tokens, COLUMNS, requires_grad=grad)
        assert torch.equal(run(module, x), module(x))
        if grad:
            found, expected = (torch.autograd.grad(call(x).sum(), x) for call in (partial(run, module), module))
            assert torch.equal(found[0], expected[0])


@of_torch
@pytest.mark.parametrize("spec", BASES, ids=str)
@pytest.mark.parametrize("compiles", [False, True])
def test_derivatives_are_carried_forward_too(spec: Spec, compiles: bool) -> None:
    """The product is linear, so it is its own derivative; rounding the inputs has that of no rounding."""
    torch._dynamo.reset()
    module, x, along = turned(spec, (True, True)), torch.randn(3, COLUMNS), torch.randn(3, COLUMNS)
    weight, call = module.packed.dequantize(), lambda x, along: torch.func.jvp(module, (x,), (along,))
    run: Any = torch.compile(call, backend="eager") if compiles else call
    out, found = run(x, along)
    torch.testing.assert_close(found, along @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out, module(x), rtol=1e-5, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual: Any = torch.autograd.forward_ad.unpack_dual(module(torch.autograd.forward_ad.make_dual(x, along)))
        torch.testing.assert_close(dual.tangent, found)


@of_torch
@pytest.mark.parametrize("spec", BASES, ids=str)
def test_transforms_of_functions(spec: Spec) -> None:
    module, x = turned(spec, (True, True)), torch.randn(3, COLUMNS)
    weight = module.packed.dequantize()
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(module)(x[0]), weight, rtol=1e-4, atol=1e-4)
    curved = torch.func.hessian(lambda x: module(x).square().sum())(x[0])
    torch.testing.assert_close(curved, 2 * weight.T @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.func.vmap(module)(x), module(x))


def test_a_model_is_one_graph(packed_llama: Path) -> None:
    model, graphs = quant.load(packed_llama), Graphs()
    ids = torch.arange(12)[None] + 4
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and dynamo
        found = compiled(model, graphs)(ids, use_cache=False).logits
        assert torch.equal(found, model(ids, use_cache=False).logits)
    assert graphs.count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_casts_as_it_does_for_a_linear(dtype: torch.dtype) -> None:
    module, x = layer(), torch.randn(2, COLUMNS, dtype=dtype)
    plain = module.unpack(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = module(x), plain(x)
    assert found.dtype == expected.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)  # the bias is added after a rounding, or before
    assert module(x).dtype == dtype


def test_without_triton_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    arranged, x = arrange(layer().packed), torch.randn(2, COLUMNS)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(available, "INSTALLED", False)
    assert explain(x, arranged).splitlines()[:4] == [
        "triton: refuses, Triton is not installed; pip install triton",
        "triton-trellis: refuses, the weight is a uniform grid",
        "triton-codebook: refuses, the weight is a uniform grid",
        "torch: runs",
    ]
    torch.testing.assert_close(matmul(x, arranged), linear(x, arranged.dequantize()))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(KernelError, match="no kernel takes these arguments:\ntriton: refuses, Triton is not installed"):
        matmul(x, arranged)


def test_a_gpu_is_asked_for_what_it_can() -> None:
    """With tensors of a GPU that does not exist: what would be chosen on one."""
    cases: list[tuple[str | None, torch.dtype, str]] = [
        (None, torch.float16, "triton: runs"),
        (None, torch.float32, "triton: refuses, x is torch.float32; the kernels multiply float16 and bfloat16"),
        ("Tesla V100 is too old", torch.float16, "triton: refuses, Tesla V100 is too old"),
    ]
    for reason, dtype, expected in cases:
        with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
            patch.setattr(available, "unsupported", lambda _, reason=reason: reason)
            x = torch.empty((3, COLUMNS), dtype=dtype, device="cuda")
            spec, shape = Uniform(group_size=32), (24, COLUMNS)
            promised = spec.tensors(shape).items()
            stored = {k: torch.empty(t.shape, dtype=DTYPES[t.dtype], device="cuda") for k, t in promised}
            packed = PackedUniform.from_tensors(spec, shape, stored)
            held = (torch.empty(8 * 4 * 24, dtype=torch.int32, device="cuda"), packed.scales.T, packed.scales.T.byte())
            arranged = Arranged(spec, shape, *held)
            assert explain(x, arranged).splitlines()[0] == expected
            assert "torch: runs" in explain(x, packed).splitlines()
            assert (reason or "not in kernel order") in explain(x, packed).splitlines()[0]
            if expected == "triton: runs":
                out = matmul(x, arranged)
                assert (out.shape, out.device.type, out.dtype) == ((3, 24), "cuda", dtype)


def test_which_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    for capability, reason in [
        ((8, 0), None),
        ((12, 0), None),
        ((7, 5), "Some GPU is older than compute capability 8.0"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert available.unsupported(torch.device("cuda")) == reason
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert available.unsupported(torch.device("cuda")) == "Some GPU: the kernels are for NVIDIA GPUs"


def test_a_hadamard_is_one_operator() -> None:
    x, signs, graphs = torch.randn(3, 64), random_signs(64, 0), Graphs()
    found = compiled(lambda x: hadamard(x, 32, signs), graphs)(x)
    assert torch.equal(found, hadamard(x, 32, signs))
    assert graphs.ops == ["bitwright.hadamard"]
    for x in (torch.randn(3, 64, requires_grad=True), torch.randn(64, 3).T.half(), torch.empty(0, 64)):
        for inverse in (False, True):
            opcheck(torch.ops.bitwright.hadamard, (x, 32, signs, inverse))


def test_under_the_interpreter() -> None:
    rerun(__file__)


def half(bits: int = 4) -> tuple[PackedLinear, Tensor, Arranged]:
    module = layer(bits).half()
    operand = module.operand
    assert isinstance(operand, Arranged)
    return module, torch.randn(5, COLUMNS).half(), operand


def interpreted_operators_pass_torchs_own_checks() -> None:
    _, x, w = half()
    bias, residual = torch.randn(24).half(), torch.randn(5, 24).half()
    sizes = (24, COLUMNS, 4, 32)
    for extra in ((None, None), (bias, residual)):
        opcheck(torch.ops.bitwright.uniform_matmul, (x, w.weight, w.scales, w.zeros, *extra, *sizes, x.dtype))
    x.requires_grad_()
    opcheck(torch.ops.bitwright.uniform_matmul, (x, w.weight, w.scales, w.zeros, None, None, *sizes, x.dtype))
    codes, scale = integer.round_tokens(x.detach())
    opcheck(torch.ops.bitwright.rounded_matmul, (codes, scale, w.weight, w.scales, w.zeros, None, *sizes, x.dtype))
    opcheck(torch.ops.bitwright.uniform_dequantize, (w.weight, w.scales, w.zeros, *sizes, x.dtype, 3, 20))


def interpreted_layer_is_one_graph_for_any_number_of_tokens() -> None:
    module, _, _ = half()
    graphs = Graphs()
    call = compiled(module, graphs, dynamic=True)
    for tokens in (3, 17, launch.UNPACK_FROM):
        x = torch.randn(2, tokens, COLUMNS).half()
        assert torch.equal(call(x), module(x))
    assert graphs.count == 1
    assert [op for op in graphs.ops if "bitwright" in op] == ["bitwright.uniform_matmul"]


def interpreted_many_tokens_are_multiplied_by_the_unpacked_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    _, x, w = half()
    bias, residual = torch.randn(24), torch.randn(5, 24).half()
    expected = launch.matmul(x, w, bias, residual)
    monkeypatch.setattr(launch, "UNPACK_FROM", 5)
    monkeypatch.setattr(launch, "launch", None)
    exact = x.double() @ w.dequantize(torch.float64).T + bias.double() + residual.double()
    found = launch.matmul(x, w, bias, residual)
    # three roundings of the result, one of each weight, and the products' in float32
    size = x.double().abs() @ w.dequantize(torch.float64).abs().T + bias.double().abs() + residual.double().abs()
    for out in (found, expected):
        assert bool(((out.double() - exact).abs() <= 2.0**-9 * size).all())


@pytest.mark.parametrize(
    "spec", [Uniform(bits=4), Codebook(length=4, index_bits=8), Codebook(length=6, index_bits=9), Trellis()], ids=str
)
def interpreted_bias_may_lie_as_it_likes(spec: Spec) -> None:
    """Every other number of a tensor, or one number for all rows, as in a float product."""
    held = measure.arrange(measure.random_packed(spec, 36 if isinstance(spec, Uniform) else 32, 128, "cpu"))
    product, rows = measure.module_of(held).matmul, held.shape[0]
    x, numbers = torch.randn(2, 128).half(), 100 * torch.randn(2 * rows).half()
    for bias in (numbers[::2], numbers[:1].expand(rows)):
        assert torch.equal(product(x, held, bias), product(x, held, bias.contiguous()))


def interpreted_gradients_are_those_of_the_float_weight() -> None:
    module, x, w = half()
    bias, residual = torch.randn(24).requires_grad_(), torch.randn(5, 24).half().requires_grad_()
    upstream = torch.randn(5, 24).half()
    x.requires_grad_()
    assert explain(x, module.operand).startswith("triton: runs")
    grads = torch.autograd.grad(launch.matmul(x, w, bias, residual), (x, bias, residual), upstream)
    torch.testing.assert_close(grads[0], upstream @ w.dequantize(torch.float16))
    torch.testing.assert_close(grads[1], upstream.sum(0).float())
    assert torch.equal(grads[2], upstream)
    torch._dynamo.reset()
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(whole(x).sum(), x)[0], torch.autograd.grad(module(x).sum(), x)[0])


def interpreted_autocast_reaches_the_kernel() -> None:
    module, x, _ = half()
    with torch.autocast("cpu", torch.float16):
        assert explain(x.float(), module.operand).startswith("triton: runs")
        assert torch.equal(module(x.float()), module(x))


def interpreted_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, w = half()
    for call in (module, lambda x: integer_launch.matmul(x, w)):
        with pytest.raises(ValueError, match=r"x has shape \[5, 63\]; its last dimension must be 64"):
            call(x[:, 1:])
    assert "torch: refuses, x is torch.int64, not floating-point" in explain(x.long(), w)
    with pytest.raises(KernelError, match="the kernels multiply float16 and bfloat16"):
        module(x.long())
    assert module(x.float()).dtype == torch.float32  # torch does it
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(KernelError, match=r"triton: refuses, x is torch\.float32"):
        module(x.float())


def interpreted_int8_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, w = half()
    assert "triton-int8: refuses, it rounds x to 8 bits, and runs only where" in explain(x, w)
    monkeypatch.setenv(dispatch.VARIABLE, "triton-int8")
    assert torch.equal(matmul(x, w), integer_launch.matmul(x, w))
    assert matmul(x[:0], w).shape == (0, 24)
    assert torch.equal(matmul(x.T.contiguous().T.view(1, 5, -1), w)[0], matmul(x, w))
    with pytest.raises(KernelError, match="rounding to 8 bits has none"):
        module(x.requires_grad_())
    narrow = arrange(some_packed(Uniform(group_size=16), (24, COLUMNS)))
    with pytest.raises(KernelError, match="groups of 16: the int8 kernel takes multiples of 32"):
        matmul(x.detach(), narrow)


def test_counters_of_graphs_are_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "POOL", 256)
    monkeypatch.setattr(counters, "_pools", {})
    device = torch.device("cpu")
    assert counters.taken(5, device).tolist() == [0] * 5  # none in stock
    counters.stock(device)
    parts = [counters.taken(count, device) for count in (5, 33, 64)]
    assert [part.data_ptr() - parts[0].data_ptr() for part in parts] == [0, 128, 384]
    for part in parts:
        part += 1  # as a launch that is under way
    counters.stock(device)  # 96 of 256 are left
    more = [counters.taken(count, device) for count in (200, 100)]
    assert not any(bool(part.any()) for part in more)
    assert more[1].untyped_storage().data_ptr() != more[0].untyped_storage().data_ptr()  # there were but 32 left
    assert len(more[1]) == 100


def test_a_new_stream_takes_its_counters_from_the_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a one is under way when torch.compile records its graphs, and nothing that lasts may be allocated on it. On
    a device that does not exist, any allocation fails."""
    device = torch.device("cuda", 77)
    monkeypatch.setattr(counters, "_pools", {device: [torch.zeros(1 << 20, dtype=torch.int32)]})
    monkeypatch.setattr(counters, "_counters", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    found = list[Tensor]()
    for number in (1, 2, 1):
        stream = SimpleNamespace(cuda_stream=number)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, stream=stream: stream)
        found.append(counters.fresh_counters(100, device))
    assert found[0] is found[2]
    assert found[0].data_ptr() != found[1].data_ptr()
    assert min(len(part) for part in found) >= 100
