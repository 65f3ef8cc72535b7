"""Finds what can be quantized by watching one forward pass: no list of layer names, for any architecture.

The model runs once on a few tokens with weights of no size (one number, expanded) while every matrix product answers
with seeded noise, so a trace costs milliseconds and no memory for a model of any size. Call order gives the order of blocks
and sites; the same input tensor gives the group of sites that share one Hessian; a 3-D parameter whose slices are used
as matrices is a stack of experts. A second pass proves what the pipeline relies on: that each block depends on the
earlier ones through the output of the block before it alone. What is left out is listed with its reason.
"""

from __future__ import annotations

import fnmatch
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from quant.calibration.replay import Replay
from quant.errors import ModelError

SMALLEST = 8  # fewer outputs than this (a shared expert's gate has one) save nothing


@dataclass(frozen=True)
class Site:
    """One weight matrix, or one stack of them, to quantize.

    `name`: the module's name for a linear (`model.layers.0.mlp.down_proj`), the parameter's for a stack of experts
    (`model.layers.0.mlp.experts.gate_up_proj`). `out`, `inputs`: sizes of one matrix. `transposed`: stored `[in, out]`
    (GPT-2's Conv1D, some expert stacks). `experts`: matrices in the stack, 0 for a plain linear.
    """

    name: str
    kind: Literal["linear", "experts"]
    out: int
    inputs: int
    transposed: bool = False
    experts: int = 0
    bias: bool = False

    @property
    def parameter(self) -> str:
        return self.name if self.kind == "experts" else f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """`[rows, in]` as stored: the experts of a stack lie under one another."""
        return (self.out * max(self.experts, 1), self.inputs)


@dataclass(frozen=True)
class Block:
    """An ordered part of the model run together. `stages`: groups of sites that read the same tensor, in call order."""

    name: str
    stages: tuple[tuple[Site, ...], ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for stage in self.stages for site in stage)


@dataclass(frozen=True)
class Walk:
    """`chain`: names of all blocks in call order; `blocks`: those with sites; `left`: every other weight matrix by
    parameter name, with the reason it stays float."""

    chain: tuple[str, ...]
    blocks: tuple[Block, ...]
    left: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for block in self.blocks for site in block.sites)


def walk(model: nn.Module, batch: Mapping[str, Any], *, only: Sequence[str] = (), skip: Sequence[str] = ()) -> Walk:
    """The blocks and sites of `model`, whose parameters may lie on meta, from one call `model(**batch)`.

    `only` and `skip` are glob patterns over site names (`*.down_proj`).

    Raises:
        ModelError: nothing to quantize, or a block that reads more than its predecessor's output.
    """
    trace = _Trace(candidates(model))
    with torch.no_grad(), _weightless(model) as trace.storages, trace.watching(model), trace:
        model(**batch)
    once = [name for name in trace.order if trace.calls[name] == 1]
    left = {
        parameter: f"its block {name} runs {trace.calls[name]} times in one forward pass"
        for name in trace.order
        if trace.calls[name] != 1
        for parameter in _matrices(model.get_submodule(name), name)
    }
    with torch.no_grad(), _weightless(model) as trace.storages, trace:
        _prove_chain(model, batch, trace, once)
    pick = _Pick(tuple(only), tuple(skip))
    blocks = tuple(Block(name, _stages(model, trace, name, left, pick)) for name in once)
    blocks = tuple(block for block in blocks if block.stages)
    _explain_the_rest(model, blocks, trace, left)
    if not blocks:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:4]) or "it has no linear layers"
        raise ModelError(f"{type(model).__name__}: nothing to quantize ({reasons})")
    pick.check()
    return Walk(tuple(once), blocks, left)


def candidates(model: nn.Module) -> list[str]:
    """Names of the modules that may be blocks: the children with matrices of the outermost lists of like modules."""
    names: list[str] = []
    for name, module in model.named_modules():
        if any(name == taken or name.startswith(taken + ".") for taken in names):
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential):
            heavy = [(key, child) for key, child in module.named_children() if _matrices(child, key)]
            chosen = [(key, child) for key, child in heavy if not _is_linear(child)] or heavy
            alike = Counter(type(child) for _, child in chosen).most_common(1)
            if isinstance(module, nn.ModuleList) or (alike and alike[0][1] > 1):
                names += [f"{name}.{key}" if name else key for key, _ in chosen]
    return names or [key for key, child in model.named_children() if _matrices(child, key)]


def product(func: Any, args: Any) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
    """`(x, weight, transposed)` if this torch call is `x @ weight^T` (linear) or `x @ weight` (Conv1D, stacks)."""
    if func is nn.functional.linear:
        return args[0], args[1], False
    if func is torch.addmm:
        return args[1], args[2], True
    if func in _PRODUCTS and all(isinstance(arg, torch.Tensor) for arg in args[:2]):
        return args[0], args[1], True
    return None


_PRODUCTS = (
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.bmm,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
)


@dataclass(frozen=True)
class _Use:
    """One matrix product inside a block: which parameter, on which input, stored which way."""

    parameter: str
    source: tuple[Any, ...]
    transposed: bool


class _Trace(TorchFunctionMode):
    """Records the blocks' order, inputs and outputs and their matrix products; answers each product with noise."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.storages: dict[int, tuple[str, int]] = {}
        self.order: list[str] = []
        self.calls: Counter[str] = Counter()
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.uses: dict[str, list[_Use]] = {}
        self.outside: set[str] = set()
        self.current: str | None = None
        self.keep: list[torch.Tensor] = []  # traced inputs stay alive, so that no two share an address

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        hooks: list[Any] = []
        for name in self.names:
            module = model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.current = name
            self.calls[name] += 1
            if self.calls[name] == 1:
                self.order.append(name)
                self.inputs[name] = detach((args, kwargs))

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.current = None
            self.outputs.setdefault(name, detach(output))

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = product(func, args + tuple(kwargs[key] for key in ("input", "weight") if key in kwargs))
        if used is not None:
            x, weight, transposed = used
            name, dimensions = self.storages.get(weight.untyped_storage().data_ptr(), ("", 0))
            if dimensions in (2, 3):
                self._record(name, x, transposed)
                shape = (*x.shape[:-1], weight.shape[-1] if transposed else weight.shape[-2])
                noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                return torch.randn(shape, generator=noise).to(x.dtype)
        return func(*args, **kwargs)

    def _record(self, parameter: str, x: torch.Tensor, transposed: bool) -> None:
        if self.current is None:
            self.outside.add(parameter)
            return
        self.keep.append(x)
        place = (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x.shape[-1], x.stride(-1), x._version)
        self.uses.setdefault(self.current, []).append(_Use(parameter, place, transposed))


@contextmanager
def _weightless(model: nn.Module) -> Iterator[dict[int, tuple[str, int]]]:
    """Parameters of one stored number each. Yields their storage addresses with their names and dimensions."""
    saved = dict(model.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    places: dict[int, tuple[str, int]] = {}
    for name, old in saved.items():
        if id(old) not in made:
            value = torch.zeros(1, dtype=old.dtype)
            made[id(old)] = nn.Parameter(value.expand(old.shape), requires_grad=False)
            places[value.untyped_storage().data_ptr()] = (name, old.dim())
        _put(model, name, made[id(old)])
    try:
        yield places
    finally:
        for name, old in saved.items():
            _put(model, name, old)


def _prove_chain(model: nn.Module, batch: Mapping[str, Any], trace: _Trace, names: list[str]) -> None:
    """Replays each block from its predecessor's output alone; its inputs must be those of the whole pass."""
    trace.current = None
    with Replay(model, names) as replay:
        for index, name in enumerate(names[1:], start=1):
            seen = detach(replay.arguments(index, batch, trace.outputs[names[index - 1]]))
            for got, whole in zip(pytree.tree_leaves(seen), pytree.tree_leaves(trace.inputs[name]), strict=True):
                if isinstance(whole, torch.Tensor) and not torch.equal(got, whole):
                    raise ModelError(
                        f"{name}: reads more than the output of {names[index - 1]} (a skip connection past a block?); "
                        "models whose blocks do not form a chain cannot be quantized block by block yet"
                    )


class _Pick:
    """`--only` and `--skip`: glob patterns over site names, each of which must match something."""

    def __init__(self, only: tuple[str, ...], skip: tuple[str, ...]) -> None:
        self.only, self.skip = only, skip
        self.used: set[str] = set()

    def reason(self, name: str) -> str | None:
        dropped = [pattern for pattern in self.skip if fnmatch.fnmatchcase(name, pattern)]
        taken = [pattern for pattern in self.only if fnmatch.fnmatchcase(name, pattern)]
        self.used.update(dropped + taken)
        if dropped:
            return f"skipped by --skip {dropped[0]}"
        return "not selected by --only" if self.only and not taken else None

    def check(self) -> None:
        unused = [pattern for pattern in self.only + self.skip if pattern not in self.used]
        if unused:
            raise ModelError(f"the pattern {unused[0]!r} matches no site; list the sites with --dry-run")


def _stages(
    model: nn.Module, trace: _Trace, block: str, left: dict[str, str], pick: _Pick
) -> tuple[tuple[Site, ...], ...]:
    """The block's sites, grouped by the tensor they read, in the order of their first call."""
    stages: dict[Any, list[Site]] = {}
    seen: set[str] = set()
    uses = trace.uses.get(block, [])
    sizes = _expert_counts(model.get_submodule(block))
    for use in uses:
        if use.parameter in seen:
            continue
        seen.add(use.parameter)
        sources = {other.source for other in uses if other.parameter == use.parameter}
        site = _site(model, use)
        if isinstance(site, Site) and site.kind == "linear" and len(sources) > 1:
            site = "used on several inputs in one pass"
        if isinstance(site, Site):
            site = _keep_float(site, sizes) or pick.reason(site.name) or site
        if isinstance(site, str):
            left[use.parameter] = site
        else:
            stages.setdefault(use.parameter if site.kind == "experts" else use.source, []).append(site)
    return tuple(tuple(stage) for stage in stages.values())


def _site(model: nn.Module, use: _Use) -> Site | str:
    """The site behind a use, or why it is none."""
    path, _, leaf = use.parameter.rpartition(".")
    owner = model.get_submodule(path)
    parameter: torch.Tensor = getattr(owner, leaf)
    rows, columns = parameter.shape[-2:]
    out, inputs = (columns, rows) if use.transposed else (rows, columns)
    if parameter.dim() == 3:
        return Site(use.parameter, "experts", out, inputs, use.transposed, parameter.shape[0])
    if not _is_linear(owner) or leaf != "weight":
        return f"a matrix of {type(owner).__name__}, which is not a linear layer (routers stay float)"
    return Site(path, "linear", out, inputs, use.transposed, bias=getattr(owner, "bias", None) is not None)


def _keep_float(site: Site, expert_counts: set[int]) -> str | None:
    if site.kind == "linear" and site.out in expert_counts:
        return f"a router: as many outputs ({site.out}) as its block has experts; routers stay float"
    if site.out < SMALLEST:
        return f"only {site.out} outputs: too small to be worth it"
    return None


def _expert_counts(block: nn.Module) -> set[int]:
    stacks = {parameter.shape[0] for parameter in block.parameters() if parameter.dim() == 3}
    lists = {len(module) for module in block.modules() if isinstance(module, nn.ModuleList) and len(module) > 1}
    return stacks | lists


def _explain_the_rest(model: nn.Module, blocks: Sequence[Block], trace: _Trace, left: dict[str, str]) -> None:
    """Every weight matrix that is no site gets its reason."""
    taken = {site.parameter for block in blocks for site in block.sites}
    inside = {use.parameter for uses in trace.uses.values() for use in uses}
    for name in _matrices(model, "", every=True):
        owner = model.get_submodule(name.rpartition(".")[0])
        if name in taken or name in left:
            continue
        if isinstance(owner, nn.Embedding):
            left[name] = "an embedding"
        elif name in trace.outside:
            left[name] = "outside the blocks (a head or a projection)"
        elif _is_linear(owner) and name not in inside:
            left[name] = "not called in the traced forward pass"
        else:
            left[name] = f"a tensor of {type(owner).__name__} that is not used as a matrix product"


def _matrices(module: nn.Module, prefix: str, *, every: bool = False) -> list[str]:
    """Names of the linear weights and 3-D stacks under a module; `every`: of all tensors of two dimensions or more."""
    found: list[str] = []
    for path, part in module.named_modules(prefix=prefix):
        for leaf, parameter in part.named_parameters(recurse=False):
            linear = leaf == "weight" and _is_linear(part)
            if linear or parameter.dim() == 3 or (every and parameter.dim() >= 2):
                found.append(f"{path}.{leaf}" if path else leaf)
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _put(model: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = value


def detach(tree: Any) -> Any:
    """A copy of every tensor in a nest of tuples, lists and dicts."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(), tree)
