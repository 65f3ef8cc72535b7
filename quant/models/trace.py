"""Watches one forward pass: which blocks run, which matrices each multiplies by, and on which tensor.

The pass runs on weights of no size (`models/weightless`): no memory and milliseconds per block, for any model. That
makes two proofs cheap. A linear module is a site only if its output is exactly `x W^T + b`. And each block, replayed
from the output of the block before it alone, must give what it gave in the whole pass; then so must the model's head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from quant.calibration.notes import Notes, before, left, merged, written
from quant.calibration.replay import cacheless, copy
from quant.errors import ModelError
from quant.models.chain import Broken, line, prove
from quant.models.lineage import Conditioning, Routers
from quant.models.products import SUMS, product
from quant.models.stream import first_tensor
from quant.models.structure import candidates, is_linear, owner_of
from quant.models.weightless import noise, same, weightless

DTYPE: Any = torch.Tensor.dtype


@dataclass(frozen=True)
class Use:
    """One matrix product inside a block. `source` tells input tensors apart; `oddity`: why it is not a plain linear."""

    parameter: str
    source: tuple[Any, ...]
    transposed: bool
    oddity: str | None

    @property
    def rows(self) -> int:
        """How many rows it multiplies."""
        return self.source[2] // self.source[3]


@dataclass(frozen=True)
class Trace:
    """`chain`: blocks that ran once, in call order; `repeated`: those that ran more often, with the count; `uses`: each
    block's products in call order; `outside`: parameters multiplied outside all blocks; `tied`: the further names of
    tied parameters, with the first name, which stands for them everywhere else; `routers`: weights of linears whose
    outputs choose experts; `read`: weights of linears that code around them looks at (`x.to(linear.weight.dtype)`);
    `odd`: matrices that are used outside all blocks otherwise than by an embedding's or a linear's own plain forward;
    `looked`: weights of embeddings outside all blocks that were given the tokens, or the like of them;
    `modulations`, `embedders`: weights that see what the tokens are conditioned on (see `lineage`), or come before
    all blocks; `lent`: modules in blocks that are called from outside too; `attends`: see `lineage`;
    `texts`: how many rows the texts of the batch have; `apart`: blocks before the chain that are none of it."""

    chain: tuple[str, ...]
    repeated: dict[str, int]
    uses: dict[str, list[Use]]
    outside: Set[str]
    tied: dict[str, str]
    routers: Set[str]
    read: Set[str]
    odd: Set[str]
    looked: Set[str]
    modulations: Set[str]
    embedders: Set[str]
    lent: Set[str]
    attends: dict[str, bool]
    texts: Set[int]
    apart: Set[str]

    @cached_property
    def users(self) -> dict[str, set[str]]:
        """The blocks that multiply by each parameter."""
        users: dict[str, set[str]] = {}
        for block, uses in self.uses.items():
            for use in uses:
                users.setdefault(use.parameter, set()).add(block)
        return users


def trace(model: nn.Module, batch: Mapping[str, Any]) -> Trace:
    """Runs `model(**batch)` once whole and once block by block; parameters may lie on meta and come back unchanged.
    Where whole lists of blocks come before those that form a chain, it does so again without these (`chain.py`).

    Raises:
        ModelError: the pass fails, or a block reads more than its predecessor's output.
    """
    batch = pytree.tree_map_only(torch.Tensor, lambda x: x.cpu(), dict(batch))
    names, apart = candidates(model), list[str]()
    while True:
        try:
            return _trace(model, batch, [name for name in names if name not in apart], {*apart})
        except Broken as broken:
            apart += broken.before(model)


def _trace(model: nn.Module, batch: Mapping[str, Any], names: Sequence[str], apart: Set[str]) -> Trace:
    """`names`: the blocks; `apart`: those that are none."""
    with torch.no_grad(), cacheless(model), weightless(model) as first_name:
        watch = _Watch(model, first_name, batch)
        try:
            with watch.hooked(names), watch:
                whole = first_tensor(model(**batch)).clone()
        except Exception as error:  # a model's own code may raise anything
            raise ModelError(
                f"{type(model).__name__}: the forward pass that finds its layers failed, given "
                f"{', '.join(batch) or 'nothing'} ({line(error)}); a model that needs more cannot be quantized"
            ) from error
        chain = tuple(name for name, calls in watch.calls.items() if calls == 1)
        repeated = {name: calls for name, calls in watch.calls.items() if calls > 1}
        watch.recording = False
        with watch:
            prove(model, batch, chain, watch.outputs, whole)
    tied = {name: first for name, first in first_name.items() if name != first}
    seen, texts = watch.conditioning, [x for name, x in batch.items() if name != "hidden_states"]
    return Trace(
        chain, repeated, watch.uses, watch.outside, tied, watch.routers.found, watch.read, watch.odd,
        watch.looked, seen.modulations, seen.embedders | watch.before, watch.lent, seen.attends,
        {x.shape[:2].numel() for x in texts if getattr(x, "ndim", 0) == 3}, apart,
    )  # fmt: skip


def samples(batch: Mapping[str, Any]) -> int:
    """How many samples a diffusion model's batch has; 0 for other models."""
    return len(batch["hidden_states"]) if "timestep" in batch else 0


def _place(x: torch.Tensor) -> int:
    """The address of a tensor's memory; 0 inside a vmap, as of a mask, which shows none."""
    try:
        return x.untyped_storage().data_ptr()
    except NotImplementedError:
        return 0


class _Watch(TorchFunctionMode):
    """Records blocks and products, and answers each product with noise."""

    def __init__(self, model: nn.Module, first_name: Mapping[str, str], batch: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.first_name = model, first_name
        self.parameters = {  # by the address of the one row that each keeps
            parameter.untyped_storage().data_ptr(): (first_name[name], parameter)
            for name, parameter in model.named_parameters()
            if parameter.dim() in (2, 3)
        }
        self.recording = True
        self.calls: Counter[str] = Counter()
        self.outputs: dict[str, Any] = {}
        self.notes, self.noted = Notes(), Notes()  # so far, and as the block began that is running
        self.uses: dict[str, list[Use]] = {}
        self.outside: set[str] = set()
        self.block: str | None = None
        self.linear: tuple[str, torch.Tensor | None] | None = None  # the one running: its weight's name, its input
        self.answer: torch.Tensor | None = None
        self.routers = Routers(model)
        self.conditioning = Conditioning(samples(batch))
        self.before: set[str] = set()  # multiplied by outside all blocks, before the first of them
        self.lent: set[str] = set()
        self.read: set[str] = set()
        self.odd: set[str] = set()
        self.tokens, self.looked = batch.get("input_ids"), set[str]()
        self.asked: int | None = None  # the matrix that was just asked whether it is of floating-point numbers
        self.alive: list[torch.Tensor] = []  # a block's inputs are kept until it ends, so that no two share an address

    @contextmanager
    def hooked(self, names: Sequence[str]) -> Generator[None]:
        with ExitStack() as hooks:
            enter = lambda part, hook, **how: hooks.enter_context(part.register_forward_pre_hook(hook, **how))  # noqa: E731
            leave = lambda part, hook, **how: hooks.enter_context(part.register_forward_hook(hook, **how))  # noqa: E731
            for name in names:
                module = self.model.get_submodule(name)
                enter(module, partial(self._enter_block, name), with_kwargs=True)
                leave(module, partial(self._leave_block, name), with_kwargs=True)
                for inside, part in module.named_modules(prefix=name):
                    if inside != name:
                        enter(part, partial(self._enter_part, inside))
            for name, module in self.model.named_modules():
                if is_linear(module) or isinstance(module, nn.Embedding):
                    enter(module, partial(self._enter_linear, f"{name}.weight" if name else "weight"))
                    leave(module, self._leave_linear)
            yield

    def _enter_block(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.block = name
        self.calls[name] += 1
        self.noted = before(args, kwargs)

    def _enter_part(self, name: str, _module: nn.Module, _args: Any) -> None:
        if self.block is None:
            self.lent.add(name)

    def _leave_block(self, name: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.block = None
        self.notes = merged(self.notes, written(self.noted, args, kwargs))
        self.alive.clear()
        self.routers.clear()
        self.conditioning.clear()
        self.outputs[name] = copy(left(output, self.notes)) if self.calls[name] == 1 else None

    def _enter_linear(self, weight: str, _module: nn.Module, args: Any) -> None:
        self.linear = (weight, args[0] if args else None)
        self.answer = None
        if self.block is None and self.tokens is not None and same(args[:1], self.tokens):
            self.looked.add(weight)

    def _leave_linear(self, module: nn.Module, _args: Any, output: Any) -> None:
        """What a packed linear will compute must be what this one did: `x W^T + b`, no more."""
        linear, answer, self.answer, self.linear = self.linear, self.answer, None, None
        uses = self.uses.get(self.block or "", [])
        if answer is None or linear is None or (self.block is not None and not uses):
            return
        bias: Any = module.bias
        expected = answer + bias if bias is not None and bias.shape == answer.shape[-1:] else answer
        if not isinstance(output, torch.Tensor) or not same(output.flatten(), expected.flatten()):
            if self.block is None:
                self.odd.add(self.first_name[linear[0]])
                return
            last = uses.pop()
            oddity = last.oddity or f"{type(module).__name__} computes more than x W^T + b"
            uses.append(Use(last.parameter, last.source, last.transposed, oddity))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = tuple(kwargs[key] for key in ("input", "weight", "other", "mat2") if key in kwargs)
        used = product(func, args + named) if kwargs.keys() <= {"input", "weight", "bias", "other", "mat2"} else None
        x, weight, by_columns = used or (None, None, False)
        name, parameter = self.parameters.get(0 if weight is None else _place(weight), ("", None))
        if x is None or weight is None or parameter is None or weight.dim() < 2:
            result = func(*args, **kwargs)
            if self.recording:
                self.routers.other(func, (args, kwargs), result)
                self.conditioning.other(func, (args, kwargs), result)
                self._look(func, args)
            return result
        flipped = weight.stride(-1) == 0 and weight.shape[-1] > 1  # the stored row is the dimension that has a stride
        answer = noise(name, x, weight if by_columns else weight.mT)
        if self.recording:
            self._record(name, parameter, x, weight.mT if flipped else weight, by_columns != flipped)
            self.answer = answer
        given = args[0] if func in SUMS else args[2] if func is nn.functional.linear and args[2:] else None
        bias = kwargs.get("bias", given)
        result = answer if bias is None else answer + bias
        if self.recording and parameter.dim() == 2:
            self.routers.product(name, result)
            if self.block is not None:
                self.conditioning.product(name, x, result)
        return result

    def _look(self, func: Any, args: Any) -> None:
        """Notes a look at a weight from outside its linear. What it would see of a packed one is nothing like it."""
        if func == torch.Tensor.device.__get__ or not args or not isinstance(args[0], torch.Tensor):
            return
        places = [_place(arg) for arg in args[:2] if isinstance(arg, torch.Tensor)]
        if self.block is None:
            asked, self.asked = self.asked, places[0] if func == torch.Tensor.is_floating_point else None
            if self.asked or (asked == places[0] and func == DTYPE.__get__):
                return  # what looks for the model's dtype finds another parameter's
        for place in places[: 1 if self.block is not None else 2]:
            name, _ = self.parameters.get(place, ("", None))
            if name and not self._own(name):
                (self.odd if self.block is None else self.read).add(name)

    def _own(self, name: str) -> bool:
        """Whether it is the matrix of the module that is running."""
        return self.linear is not None and self.first_name[self.linear[0]] == name

    def _record(self, name: str, whole: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> None:
        if self.block is None:
            self.outside.add(name)
            given = self.linear[1] if self.linear is not None and self._own(name) else None
            if given is None or weight.shape != whole.shape or not same(x.flatten(), given.flatten()):
                self.odd.add(name)
            self.before.update({name} if self.conditioning.rows and not self.calls else ())
            return
        oddity = None
        if weight.shape[-2:] != whole.shape[-2:]:
            oddity = "only a part of it is multiplied by"
        elif whole.dim() == 3 and weight.dim() == 3 and (x.dim() != 3 or len(x) != len(weight) or len(x) != len(whole)):
            oddity = f"inputs {list(x.shape)} are multiplied by the whole stack, not one input by each matrix"
        elif whole.dim() == 2:
            owner, _ = owner_of(self.model, name)
            if not is_linear(owner):
                oddity = f"a matrix of {type(owner).__name__}, which is no linear layer"
            elif self.linear is None or self.linear[0] != name or self.linear[1] is None:
                oddity = "its weight is read from outside its own forward"
            elif not same(x.flatten(), self.linear[1].flatten()):
                oddity = f"{type(owner).__name__} changes its input before the product"
        self.alive.append(x)
        place = (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x.shape[-1], x.stride(-1), x._version)
        self.uses.setdefault(self.block, []).append(Use(name, place, transposed, oddity))
