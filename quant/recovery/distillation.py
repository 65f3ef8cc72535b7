"""End-to-end tuning: after the last block, train what is continuous in all of them on what the whole model says.

Solvers and block tuning see one matrix or one block, and weigh an error by its size there; only the model's output
knows what it costs. For `steps` steps of one calibration batch each, with the float model as the teacher,

    loss = mean over tokens of KL(teacher || student)        (without a vocabulary: squared error over its energy)
         = mean over samples of |error|^2 / usual            (a diffusion transformer)

is lowered in what costs no bits: the scales of every tunable layout and the vectors that stay float (norm weights,
biases), each rounded to what is stored before it is used (the continuous half of PV-Tuning, arXiv 2405.14852, and the
second phase of EfficientQAT, arXiv 2407.11062); and the codes, by the sign of the gradient on where a value ought to
lie, as in block tuning: what is stored is the code nearest to that, and no step moves it further than `codes / steps`
levels, so that few codes change at a time. The result is kept only if it is better on `judged`; where it is not, what
costs no bits is tuned alone.

A diffusion transformer's error differs a hundredfold between its timesteps, and what an error does to the image does
the opposite. So each sample's is told relative to `usual`, the untuned model's mean at the same timestep: every part
of the way counts alike. Batches mix timesteps (`calibration/batch.py`), else steps would pull in turn.

The float model lies in memory whole, for the teacher; a block's quantized weights are made when it runs and again for
its gradient (activation checkpointing), so activations cost one block's, the outputs between them and three logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quant.calibration.replay import instead
from quant.errors import SettingsError, SolverError
from quant.kernels.packed import Packed
from quant.models.structure import inside
from quant.models.walk import Site
from quant.recovery.interrupted import keep, restore
from quant.recovery.placed import as_parameter, oriented, placed
from quant.recovery.timesteps import divergence, has_vocabulary, row_errors, usual_errors
from quant.recovery.trainable import Tunable, Vector
from quant.recovery.tunable import tunable
from quant.recovery.tuning import in_turn
from quant.rounding import rounding


@dataclass(frozen=True, eq=False)
class Whole:
    """A solved model. `model`: the float one, all of it loaded; `output(batch)`: its logits or other main output;
    `blocks`: names of its blocks. `packed`: what each site was solved to. `metric(name)`: how much errors in a site's
    rows count (`solvers/metric.py`), where that is known. `vectors`: the float parameters to train, with the dtype they
    are stored in; `ends`: the student's of other parameters, which stay (`ends.py`). `batches`: what `output` takes, to
    train on; `judged`: to say whether it helped. `times`: a diffusion transformer's timestep of each row, by number,
    int64 `[rows]` by batch. `progress(done, steps, loss)`: `loss` to the untuned one's. `state`: a file.
    """

    model: nn.Module
    output: Callable[[Mapping[str, Any]], Tensor]
    blocks: Sequence[str]
    sites: Mapping[str, Site]
    packed: Mapping[str, Packed]
    metric: Callable[[str], Tensor | None]
    vectors: Mapping[str, torch.dtype]
    ends: Mapping[str, Tensor]
    batches: Sequence[Mapping[str, Any]]
    judged: Sequence[Mapping[str, Any]]
    times: Sequence[Tensor] | None
    progress: Callable[[int, int, float], None]
    state: Path
    pause: float


@dataclass(frozen=True, eq=False)
class Tuned:
    """`packed` by site, `vectors` by parameter in their stored dtypes. `before`, `after`: mean loss on `judged`;
    nats per token where the model has a vocabulary, 1 before the tuning of a diffusion transformer."""

    packed: Mapping[str, Packed]
    vectors: Mapping[str, Tensor]
    before: float
    after: float


@dataclass(frozen=True)
class Distillation:
    """See the module. A step takes one batch. `samples`: windows of the calibration text to train on, drawn apart from
    those that the solvers saw, which then judge the result: codes are as many as weights, and adapt to windows that
    they are shown again and again. A text that so many windows cover has no tokens left that only judge. 0, and always
    for a diffusion transformer: the calibration's own. `rate`: of Adam, relative to each
    scale and to the root mean square of each vector; it falls to 0 linearly. `codes`: levels by which a place may move,
    twice; 0 leaves the codes. A diffusion transformer's stay: tuned, they cost its images up to 4 dB
    (docs/diffusion.md). `only`: patterns over the names of sites and vectors; what none matches is left as it was
    solved (QuEST, arXiv 2402.03666, tunes the layers that read the time embedding and the most sensitive ones). Empty:
    all.
    """

    steps: int = 128
    samples: int = 0
    rate: float = 0.005
    codes: float = 0.0
    seed: int = 0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rates = (self.rate, self.codes)
        if min(self.steps, self.samples + 1) < 1 or not all(0 <= r < math.inf for r in rates) or not sum(rates):
            raise SettingsError(
                f"distillation: steps is {self.steps}, samples {self.samples}, rate {self.rate}, codes {self.codes}; "
                "steps is at least 1, samples not negative, the rates finite and not negative, and one of them above 0"
            )

    def check(self, names: Collection[str]) -> None:
        """Raises `SettingsError` if a pattern of `only` matches none of the sites and parameters."""
        for pattern in self.only:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SettingsError(
                    f"distillation.only: {pattern!r} matches no linear and no parameter; --dry-run lists the linears"
                )

    def tune(self, whole: Whole) -> Tuned:
        """Same task, same bytes, however often it was interrupted. Where moving codes helped nothing, the scales and
        vectors are tuned alone: codes that errors were fed back to are more easily hurt."""
        tuned = self._tuned(whole)
        if tuned.after < tuned.before or not self.codes or not self.rate or whole.times is not None:
            return tuned
        return replace(self, codes=0.0)._tuned(replace(whole, state=whole.state.with_stem("scales")))

    def _tuned(self, whole: Whole) -> Tuned:
        student = _Student(whole, self.codes > 0 and whole.times is None, self.only)
        before = student.loss_of_all() if whole.times is None else student.measure()
        vectors = {name: whole.model.get_parameter(name).to(kind) for name, kind in whole.vectors.items()}
        if not before > 0:
            return Tuned(whole.packed, vectors, before, before)
        with torch.enable_grad():
            self._train(whole, student, before)
        after = student.loss_of_all()
        if not after < before:
            return Tuned(whole.packed, vectors, before, before)
        return Tuned(*student.result(), before, after)

    def _train(self, whole: Whole, student: _Student, usual: float) -> None:
        parameters, codes = student.parameters(), student.codes()
        adam = torch.optim.Adam(parameters, lr=self.rate, betas=(0.9, 0.95))
        kept = [*parameters, *codes, *student.held()]
        first, saved = restore(whole.state, kept, adam), time.monotonic()
        for step, number in enumerate(in_turn(len(whole.batches), self.steps, self.seed)):
            if step < first:
                continue
            decay = 1 - step / self.steps
            loss = student.backward(number)
            if not math.isfinite(loss):
                what = f"the end-to-end tuning's loss is not finite at step {step}"
                raise SolverError(f"{what}; lower distillation.rate, or compute in float32")
            adam.param_groups[0]["lr"] = self.rate * decay
            adam.step()
            with torch.no_grad():
                for place in codes:
                    if place.grad is not None:
                        place.sub_(place.grad.sign(), alpha=self.codes * decay / self.steps)
                student.settle(step)
            for parameter in (*parameters, *codes):
                parameter.grad = None
            whole.progress(step + 1, self.steps, loss / usual)
            if time.monotonic() - saved > whole.pause and step + 1 < self.steps:
                keep(whole.state, step + 1, kept, adam)
                saved = time.monotonic()


class _Student:
    """The model with trainable weights. Where it is not being run it is the teacher."""

    def __init__(self, whole: Whole, train_codes: bool, only: tuple[str, ...]) -> None:
        self.whole, self.model = whole, whole.model
        self.tunables: dict[str, Tunable] = {}
        for name, packed in whole.packed.items():
            site = whole.sites[name]
            matrix = oriented(whole.model.get_parameter(site.parameter), site).float().reshape(site.shape)
            self.tunables[name] = tunable(packed, matrix, train_codes, whole.metric(name))
        self.vectors = {n: Vector(whole.model.get_parameter(n), kind) for n, kind in whole.vectors.items()}
        self.inside = {
            block: [name for name, site in whole.sites.items() if name in whole.packed and inside(site.name, block)]
            for block in whole.blocks
        }
        self.vocabulary = has_vocabulary(whole.model)
        self.usual: Tensor | None = None
        wanted = lambda name: not only or any(fnmatchcase(name, pattern) for pattern in only)  # noqa: E731
        self.chosen = [one for name, one in self.tunables.items() if wanted(name)]
        self.moved = [one.change for name, one in self.vectors.items() if one.unit > 0 and wanted(name)]
        if not self.chosen and not self.moved:
            raise SettingsError(
                f"distillation.only {list(only)} matches nothing that can be tuned; leave it empty for all"
            )

    def parameters(self) -> list[Tensor]:
        return [parameter for one in self.chosen for parameter in one.scales()] + self.moved

    def codes(self) -> list[Tensor]:
        return [parameter for one in self.chosen for parameter in one.codes()]

    def held(self) -> list[Tensor]:
        return [tensor for one in self.chosen for tensor in one.held()]

    def settle(self, step: int) -> None:
        for one in self.chosen:
            one.settle(step)

    def result(self) -> tuple[dict[str, Packed], dict[str, Tensor]]:
        packed = {name: one.pack() for name, one in self.tunables.items()}
        return packed, {name: one.stored() for name, one in self.vectors.items()}

    @torch.no_grad()
    def loss_of_all(self) -> float:
        total, count = 0.0, 0
        for number, batch in enumerate(self.whole.judged):
            target = self.whole.output(batch)
            with self._in_place():
                loss = self._loss(number, self.whole.output(batch), target)
            total, count = total + float(loss) * len(target), count + len(target)
        return total / max(1, count)

    @torch.no_grad()
    def measure(self) -> float:
        """Learns the untuned error of each timestep; returns the loss, which is now 1, or 0 where there is no error."""
        assert self.whole.times is not None
        errors = list[Tensor]()
        for batch in self.whole.batches:
            target = self.whole.output(batch)
            with self._in_place():
                errors.append(row_errors(self.whole.output(batch), target))
        self.usual = usual_errors(errors, self.whole.times)
        return float(bool(self.usual.sum() > 0))

    def backward(self, number: int) -> float:
        """Adds the gradients of the loss on one batch to the parameters'; returns the loss."""
        batch = self.whole.batches[number]
        with torch.no_grad():
            target = self.whole.output(batch)
        with self._in_place():
            loss = self._loss(number, self.whole.output(batch), target)
            del target  # or its logits stay beside the gradients
            loss.backward()
        return float(loss.detach())

    def _loss(self, number: int, output: Tensor, target: Tensor) -> Tensor:
        if self.usual is not None and self.whole.times is not None:
            usual = self.usual[self.whole.times[number].to(self.usual.device)]
            return (row_errors(output, target) / usual.clamp_min(1e-30)).mean()
        if self.vocabulary:
            return divergence(output, target)
        output, target = output.float(), target.float()
        return (output - target).square().sum() / target.square().sum().clamp_min(1e-30)

    @contextmanager
    def _in_place(self) -> Generator[None]:
        """The trained weights in the model, block by block as they are run."""
        values = {**self.whole.ends, **{name: one.value() for name, one in self.vectors.items()}}
        with ExitStack() as changed:
            for block, names in self.inside.items():
                module = self.model.get_submodule(block)
                changed.enter_context(instead(module, "forward", self._checkpointed(module.forward, names)))
            changed.enter_context(placed(self.model, values))
            changed.enter_context(rounding(self.model, self.whole.sites, self.whole.packed))
            yield

    def _checkpointed(self, forward: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            sites = [self.whole.sites[name] for name in names]
            weights = {site.parameter: as_parameter(site, self.tunables[site.name].weight()) for site in sites}
            with placed(self.model, weights):
                return forward(*args, **kwargs)

        def block(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return block
