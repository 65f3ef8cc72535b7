"""A CPU that passes for a GPU, to see without one where tensors of two devices meet and where Python waits for numbers.

Tensors on "cuda" are CPU tensors of a class that says so. A function mode makes them where that device is asked for,
and raises where a function is given tensors of both, as torch does. Triton's kernels are not run: `runs_triton` says
no. Every time that Python asks for a number is counted by the line of this package that asks.
"""

# pyright: basic
from __future__ import annotations

import traceback
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

GPU = torch.device("cuda", 0)
MIXES = {"copy_", "__getitem__", "__setitem__", "__set__"}  # a CPU's tensor is welcome, or an index
MOVES = {"to", "cpu", "cuda", "type_as"}
WAITS = {"item", "tolist", "nonzero", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}


class OnGpu(Tensor):
    device = property(lambda _: GPU)  # pyright: ignore[reportAssignmentType]
    is_cuda, is_cpu = True, False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Gpu.now.call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = put(plain(self.detach()).clone()).requires_grad_(self.requires_grad)
        return memo[id(self)]


def plain(x: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return x.as_subclass(Tensor) if isinstance(x, OnGpu) else x


def put(x: Any) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, OnGpu) or x.device.type == "meta":
        return x
    if not isinstance(x, Parameter):
        return x.as_subclass(OnGpu)
    made = x.detach().as_subclass(OnGpu).requires_grad_(x.requires_grad)
    made._is_param = True  # which makes it a Parameter
    return made


class Gpu(TorchFunctionMode):
    """For the rest of this process. `waits`: how often a line asked for numbers."""

    now: Gpu

    def __init__(self) -> None:
        super().__init__()
        Gpu.now, self.waits = self, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here, there = any(isinstance(x, OnGpu) for x in tensors), None
        if name == "_has_compatible_shallow_copy_type":
            return False
        if name == "backward":  # hooks run under the mode as well
            with self:
                return backward([args[0]], [torch.ones_like(args[0])], (), True)
        if here and name in WAITS:
            self.waits[where()] += 1
        if here and name == "numpy":
            raise TypeError("numpy reads no tensor of a GPU")
        if name in ("cpu", "cuda"):
            func, args, kwargs, name = Tensor.to, (args[0], name), {}, "to"
        if name == "to":
            args, kwargs, there = moved(args, kwargs)
        elif (asked := kwargs.get("device")) is not None and torch.device(asked).type in ("cpu", "cuda"):
            there, kwargs = torch.device(asked).type, {**kwargs, "device": "cpu"}
        if here and name not in MIXES | MOVES and any(not isinstance(x, OnGpu) and x.dim() for x in tensors):
            devices = [(tuple(x.shape), str(x.device)) for x in tensors]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device; {devices} came")
        if name == "__getitem__" and here and not isinstance(args[0], OnGpu):
            raise RuntimeError("indices on a GPU for a tensor that is not")
        if "bitwright" in str(func):  # operators ask their arguments
            args, kwargs = pytree.tree_map(plain, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if there == "cpu" or name in ("__set__", "__repr__", "__format__"):
            return pytree.tree_map(plain, found)
        same = isinstance(args[0], OnGpu) if name in MIXES else here
        return pytree.tree_map(put, found) if there == "cuda" or (there is None and same) else found


def moved(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], str | None]:
    """The arguments of a `to` that stays on the CPU, and where it was to go."""
    to, kept = None, [args[0]]
    for one in args[1:]:
        if isinstance(one, Tensor):
            to, kept = one.device.type, [*kept, stays(one.device), one.dtype]
        elif isinstance(one, str | torch.device):
            to, kept = torch.device(one).type, [*kept, stays(one)]
        else:
            kept.append(one)
    if "device" in kwargs:
        to, kwargs = torch.device(kwargs["device"]).type, {**kwargs, "device": stays(kwargs["device"])}
    crosses = to in ("cpu", "cuda") and args[0].device.type in ("cpu", "cuda") and to != args[0].device.type
    return (*kept,), {**kwargs, "copy": True} if crosses else kwargs, to


def stays(device: Any) -> torch.device:
    return torch.device("cpu") if torch.device(device).type == "cuda" else torch.device(device)


def where() -> str:
    """The innermost line of the package."""
    frames = [frame for frame in traceback.extract_stack() if "/quant/" in frame.filename]
    return f"{frames[-1].filename.rpartition('/quant/')[2]}:{frames[-1].lineno}" if frames else "elsewhere"


def backward(outputs: Any, gradients: Any, inputs: Any, keep: bool) -> Any:
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward(tuple(outputs), tuple(gradients), False, False, inputs, True, accumulate_grad=keep)


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, materialize_grads: bool = False, **_: Any) -> Any:
    outputs, inputs = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, inputs))
    given = grad_outputs or [torch.ones_like(x) for x in outputs]
    found = list(backward(outputs, given, tuple(inputs), False))
    if materialize_grads:
        found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
    return tuple(put(g) if isinstance(x, OnGpu) else g for g, x in zip(found, inputs, strict=True))


def begin() -> Gpu:
    """Everything after it, in this process, has a GPU."""
    import torch.utils.checkpoint as checkpoint

    from quant.kernels import available

    available.missing = lambda x: "pretended"
    checkpoint._allowed_determinism_checks_to_fns["default"] = lambda x: {"shape": x.shape}
    torch.autograd.grad = grad
    values: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "pretended",
        "get_device_capability": (9, 0), "synchronize": None, "max_memory_allocated": 0, "manual_seed_all": None,
        "current_stream": SimpleNamespace(cuda_stream=0), "_lazy_init": None, "is_current_stream_capturing": False,
        "get_device_properties": SimpleNamespace(total_memory=80 << 30),
    }  # fmt: skip
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.cuda.device_of = torch.cuda.device = lambda *_: nullcontext()
    gpu = Gpu()
    gpu.__enter__()
    return gpu
