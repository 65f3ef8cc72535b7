"""What an error of each weight matrix costs a language model, from the gradients of a few batches.

For small errors `E` of a weight the KL divergence between the model with and without them is a quadratic form, that of
the Fisher information (Martens, arXiv 1412.1193, section 9.2). Over `T` tokens, in nats per token,

    KL = 1/(2 T) mean <G, E>^2,    G the gradient of -log p(labels), labels drawn from what the model itself says.

What feedback leaves is known before anything is solved: `E = diag(s) Z V`, with `Z` white and of a mean square of
`4^-bits`, `s` the rows' root mean squares and `V` the factor that feedback itself uses (`solvers/factor.py`). So the
mean over `Z` is closed, and one pass back through the model gives the costs of all matrices and all numbers of bits:

    cost(bits) = 4^-bits / (2 T) * mean |diag(s) G V^T|^2

Its rows' parts, without `s`, say how much an error in each row counts: codes that share bits among rows spend them
where that is much (`solvers/trellis.py`). How errors in two of them count together is seen on the way (`pairs.py`).

Gradients of drawn labels have a mean of zero, so those of some windows may be summed first: of as many as have the
tokens that the widest matrix has inputs, lest `G VT` take longer than the gradients. Errors put into one matrix after
another and seen at the output cost within 25 % of this at 3 bits (`tests/test_fisher.py`), and take a pass for each
matrix and width.

The model is streamed, one block in memory and one window at a time: forward, and what every so many blocks are given
is kept, as many as the root of all; then in reverse, the blocks between two of these once more, to keep what each is
given, and each with its gradient. So what this adds to the memory of a forward pass are gradients of a block's weights,
twice, one window's graph and logits, the factors of one block, and 8 bytes for each of its rows and each that shares
bits with it; what is kept grows with the root of the depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

from quant.calibration.activations import Activations, scratch
from quant.calibration.batch import Batch
from quant.calibration.capture import Stage, collect
from quant.calibration.replay import Replay
from quant.errors import CalibrationError
from quant.memory import give_back
from quant.models.skeleton import Skeleton
from quant.models.stream import finite, first_tensor, outside_blocks
from quant.models.walk import Block, Site, Walk
from quant.pairs import Factors, Pairs
from quant.recovery.placed import oriented, placed
from quant.recovery.timesteps import has_vocabulary
from quant.recovery.tuning import floats
from quant.solvers.factor import shaping

WINDOWS = 32  # at least
PER_INPUT = 8  # tokens for each input of the widest matrix, lest `V` fit just these
UNMEASURED = "--set mixed=false --set widths=[] for the same bits everywhere"
REMEDY = f"free some space there, choose another TMPDIR, or {UNMEASURED}"


@dataclass
class Cost:
    """Of a site's errors. `rows` float32 `[rows of all experts]`: what errors of one size cost in each row, nats per
    token (of a model without a vocabulary: squared error per token). `energy`: each row's mean square, which is its
    errors' at 0 bits. `pairs`, where asked for and found: how errors in two rows correlate in what they cost, as of
    `Pairs.correlations`."""

    rows: Tensor
    energy: Tensor
    pairs: Tensor | None = None

    @property
    def zero(self) -> float:
        """What 0 bits would cost; `b` bits cost `4^-b` of it."""
        return float(self.rows.double() @ self.energy.double())


@torch.no_grad()
def information(
    skeleton: Skeleton, found: Walk, batches: Sequence[Batch], spill: int, progress: Callable[[str], None],
    sequences: Mapping[str, int] | None = None,
) -> dict[str, Cost]:  # fmt: skip
    """The cost of errors in each site. `spill`: bytes of activations that are kept in memory. `sequences`: of sites
    whose rows share bits, how many do, where it is asked how two of them count together."""
    chain, device = found.chain, skeleton.device
    rows = [row for batch in enough(batches, found.sites) for row in batch["input_ids"].to(device).split(1)]
    windows: list[Batch] = [{"input_ids": row} for row in rows]
    blocks = {block.name: block for block in found.blocks}
    outside, head = outside_blocks(skeleton, chain)
    skeleton.load(outside)
    costs = {site.name: Cost(*torch.zeros((2, site.shape[0]))) for site in found.sites}
    with scratch() as folder, Replay(skeleton.model, chain) as replay:
        stream = _Stream(skeleton, replay, windows, folder, spill // kept(len(chain)), progress)
        starts, given, every = dict[int, Activations](), stream.room("none"), _every(len(chain))
        for index in range(len(chain)):
            before, given = given, stream.forward(index, given)
            if index % every:
                before.clear()
            else:
                starts[index] = before
        skeleton.load(head)
        gradients, tokens = stream.head(given)
        skeleton.unload(head)
        given.clear()
        for start in reversed(range(0, len(chain), every)):
            stop, segment = min(start + every, len(chain)), [starts.pop(start)]
            for index in range(start, stop - 1):
                segment.append(stream.forward(index, segment[-1]))
            for index in reversed(range(start, stop)):
                with stream.block(index, "backward"):
                    block, given = blocks.get(chain[index], Block(chain[index], ())), segment.pop()
                    _sweep(replay, index, block, windows, given, gradients, costs, sequences or {})
                    given.clear()
    skeleton.unload(outside)
    wrong = next((name for name, cost in costs.items() if not math.isfinite(cost.zero)), None)
    if wrong is not None or not any(cost.zero for cost in costs.values()):
        what = "the cost of an error is not finite" if wrong else "no gradient reaches it"
        raise CalibrationError(f"{wrong or found.sites[0].name}: {what}; try --dtype float32, or {UNMEASURED}")
    return {name: replace(cost, rows=cost.rows / (2 * tokens)) for name, cost in costs.items()}


@dataclass(frozen=True)
class _Stream:
    """The passes. `share`: bytes of the outputs of one block that are kept in memory."""

    skeleton: Skeleton
    replay: Replay
    windows: Sequence[Batch]
    folder: Path
    share: int
    progress: Callable[[str], None]

    def room(self, name: str) -> Activations:
        return Activations(len(self.windows), self.folder / name, self.share, self.skeleton.device, REMEDY)

    @contextmanager
    def block(self, index: int, way: str) -> Generator[None]:
        """A block's weights in memory."""
        count, names = len(self.replay.names), self.skeleton.names_under(self.replay.names[index])
        self.progress(f"what an error of each matrix costs: {way}, block {index + 1} of {count}")
        self.skeleton.load(names)
        yield
        self.skeleton.unload(names)
        give_back()

    def forward(self, index: int, given: Activations) -> Activations:
        gives = self.room(str(index))
        with self.block(index, "forward"):
            for number, window in enumerate(self.windows):
                gives[number] = finite(self.replay.output(index, window, given[number]), self.replay.names[index])
        return gives

    def head(self, given: Activations) -> tuple[Activations, int]:
        """The gradients of what the head is given, and the tokens."""
        generator, gradients, tokens = torch.Generator().manual_seed(0), self.room("gradients"), 0
        for number, window in enumerate(self.windows):
            last = _leaves(given[number])
            with torch.enable_grad():
                said = finite(first_tensor(self.replay.head(window, last)), "the model")
                loss = _surprise(self.skeleton.model, said, generator)
            gradients[number] = _back([loss], [torch.ones_like(loss)], floats(last))
            tokens += said[..., 0].numel()
        return gradients, tokens


def enough(batches: Sequence[Batch], sites: Sequence[Site]) -> Sequence[Batch]:
    """As many batches as the costs need, spread over all."""
    rows, length = batches[0]["input_ids"].shape
    windows = max(WINDOWS, PER_INPUT * max(site.inputs for site in sites) / length)
    return batches[:: max(1, len(batches) // math.ceil(windows / rows))]


def kept(blocks: int) -> int:
    """How many blocks' outputs `information` keeps at once, at most."""
    every = _every(blocks)
    return math.ceil(blocks / every) + every + 1


def _every(blocks: int) -> int:
    return max(1, math.isqrt(blocks))


def _surprise(model: nn.Module, said: Tensor, generator: torch.Generator) -> Tensor:
    """-log p of labels drawn from what the model says, summed over tokens; of a model without a vocabulary, its output
    along a random direction, whose squared slope has the squared error for a mean."""
    said = said.float().flatten(0, -2)
    if not has_vocabulary(model):
        return (said * torch.randn(said.shape, generator=generator).to(said.device)).sum() * math.sqrt(2)
    return cross_entropy(said, _drawn(said.detach(), generator).to(said.device), reduction="sum")


def _drawn(said: Tensor, generator: torch.Generator) -> Tensor:
    """A label for each token, int64 `[tokens]`, on the CPU: sums along a vocabulary have no fixed order on a GPU. (At a
    vocabulary of 128,256 `multinomial` takes eight times as long.)"""
    below = said.softmax(-1).cpu().cumsum(-1)
    at = torch.rand((len(below), 1), generator=generator) * below[:, -1:]
    return torch.searchsorted(below, at, right=True)[:, 0].clamp_max(said.shape[-1] - 1)


def _sweep(
    replay: Replay, index: int, block: Block, windows: Sequence[Batch], given: Activations, gradients: Activations,
    costs: Mapping[str, Cost], sequences: Mapping[str, int],
) -> None:  # fmt: skip
    """Finds the costs of a block's sites; the gradients of its outputs become those of its inputs."""
    factors = _factors(replay, index, block, windows, given)
    parameters = {site.name: replay.model.get_parameter(site.parameter) for site in block.sites}
    places = {site.parameter: parameters[site.name] for site in block.sites}
    sums = [Pairs(site, sequences.get(site.name, 1), parameters[site.name].device) for site in block.sites]
    for site in block.sites:
        matrices = oriented(parameters[site.name], site).reshape(-1, site.out, site.inputs)  # float32 one by one
        costs[site.name].energy = torch.cat([W.float().square().mean(1).cpu() for W in matrices])
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    size = _summed(block, windows)
    for first in range(0, len(windows), size):
        total: list[Tensor] = []
        for number in range(first, min(first + size, len(windows))):
            inputs = _leaves(given[number])
            with torch.enable_grad(), placed(replay.model, places):
                outputs = floats(replay.output(index, windows[number], inputs))
            own = _back(outputs, gradients[number], [*parameters.values(), *floats(inputs)])
            own, gradients[number] = own[: len(parameters)], own[len(parameters) :]
            total = [one.add_(more) for one, more in zip(total, own, strict=True)] if total else own
            del outputs, own  # or the next window's graph and gradients come on top
        for site, gradient, pairs in zip(block.sites, total, sums, strict=True):
            pairs.add(oriented(gradient, site), factors[site.name], first // size % 2)
    for site, pairs in zip(block.sites, sums, strict=True):
        cost = costs[site.name]
        cost.rows, cost.pairs = pairs.rows(), pairs.correlations()
    for parameter in parameters.values():
        parameter.requires_grad_(False)


def _summed(block: Block, windows: Sequence[Batch]) -> int:
    """Of how many windows gradients are summed first."""
    widest = max((site.inputs for site in block.sites), default=1)
    return max(1, min(widest // windows[0]["input_ids"].shape[1], len(windows) // 2))


def _factors(
    replay: Replay, index: int, block: Block, windows: Sequence[Batch], given: Activations
) -> dict[str, Factors]:
    """Sites of a stage share theirs. An expert that saw no token has none, and no gradient."""
    stages = [Stage(replay.model, stage, cross=False) for stage in block.stages]
    if stages:
        collect(stages, replay, index, windows, given)
    factors: dict[str, Factors] = {}
    for stage, sites in zip(stages, block.stages, strict=True):
        own: Factors = {}
        for number, statistics in stage.finish().items():
            if (shaped := shaping(statistics)) is not None:
                own[number] = shaped
            statistics.forget()
        factors |= {site.name: own for site in sites}
    return factors


def _leaves(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point()), tree)


def _back(outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the inputs, zero where nothing depends on them, each with memory of its own."""
    pairs = [(output, g) for output, g in zip(outputs, gradients, strict=True) if output.requires_grad]
    if not pairs or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    some, their = zip(*pairs, strict=True)
    found = torch.autograd.grad(some, inputs, their, allow_unused=True, materialize_grads=True)
    places = [gradient.untyped_storage().data_ptr() for gradient in found]
    shared = [0 in x.stride() or places.count(place) > 1 for x, place in zip(found, places, strict=True)]
    return [x.clone() if twice else x for x, twice in zip(found, shared, strict=True)]
