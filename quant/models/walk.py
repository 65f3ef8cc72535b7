"""Finds what can be quantized by watching one forward pass: no list of layer names, for any architecture.

The trace (`models/trace`) gives the facts: call order is the order of blocks and sites; the same input tensor makes
the group of sites that share one Hessian; a 3-D parameter whose slices are used as matrices is a stack of experts. Here
they become blocks, stages and sites, and every weight matrix that stays float is listed with its reason.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from quant.errors import ModelError
from quant.models.structure import end_of, is_linear, matrices, name_of, owner_of
from quant.models.trace import Trace, Use, trace

SMALLEST = 8  # fewer outputs than this (a shared expert's gate has one) save nothing


@dataclass(frozen=True)
class Site:
    """One weight matrix, or one stack of them, to quantize.

    `name`: the module's name for a linear (`model.layers.0.mlp.down_proj`), the parameter's for a stack of experts
    (`model.layers.0.mlp.experts.gate_up_proj`). `out`, `inputs`: sizes of one matrix. `transposed`: stored `[in, out]`
    (GPT-2's Conv1D, some expert stacks). `experts`: matrices in the stack, 0 for a plain linear. `modulation`: it makes
    the scales and shifts of a diffusion block (adaLN) from the timestep, one row per sample. `turned`: its inputs come
    rotated, by a fold, and are not to be rotated again. `content`: part of an attention to a text, or of no attention
    and no modulation: a feed-forward. `words`: it reads a text alone, a row per token. `end`: it lies outside all
    blocks: the `embedding`, of which rows are looked up by tokens, the `head` that makes logits, or one for `both`.
    """

    name: str
    kind: Literal["linear", "experts"]
    out: int
    inputs: int
    transposed: bool = False
    experts: int = 0
    bias: bool = False
    modulation: bool = False
    turned: bool = False
    content: bool = False
    words: bool = False
    end: Literal["", "embedding", "head", "both"] = ""

    @property
    def parameter(self) -> str:
        return self.name if self.kind == "experts" else f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """`[rows, in]` as stored: the experts of a stack lie under one another."""
        return (self.out * max(self.experts, 1), self.inputs)

    @property
    def weights(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


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
    """`chain`: names of all blocks in call order; `blocks`: those with sites, or all where only ends are quantized;
    `left`: every other weight matrix by parameter name, with the reason it stays float; `lent`: modules in blocks that
    the rest of the model calls too; `ends`: the embedding and the head, where they were asked for."""

    chain: tuple[str, ...]
    blocks: tuple[Block, ...]
    left: dict[str, str] = field(default_factory=dict[str, str])
    lent: frozenset[str] = frozenset()
    ends: tuple[Site, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """In blocks."""
        return tuple(site for block in self.blocks for site in block.sites)

    @property
    def all(self) -> tuple[Site, ...]:
        return (*self.sites, *self.ends)


def walk(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    ends: bool = False,
) -> Walk:
    """The blocks and sites of `model`, whose parameters may lie on meta, from one call `model(**batch)`.

    `only` and `skip` are glob patterns over site names (`*.down_proj`). `ends`: the embedding and the head too.

    Raises:
        ModelError: nothing to quantize, a pattern that matches nothing, or a block that reads more than its
            predecessor's output.
    """
    seen = trace(model, batch)
    pick = _Pick(tuple(only), tuple(skip))
    left: dict[str, str] = {}
    blocks = tuple(Block(name, _stages(model, seen, name, left, pick)) for name in seen.chain)
    some = tuple(block for block in blocks if block.stages)
    outer = _ends(model, seen, left, pick) if ends else ()
    pick.check()
    _explain_the_rest(model, [*some, Block("", (outer,))], seen, left)
    if not some and not outer:
        reasons = "; ".join(f"{name}: {left[name]}" for name in matrices(model)[:4]) or "it has no linear layers"
        raise ModelError(f"{type(model).__name__}: nothing to quantize ({reasons})")
    return Walk(seen.chain, some or blocks, left, frozenset(seen.lent), outer)


def turned(found: Walk, names: Collection[str]) -> Walk:
    """The walk, sites of these names marked as turned."""
    mark = lambda stage: tuple(replace(site, turned=site.name in names) for site in stage)  # noqa: E731
    blocks = (replace(block, stages=tuple(mark(stage) for stage in block.stages)) for block in found.blocks)
    return replace(found, blocks=tuple(blocks))


class _Pick:
    """`--only` and `--skip`: glob patterns over site names, each of which must match something."""

    def __init__(self, only: tuple[str, ...], skip: tuple[str, ...]) -> None:
        self.only, self.skip = only, skip
        self.used: set[str] = set()

    def dropped(self, name: str) -> str | None:
        dropped = [pattern for pattern in self.skip if fnmatch.fnmatchcase(name, pattern)]
        self.used.update(dropped)
        return f"skipped by --skip {dropped[0]}" if dropped else None

    def reason(self, name: str) -> str | None:
        taken = [pattern for pattern in self.only if fnmatch.fnmatchcase(name, pattern)]
        self.used.update(taken)
        return self.dropped(name) or ("not selected by --only" if self.only and not taken else None)

    def check(self) -> None:
        unused = [pattern for pattern in self.only + self.skip if pattern not in self.used]
        if unused:
            raise ModelError(f"the pattern {unused[0]!r} matches no site; list the sites with --dry-run")


def _stages(
    model: nn.Module, seen: Trace, block: str, left: dict[str, str], pick: _Pick
) -> tuple[tuple[Site, ...], ...]:
    """The block's sites, grouped by the tensor they read, in the order of their first call."""
    uses: dict[str, list[Use]] = {}
    part = lambda name: name[len(block) + 1 :].partition(".")[0]  # noqa: E731
    attends = {part(name): to_text for name, to_text in seen.attends.items() if name.startswith(block + ".")}
    for use in seen.uses.get(block, []):
        uses.setdefault(use.parameter, []).append(use)
    stages: dict[Any, list[Site]] = {}
    for parameter, times in uses.items():
        modulation = parameter in seen.modulations
        content = not modulation and attends.get(part(parameter), True)
        site = _site(model, times[0], modulation, content, seen.texts)
        reason = _unfit(seen, block, site, times) or _not_worth_it(seen, site) or pick.reason(site.name)
        if reason is not None:
            left.setdefault(parameter, reason)
        else:
            stages.setdefault(parameter if site.experts else times[0].source, []).append(site)
    return tuple(tuple(stage) for stage in stages.values())


def _site(model: nn.Module, use: Use, modulation: bool, content: bool, texts: Collection[int]) -> Site:
    path, _, leaf = use.parameter.rpartition(".")
    owner = model.get_submodule(path)
    parameter: torch.Tensor = getattr(owner, leaf)
    rows, columns = parameter.shape[-2:]
    out, inputs = (columns, rows) if use.transposed else (rows, columns)
    if parameter.dim() == 3:
        return Site(use.parameter, "experts", out, inputs, use.transposed, parameter.shape[0], content=content)
    bias = getattr(owner, "bias", None) is not None
    return Site(
        path, "linear", out, inputs, use.transposed, bias=bias, modulation=modulation, content=content,
        words=use.rows in texts,
    )  # fmt: skip


def _unfit(seen: Trace, block: str, site: Site, times: list[Use]) -> str | None:
    """Why a matrix that the block multiplies by cannot become a packed one."""
    parameter = times[0].parameter
    if parameter in seen.embedders:
        return "an embedder of the timestep or the label, inside a block; embedders stay float"
    others = sorted(name for name in seen.users[parameter] if name != block)
    if parameter in seen.outside:
        others.append("the model outside its blocks")
    if others:
        return f"shared: {others[0]} multiplies by it as well"
    if parameter in seen.tied.values():
        return f"tied to {next(name for name, first in seen.tied.items() if first == parameter)}"
    odd = [use.oddity for use in times if use.oddity]
    if odd:
        return odd[0]
    if parameter in seen.read and not site.experts:
        return "its weight, or the dtype of it, is read from outside its own forward"
    if len({use.transposed for use in times}) > 1:
        return "multiplied by in both orientations"
    if len({use.source for use in times}) > 1 and not site.experts:
        return "used on several inputs in one pass"
    return None


def _ends(model: nn.Module, seen: Trace, left: dict[str, str], pick: _Pick) -> tuple[Site, ...]:
    """The embedding of the tokens, others as large that they are looked up in (Gemma 3n's for its layers) and the head,
    where a packed one does all that is done with them."""
    found = dict[str, Site]()
    tokens, head = end_of(model, "embedding"), end_of(model, "head")
    tables = [owner_of(model, name)[0] for name in sorted(seen.looked - seen.tied.keys() - {*seen.tied.values()})]
    least = getattr(tokens, "weight", None)  # of some there is none to compare with
    more = [one for one in tables if least is not None and one is not tokens and one.weight.numel() >= least.numel()]
    ends: list[tuple[Any, Literal["embedding", "head"]]] = [(one, "embedding") for one in (tokens, *more)]
    ends.append((head, "head"))
    for module, end in ends:
        name, kind = name_of(model, module), nn.Linear if end == "head" else nn.Embedding
        parameter = f"{name}.weight"
        weight = getattr(module, "weight", None)
        if not name or weight is None or seen.tied.get(parameter, parameter) in seen.users:
            continue  # there is none, or it is part of a block
        site = Site(name, "linear", *weight.shape, bias=getattr(module, "bias", None) is not None, end=end)
        odd = not isinstance(module, kind) or (type(module) is not kind and end == "head")
        odd = odd or getattr(module, "max_norm", None) is not None
        reason = f"a {type(module).__name__}, which no packed {end} stands for" if odd else pick.dropped(name)
        if reason is None and seen.tied.get(parameter, parameter) in seen.odd:
            reason = "its weight is read from outside its own forward"
        if reason is None:
            found[parameter] = site
        else:
            left[parameter] = reason
    first = lambda name: seen.tied.get(name, name)  # noqa: E731
    for parameter in [*found]:
        alike = {name for name in (*seen.tied, *seen.tied.values()) if first(name) == first(parameter)} - {parameter}
        pair = [found[name] for name in (parameter, *alike) if name in found]
        if len(pair) == 2 == 1 + len(alike) and not any(site.bias for site in pair):
            embedding, other = sorted(pair, key=lambda site: site.end)
            found[embedding.parameter] = replace(embedding, end="both")
            del found[other.parameter]
        elif alike and found.pop(parameter, None) is not None:
            left[parameter] = f"tied to {min(alike)}"
    return tuple(found.values())


def _not_worth_it(seen: Trace, site: Site) -> str | None:
    if site.parameter in seen.routers:
        return f"a router: its {site.out} outputs choose among as many experts; routers stay float"
    if site.out < SMALLEST:
        return f"only {site.out} outputs: too small to be worth it"
    return None


def _explain_the_rest(model: nn.Module, blocks: Sequence[Block], seen: Trace, left: dict[str, str]) -> None:
    """Every tensor of two or more dimensions that is no site gets its reason."""
    taken = {site.parameter for block in blocks for site in block.sites}
    taken |= {seen.tied.get(name, name) for name in taken}
    repeated = {inside: block for block in seen.repeated for inside in _names_under(model, block)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() < 2 or name in taken or name in left:
            continue
        owner, _ = owner_of(model, name)
        of = next((block for block in seen.apart if name.startswith(block + ".")), None)
        if of is not None and is_linear(owner):
            left[name] = f"{of} comes before the blocks that form a chain"
        elif name in seen.tied:
            left |= {} if seen.tied[name] in taken else {name: f"tied to {seen.tied[name]}"}
        elif name in repeated:
            left[name] = f"its block {repeated[name]} runs {seen.repeated[repeated[name]]} times in one forward pass"
        elif isinstance(owner, nn.Embedding):
            left[name] = "an embedding"
        elif name in seen.embedders and name in seen.outside:
            left[name] = "an embedder: multiplied by before the first block"
        elif name in seen.outside:
            left[name] = "outside the blocks (a head or a projection)"
        elif is_linear(owner):
            left[name] = "no product with it was seen in the traced forward pass"
        else:
            left[name] = f"a tensor of {type(owner).__name__} that is not used as a matrix product"


def _names_under(model: nn.Module, block: str) -> list[str]:
    return [name for name, _ in model.get_submodule(block).named_parameters(prefix=block)]
