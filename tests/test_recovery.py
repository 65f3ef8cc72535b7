"""What is done to a solved block: it gets better, in the same bytes, twice the same, and killed runs go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quant import Recipe, Settings, quantize
from quant.calibration.statistics import HessianCollector
from quant.errors import SettingsError, SolverError
from quant.estimate import estimate
from quant.eval.perplexity import encode, measure, resolve, rule_for
from quant.eval.subject import open_subject
from quant.kernels import paths, viterbi
from quant.kernels.codebook import PackedCodebook
from quant.kernels.layouts import PackedTrellis
from quant.kernels.lowrank import PackedLowRank
from quant.kernels.packed import Packed
from quant.kernels.rotated import PackedRotated
from quant.kernels.spec import Codebook, LowRank, Rotated, Smoothed, Spec, Trellis, Uniform
from quant.models.walk import Site
from quant.prepare import prepare
from quant.progress import Progress
from quant.recipe import override, recipe_from_dict
from quant.recovery import tuning
from quant.recovery.distillation import Distillation
from quant.recovery.placed import placed
from quant.recovery.tunable import KINDS, tunable
from quant.recovery.tunable_trellis import LEAN_TRELLIS, TunableTrellis
from quant.recovery.tuning import BlockTuning, Task, in_turn, saliencies
from quant.solvers.basis import rotation
from quant.solvers.feedback import Feedback
from quant.solvers.nearest import Nearest
from tests import tiny
from tests.architectures import batch, make

SHORT = ["calibration.samples=16", "calibration.sequence_length=64", "calibration.batch_size=2"]
STEPS = 30


def perplexity(folder: Path) -> float:
    subject, text = open_subject(str(folder), "cpu", "float32"), resolve("python-docs")
    encoded = encode(subject.tokenizer(), replace(text, text=text.text[:10_000]))
    return measure(subject, encoded, rule_for(subject, 256, None, 32)).token


# --- the trained model


@pytest.fixture(scope="module")
def tuned(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The demonstration model at 2 bits, solved and tuned."""
    folder = tmp_path_factory.mktemp("tuned")
    plain = override(Recipe(spec=Uniform(bits=2, group_size=64)), SHORT)
    return quantize(str(demo), folder / "plain", plain), quantize(
        str(demo), folder / "tuned", replace(plain, recovery=BlockTuning(steps=STEPS))
    )


def test_blocks_and_model_get_better_in_as_many_bytes(tuned: tuple[Any, Any]) -> None:
    plain, better = tuned
    gains = [block["recovery"] for block in better.report["blocks"] if "recovery" in block]
    assert len(gains) == 4
    assert all(gain["after"] < 0.95 * gain["before"] for gain in gains)
    assert not any("recovery" in block for block in plain.report["blocks"])
    assert better.report["bits"] == plain.report["bits"]
    assert better.report["files"] == plain.report["files"]
    assert perplexity(better.out) < 0.97 * perplexity(plain.out)


def test_it_is_told(tuned: tuple[Any, Any]) -> None:
    card, page = ((tuned[1].out / name).read_text() for name in ("README.md", "report.html"))
    assert "block tuning" in card
    assert f"steps {STEPS}" in card
    assert "block tuning" in page
    assert recipe_from_dict(tuned[1].report["recipe"]).recovery == BlockTuning(steps=STEPS)


# --- any model, twice, killed


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_transposed_weights_and_experts(name: str, words: Path, tmp_path: Path) -> None:
    model = tiny.model(name, tmp_path / "model")
    recipe = replace(tiny.recipe(words, bits=2), solver=Nearest(), recovery=BlockTuning(steps=16, codes=0.2))
    first = quantize(str(model), tmp_path / "first", recipe)
    assert any(block["recovery"]["after"] < block["recovery"]["before"] for block in first.report["blocks"])
    quantize(str(model), tmp_path / "again", recipe)
    assert tiny.contents(tmp_path / "again") == tiny.contents(tmp_path / "first")
    assert first.report["verification"]["worst_difference"] < 1e-4


class Killed(BaseException):
    pass


class KillsWhileTuning(Progress):
    """Ends a run inside the tuning of its block number `last`."""

    def __init__(self, last: int) -> None:
        self.last, self.now = last, -1

    def block(self, index: int, name: str) -> None:
        self.now = index

    def recovering(self, done: int, steps: int, loss: float) -> None:
        if self.now == self.last and done == 3:
            raise Killed


@pytest.mark.parametrize("match", ["quantized", "float"])
def test_killed_while_tuning(match: str, words: Path, tmp_path: Path) -> None:
    model = tiny.model("gemma4", tmp_path / "model")  # what its blocks leave for later ones goes to the disk too
    recipe = replace(tiny.recipe(words, f"match={match}", bits=2), recovery=BlockTuning(steps=6))
    where = Settings(spill_bytes=0)
    quantize(str(model), tmp_path / "whole", recipe, settings=where)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(str(model), out, recipe, settings=where, progress=KillsWhileTuning(2))
    assert quantize(str(model), out, recipe, settings=where, mode="resume").report["resumed_blocks"] == 2
    assert tiny.contents(out) == tiny.contents(tmp_path / "whole")


@pytest.mark.parametrize("around", [lambda base: base, Smoothed], ids=["branch", "smoothed branch"])
def test_resumed_with_a_branch_beside_rounded_inputs(around: Any, words: Path, tmp_path: Path) -> None:
    """Later blocks see what the stored branch makes of what rounding took, in both runs."""
    model = tiny.model("gemma3", tmp_path / "model")
    spec = around(LowRank(Uniform(bits=3, group_size=32, activations=8), rank=4))
    recipe = replace(tiny.recipe(words), spec=spec, recovery=BlockTuning(steps=12, scales=0.01, codes=0))
    quantize(str(model), tmp_path / "whole", recipe)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize(str(model), out, recipe, progress=KillsWhileTuning(2))
    resumed = quantize(str(model), out, recipe, mode="resume").report
    assert resumed["resumed_blocks"] == 2
    assert any(block["recovery"]["after"] < block["recovery"]["before"] for block in resumed["blocks"][:2])
    assert tiny.contents(out) == tiny.contents(tmp_path / "whole")


def test_a_dry_run_counts_it(llama: Path, words: Path) -> None:
    recipe = tiny.recipe(words)
    without = estimate(prepare(str(llama), recipe))
    long = estimate(prepare(str(llama), replace(recipe, recovery=BlockTuning(steps=100_000))))
    assert long.seconds > without.seconds + 10
    assert long.weight_files == without.weight_files


def test_a_dry_run_pays_for_compiling_once_and_not_in_every_block(
    llama: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks, and searches that take a minute to compile when they are first asked for."""
    late, compiled = [0.0], set[int | str]()
    now, find = time.perf_counter, viterbi._compiled

    def slow(bits: int) -> Any:
        late[0] += 0.0 if bits in compiled else 60.0
        compiled.add(bits)
        return find(bits)

    monkeypatch.setattr(time, "perf_counter", lambda: now() + late[0])

    def late_once(name: str) -> None:
        work = getattr(paths, name)

        def called(*arguments: Any) -> Any:
            late[0] += 0.0 if name in compiled else 60.0
            compiled.add(name)
            return work(*arguments)

        monkeypatch.setattr(paths, name, called)

    monkeypatch.setattr(viterbi, "_compiled", slow)
    late_once("decode")
    late_once("rotate")
    recipe = replace(tiny.recipe(words), spec=Rotated(Trellis(window=8)), solver=Feedback(sweeps=0))
    predicted = estimate(prepare(str(llama), recipe))
    assert compiled == {4, "decode", "rotate"}  # two codes of two bits to a state
    assert predicted.rehearsal_seconds > 180 > 60 > predicted.seconds


# --- settings


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"codes": -1.0},
        {"scales": float("nan")},
        {"codes": 0.0, "scales": 0.0},
        {"codes": float("inf")},
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="recovery"):
        BlockTuning(**values)


def test_recipes_with_bad_recoveries_are_refused() -> None:
    with pytest.raises(SettingsError, match="tuning trains on the calibration text"):
        Recipe(calibration=None, recovery=BlockTuning())
    with pytest.raises(SettingsError, match="recovery kind 'Magic' is unknown; this version has Assignments"):
        recipe_from_dict({"recovery": {"kind": "Magic"}})
    with pytest.raises(SettingsError, match="unknown key 'rate'"):
        recipe_from_dict({"recovery": {"kind": "BlockTuning", "rate": 1}})
    assert recipe_from_dict({"recovery": None}).recovery is None
    assert override(Recipe(recovery=BlockTuning()), ["recovery.steps=7"]).recovery.steps == 7


# --- one block


SPECS = [
    Uniform(bits=3, group_size=32), Uniform(bits=2, group_size=-1, symmetric=True),
    Uniform(bits=4, group_size=40, scale_dtype="bfloat16"), Trellis(), Rotated(), Rotated(base=Uniform(bits=2)),
    Rotated(Trellis(code="hyb", table_bits=6)), LowRank(Trellis(bits=3, length=32), rank=4),
    Codebook(length=2, index_bits=4), Codebook(length=3, index_bits=5, second_bits=3, share=0.2, rows=40),
    Smoothed(Rotated(), points=3), Smoothed(Uniform(bits=3, group_size=32), points=3),
]  # fmt: skip


def solved(spec: Spec, solver: Any = None, rows: int = 64, columns: int = 96) -> tuple[torch.Tensor, Packed]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) / 8
    weight[5] = 0
    collector = HessianCollector(columns)
    inputs = torch.randn(400, columns, generator=generator).cumsum(1) / 4
    collector.update(inputs)
    statistics = replace(collector.finish(), peaks=inputs.abs().amax(0)[None], sample=inputs[:50])
    return weight, (solver or Feedback()).solve(weight, statistics, spec).packed


def changed(before: Packed, after: Packed) -> float:
    """The share of a trellis's or a codebook's codes in which they differ."""
    while hasattr(before, "base"):
        before, after = before.base, after.base  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    if isinstance(before, PackedCodebook):
        assert isinstance(after, PackedCodebook)
        first, second = (a != b for a, b in zip(before.indices(), after.indices(), strict=True))
        first[:, before.fine(0)] |= second
        return float(first.float().mean())
    if not isinstance(before, PackedTrellis):
        return 0.0
    assert isinstance(after, PackedTrellis)
    assert after.spec == before.spec
    width = before.spec.step
    counts = [(before.states(n) ^ after.states(n)) % (1 << width) != 0 for n in range(len(before.peaks))]
    return sum(int(part.count_nonzero()) for part in counts) / sum(part.numel() for part in counts)


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_trained_is_what_is_stored(spec: Spec, codes: bool) -> None:
    weight, packed = solved(spec)
    one = tunable(packed, weight, codes)
    assert {name: tensor.tolist() for name, tensor in one.pack().tensors().items()} == {
        name: tensor.tolist() for name, tensor in packed.tensors().items()
    }
    generator = torch.Generator().manual_seed(1)
    (one.weight() * torch.randn(weight.shape, generator=generator)).sum().backward()
    assert one.scales()
    assert bool(one.codes()) is codes
    for parameter in (*one.codes(), *one.scales()):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.count_nonzero() > 0
        with torch.no_grad():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    for step in range(4):
        before = one.pack()
        one.settle(step)
        assert changed(before, one.pack()) <= max(0.01, 1 / weight.shape[1])
    after = one.pack()
    after.validate()
    assert not torch.equal(after.dequantize(), packed.dequantize())
    # the rotations are sums in another order, and factors are multiplied in another
    torch.testing.assert_close(
        one.weight().detach(),
        after.dequantize(),
        rtol=0,
        atol=1e-6 if isinstance(spec, Rotated | Smoothed | Codebook) else 0,
    )


def test_what_lies_around_codes_hands_on_what_is_left() -> None:
    """Places of codes lie towards the float weight as the base sees it, not towards the weight itself."""
    base = Uniform(bits=2, group_size=32)
    for spec in (LowRank(base, rank=4), Rotated(base, block=32, measured=False), Smoothed(base)):
        weight, packed = solved(spec)
        inside: Any = packed
        if isinstance(packed, PackedLowRank):
            left = weight - packed.lora_b.float() @ packed.lora_a.float()
        elif isinstance(packed, PackedRotated):
            left = packed.outputs().apply(packed.inputs().apply(weight).T).T
        else:
            factors = torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.5
            inside = packed = replace(inside, smooth=factors.half())
            left = weight / inside.smooth.float()
        place, expected, alone = (
            tunable(p, w, True).codes()[0].detach()
            for p, w in ((packed, weight), (inside.base, left), (inside.base, weight))
        )
        torch.testing.assert_close(place, expected, rtol=1e-4, atol=1e-4)
        assert float((place - alone).abs().max()) > 0.1
        codes = inside.base.codes()
        assert float((place - codes).abs().max()) <= 0.49 + 1e-6
        near = inside.base.scales.float().repeat_interleave(32, 1)
        lies = left / near + inside.base.zero_points().repeat_interleave(32, 1)
        there = (lies - codes).abs() < 0.49
        torch.testing.assert_close(place[there], lies[there], rtol=1e-3, atol=1e-3)


def test_columns_that_gain_most_are_taken_first() -> None:
    """Of those whose turn it is; and a path that keeps its seam at one place is looked for at another in turn."""
    weight, packed = solved(Trellis(window=8), columns=96)
    one = tunable(packed, weight, True)
    assert isinstance(one, TunableTrellis)
    (place,) = one.codes()
    scale = torch.where(one.start > 0, one.start, torch.inf)[:, None]
    toward = torch.lerp(one.levels.float(), weight / scale, LEAN_TRELLIS)
    torch.testing.assert_close(place.detach() * one.unit, toward)
    with torch.no_grad():
        place += 0.7 * torch.randn(place.shape, generator=torch.Generator().manual_seed(1))
    lost = lambda: ((one.levels.float() - place.detach() * one.unit) * one.start[:, None]).square().sum(0)  # noqa: E731
    before, old = lost(), [states.clone() for states in one.states]
    one.settle(0)
    gains = before - lost()
    taken = (gains != 0).nonzero()[:, 0]
    assert 0 < len(taken) < 6
    assert bool((taken % 4 == 0).all())
    for states, was in zip(one.states, old, strict=True):
        states.copy_(was)
    with pytest.MonkeyPatch.context() as patch:  # what all of them would have gained
        patch.setattr("quant.recovery.tunable_trellis.MOST", 1.0)
        one.settle(0)
        every = before - lost()
        assert float(gains[taken].min()) >= float(every.sort(descending=True)[0][len(taken) - 1]) * (1 - 1e-5)
        again = lost()
        one.settle(0)
        assert torch.equal(lost(), again)  # the best of this seam were found
        one.settle(4)
        assert float(lost().sum()) < float(again.sum())


def test_batches_come_in_turn_and_each_round_anew() -> None:
    order = in_turn(5, 13, 0)
    assert len(order) == 13
    assert all(sorted(order[start : start + 5]) == list(range(5)) for start in (0, 5))
    assert len({tuple(order[:5]), tuple(order[5:10]), tuple(range(5))}) == 3
    assert in_turn(5, 13, 0) == order != in_turn(5, 13, 1)


@pytest.mark.parametrize("which", ["recovery", "block"])
def test_seeds_choose_the_batches(which: str) -> None:
    work, short = task(), BlockTuning(steps=30)
    one = short.recover(work).packed["a"].dequantize()
    other = BlockTuning(steps=30, seed=1).recover(work) if which == "recovery" else short.recover(replace(work, seed=1))
    assert not torch.equal(one, other.packed["a"].dequantize())
    assert torch.equal(one, short.recover(work).packed["a"].dequantize())


def test_steps_become_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A code moves by at most half of `codes` in all, and rates of scales fall to nothing."""
    rates, made, step = list[float](), list[Any](), torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: rates.append(adam.param_groups[0]["lr"]) or step(adam))
    monkeypatch.setattr(tuning, "tunable", lambda *given: made.append(tunable(*given)) or made[-1])
    work = task()
    start = tunable(work.packed["a"], work.weights["a"], True).codes()[0].detach()
    BlockTuning(steps=8, codes=0.4, scales=0.01).recover(work)
    assert rates == pytest.approx([0.01 * (1 - n / 8) for n in range(8)])
    moved = (made[0].codes()[0].detach() - start).abs()
    assert float(moved.max()) == pytest.approx(0.4 / 2 * 9 / 8, rel=1e-3)


def test_codes_are_found_by_what_rows_count() -> None:
    """Places moved alike: where rows count more, the paths that are found lie nearer to them; not where rotated outputs
    mix rows."""
    rows = torch.tensor([16.0, 1.0, 1.0, 1.0]).repeat(16)[:, None]

    def found(packed: Packed, weight: torch.Tensor, counts: torch.Tensor | None) -> tuple[Packed, torch.Tensor]:
        one = tunable(packed, weight, True, counts)
        (place,), inner = one.codes(), one
        with torch.no_grad():
            place += 0.5 * torch.randn(place.shape, generator=torch.Generator().manual_seed(1))
        for step in range(200):
            one.settle(step)
        while not isinstance(inner, TunableTrellis):
            inner = inner.base  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
        return one.pack(), (inner.levels.float() - place.detach() * inner.unit).square().mean(1)

    for spec in (Trellis(window=8), Rotated(Trellis(window=8), measured=False), Smoothed(Trellis(window=8))):
        weight, packed = solved(spec)
        (_, heavy), (_, even) = found(packed, weight, rows), found(packed, weight, None)
        assert float(heavy[::4].mean()) < 0.7 * float(even[::4].mean())
        assert float(heavy.mean()) > float(even.mean())
    weight, packed = solved(Trellis(window=8))
    bases = [rotation(n, 128, weight) for n in reversed(weight.shape)]
    mixing = PackedRotated.around(Rotated(packed.spec, outputs=True), packed, *bases)
    assert torch.equal(*(found(mixing, weight, counts)[0].dequantize() for counts in (rows, None)))


def test_a_layout_without_a_tunable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, packed = solved(Rotated())
    monkeypatch.delitem(KINDS, PackedRotated)
    with pytest.raises(
        SettingsError, match="layout 'rotated' cannot be tuned; codebook, lowrank, smoothed, trellis, uniform can"
    ):
        tunable(packed, weight, True)


@pytest.mark.parametrize("how", [{"recovery": BlockTuning()}, {"distillation": Distillation()}])
def test_what_cannot_be_tuned_is_refused_before_any_work(
    how: dict[str, Any], llama: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(KINDS, PackedTrellis)
    with pytest.raises(SettingsError, match="layout 'trellis' cannot be tuned"):
        prepare(str(llama), replace(tiny.recipe(words), spec=Rotated(), **how))


def task(change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Task:
    """A gated pair of linears of which one is a site."""
    weight, packed = solved(Uniform(bits=2, group_size=32), Nearest())
    torch.manual_seed(3)
    model = nn.ModuleDict({"a": nn.Linear(96, 64), "b": nn.Linear(96, 64)}).requires_grad_(False)
    model["a"].weight.data = packed.dequantize()
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(64, 96, generator=generator).cumsum(1) / 4 for _ in range(6)]
    run: Any = lambda x, w: torch.tanh(nn.functional.linear(x, w)) * model["b"](x)  # noqa: E731
    return Task(
        model, "block", [Site("a", "linear", 64, 96, bias=True)], {"a": packed}, {"a": weight}, len(inputs),
        lambda number: change(run(inputs[number], model["a"].weight)), lambda number: run(inputs[number], weight),
        0, lambda *_: None,
    )  # fmt: skip


def test_the_model_is_left_as_it_was() -> None:
    work = task()
    before = {name: (id(parameter), parameter.clone()) for name, parameter in work.model.named_parameters()}
    found = BlockTuning(steps=60, codes=0.3).recover(work)
    assert found.after < found.before
    assert list(before) == [name for name, _ in work.model.named_parameters()]
    assert all(
        before[name][0] == id(p) and torch.equal(before[name][1], p) for name, p in work.model.named_parameters()
    )


def test_what_does_not_help_is_not_kept() -> None:
    work = task()
    found = BlockTuning(steps=4, codes=400.0, scales=1.0).recover(work)
    assert found.after == found.before
    assert found.packed is work.packed


def test_only_scales_or_only_codes() -> None:
    work = task()
    came: Any = work.packed["a"]
    for recovery, moved in ((BlockTuning(codes=0), "scales"), (BlockTuning(codes=0.3, scales=0), "weight")):
        found: Any = recovery.recover(work).packed["a"]
        same = {name for name, tensor in found.tensors().items() if torch.equal(tensor, came.tensors()[name])}
        assert same == {"weight", "scales", "zeros"} - {moved}


def test_saliency_pulls_towards_the_float_weights() -> None:
    work = task()
    with torch.enable_grad():
        salient = saliencies(work)["a"]
    lost = lambda packed: float(((packed.dequantize() - work.weights["a"]).square() * salient).sum())  # noqa: E731
    assert lost(work.packed["a"]) == pytest.approx(1)
    free, pulled = (BlockTuning(codes=0, scales=0.01, saliency=value).recover(work) for value in (0.0, 1.0))
    assert lost(pulled.packed["a"]) < 0.9 * lost(free.packed["a"])
    assert pulled.after < pulled.before


def test_saliency_has_scales_to_pull() -> None:
    with pytest.raises(SettingsError, match="saliency pulls scales, which scales=0 leaves"):
        BlockTuning(scales=0, saliency=1.0)


def test_saliency_is_in_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all batches, not once a step; a second each."""
    work, clock = task(), [0.0]

    def slow(one: Task) -> dict[str, torch.Tensor]:
        clock[0] += one.batches
        return {}

    monkeypatch.setattr("quant.recovery.tuning.saliencies", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert BlockTuning(saliency=1.0).rehearse(work, 60) == 60
    assert BlockTuning().rehearse(work, 60) == 0


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(SolverError, match="block: the tuning loss is not finite at step"):
        BlockTuning(steps=30).recover(task(change=lambda x: x if not x.requires_grad else x * float("inf")))


def test_gradients_of_experts_are_put_together_once() -> None:
    """Each stack's in one piece, where taking one matrix out after another adds a whole stack of zeros for each."""
    model = make("qwen3-moe")
    stacks = {n: p.requires_grad_() for n, p in model.named_parameters() if p.dim() == 3}

    def gradients() -> tuple[list[torch.Tensor], Counter[str]]:
        loss = model(**batch())[0].square().sum()
        nodes, waiting = set[Any](), [loss.grad_fn]
        while waiting:
            node: Any = waiting.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting += [following for following, _ in node.next_functions]
        return list(torch.autograd.grad(loss, list(stacks.values()))), Counter(node.name() for node in nodes)

    expected, before = gradients()
    with placed(model, stacks):
        found, after = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert before["UnbindBackward0"] == 0
    assert after["UnbindBackward0"] == len(stacks) == 4
    assert after["SelectBackward0"] < before["SelectBackward0"] - 2 * len(stacks)
