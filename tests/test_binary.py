"""Signs and salient columns: layout against its definition and price, and the solver against grids of one bit on a
trained weight."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quant
from quant.calibration.statistics import Statistics
from quant.kernels.binary import Binary, PackedBinary
from quant.kernels.layouts import LAYOUTS, LayoutError
from quant.kernels.packed import concatenate
from quant.kernels.packing import unpack
from quant.kernels.scales import NO_SCALE, scale_values
from quant.kernels.spec import SpecError, Uniform, spec_from_dict
from quant.recipe import load_recipe, override, recipe_from_dict
from quant.solvers.binary import STEP, BinaryRounder
from quant.solvers.feedback import Feedback
from quant.solvers.grid import SEARCH
from quant.solvers.rounder import rounder_for
from quant.solvers.solution import relative_error

specs = st.builds(Binary, share=st.sampled_from([0.1, 0.4, 1.0]), rows=st.sampled_from([7, 16, 4096]))
shapes = st.tuples(st.integers(1, 40), st.integers(1, 19))


def random_packed(spec: Binary, shape: tuple[int, int], seed: int = 0) -> PackedBinary:
    generator = torch.Generator().manual_seed(seed)
    promised, count = spec.tensors(shape), spec.salient(shape[1])
    draw = lambda name: torch.randint(0, 256, promised[name].shape, generator=generator).byte()  # noqa: E731
    groups = promised["peaks"].shape[0]
    salient = torch.rand((groups, shape[1]), generator=generator).argsort(1) < count
    mask = salient.repeat_interleave(spec.rows, 0)[: shape[0]]
    codes = torch.randint(-8, 8, shape, generator=generator).float()
    levels = torch.where(mask, codes, torch.where(codes < 0, -1.0, 1.0))
    peaks = torch.rand((groups, 3), generator=generator).half()
    return PackedBinary.from_levels(spec, levels, draw("scales"), draw("columns"), salient, peaks)


def naive_dequantize(packed: PackedBinary) -> Tensor:
    """The definition, bit by bit."""
    spec, (rows, columns) = packed.spec, packed.shape
    stored, weight = packed.tensors(), torch.full(packed.shape, torch.nan)
    streams = stored["weight"].view(rows, -1).tolist()

    def scale(code: Tensor, peak: Tensor) -> float:
        return 0.0 if int(code) == NO_SCALE else float(peak) * 2 ** (-int(code) / 16)

    for row in range(rows):
        group, (codes, signs) = row // spec.rows, (0, 8 * spec.widths(columns)[0])
        bits = [byte >> b & 1 for byte in streams[row] for b in range(8)]
        for i in range(columns):
            coded = int(stored["salient"][group, i // 8]) >> i % 8 & 1
            if coded:
                level, codes = sum(bits[codes + b] << b for b in range(4)) - 8, codes + 4
            else:
                level, signs = 2 * bits[signs] - 1, signs + 1
            wide = scale(stored["columns"][group, i], stored["peaks"][group, 2])
            weight[row, i] = level * wide * scale(stored["scales"][row, coded], stored["peaks"][group, coded])
    return weight


@settings(max_examples=30, deadline=None)
@given(specs, shapes, st.integers(0, 9))
def test_the_layout_is_the_definition_at_its_price(spec: Binary, shape: tuple[int, int], seed: int) -> None:
    packed = random_packed(spec, shape, seed)
    packed.validate()
    whole = packed.dequantize()
    torch.testing.assert_close(whole, naive_dequantize(packed), rtol=1e-6, atol=0)
    start, stop = seed % shape[0], shape[0] - seed % 2
    assert torch.equal(packed.dequantize(start=start, stop=stop), whole[start:stop])
    assert sum(t.nbytes for t in packed.tensors().values()) == spec.nbytes(shape)
    assert spec_from_dict(spec.to_dict()) == spec
    assert torch.equal(LAYOUTS["binary"].from_tensors(spec, shape, packed.tensors()).dequantize(), whole)


def test_parts_of_whole_groups_can_be_stacked() -> None:
    parts = [random_packed(Binary(share=0.3, rows=10), (rows, 9), rows) for rows in (20, 10, 4)]
    assert torch.equal(concatenate(parts).dequantize(), torch.cat([part.dequantize() for part in parts]))
    with pytest.raises(LayoutError, match="multiple of 10"):
        concatenate(parts[::-1])


@pytest.mark.parametrize(("name", "value"), [("share", 0), ("share", 1.5), ("share", True), ("bits", "1"), ("rows", 0)])
def test_impossible_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=name):
        spec_from_dict({"layout": "binary", name: value})


@settings(max_examples=25, deadline=None)
@given(st.floats(1.3, 4.5), st.integers(64, 2048), st.integers(64, 2048))
def test_a_choice_stays_within_the_bits_asked(bits: float, rows: int, columns: int) -> None:
    try:
        found = Binary(bits=bits).chosen((rows, columns))
    except SpecError:
        assert bits < 1.6  # scales of 64 rows and columns take half a bit
        return
    more = Binary(share=(found.salient(columns) + 2) / columns) if found.salient(columns) + 2 <= columns else None
    assert found.bits_per_weight((rows, columns)) <= bits
    assert more is None or more.bits_per_weight((rows, columns)) > bits
    assert Binary(bits=bits).nbytes((rows, columns)) == found.nbytes((rows, columns))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match=r"do not fit in 1\.1 bits"):
        Binary(bits=1.1).chosen((64, 64))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("peaks", torch.nan, "finite"),
        ("peaks", -1.0, "at least 0"),
        ("salient", 0, "marked"),
        ("weight", 255, "padding"),
    ],
)
def test_altered_contents_are_refused(name: str, value: float, said: str) -> None:
    packed = random_packed(Binary(share=0.4), (10, 9))
    tensors = {key: tensor.clone() for key, tensor in packed.tensors().items()}
    tensors[name].view(-1)[:] = value
    with pytest.raises(LayoutError, match=said):
        PackedBinary.from_tensors(packed.spec, packed.shape, tensors).validate()
    del tensors[name]
    with pytest.raises(LayoutError, match="missing"):
        PackedBinary.from_tensors(packed.spec, packed.shape, tensors)


@pytest.mark.parametrize(("byte", "beyond"), [(1, 0xF0), (2, 0xC0)])
def test_padding_of_codes_and_of_signs_is_looked_at(byte: int, beyond: int) -> None:
    packed = random_packed(Binary(share=1 / 3), (10, 9))  # three codes, six signs
    packed.validate()
    packed.weight.view(10, 3)[4, byte] |= beyond
    with pytest.raises(LayoutError, match="padding"):
        packed.validate()


def test_less_error_than_one_bit_and_less_bits_than_two(trained: tuple[Tensor, Statistics]) -> None:
    weight, statistics = trained
    one, two = (Feedback().solve(weight, statistics, Uniform(bits=bits, group_size=64)) for bits in (1, 2))
    found = Feedback().solve(weight, statistics, Binary(bits=1.61))
    assert found.packed.spec.bits_per_weight(found.packed.shape) <= 1.61
    assert two.error < found.error < 0.6 * one.error
    assert found.error == pytest.approx(relative_error(weight, found.packed.dequantize(), statistics.hessian))
    grouped = Feedback().solve(weight, statistics, Binary(share=0.15, rows=64))
    assert grouped.error < 0.7 * one.error
    plain = Feedback(sweeps=0).solve(weight, statistics, found.packed.spec).error
    assert found.error < plain


def test_codes_go_where_inputs_are_largest(trained: tuple[Tensor, Statistics]) -> None:
    weight, statistics = trained
    packed = Feedback().solve(weight, statistics, Binary(share=0.1, rows=64)).packed
    assert isinstance(packed, PackedBinary)
    mask = unpack(packed.salient, 1, weight.shape[1]).bool()
    largest = statistics.diagonal.topk(packed.spec.salient(weight.shape[1]))[1].sort()[0]
    for group in mask:
        assert torch.equal(group.nonzero()[:, 0], largest)


def test_scales_are_fitted_to_what_counts(trained: tuple[Tensor, Statistics]) -> None:
    """An input that is always zero has no say in a row's scales, and none without codes in the scale of codes."""
    weight, importance = trained[0][:48, :64].clone(), trained[1].diagonal[:64].clone()
    importance[40:] = 0
    made: list[BinaryRounder] = []
    for silent in (1.0, 100.0):
        weight[:, 40:] *= silent
        made.append(BinaryRounder(Binary(share=0.2), (48, 64), weight.device))
        made[-1].fit(0, weight, importance)
    assert torch.equal(made[0].row_codes, made[1].row_codes)
    assert torch.equal(made[0].peaks[:, :2], made[1].peaks[:, :2])

    weight[:24, made[0].salient] *= 3  # and what becomes of the columns' scales
    made[0].fit(0, weight, importance)
    rows = scale_values(made[0].row_codes, made[0].peaks[:1, :2])
    wide = scale_values(made[0].column_codes, made[0].peaks[:, 2:])
    coded = importance * made[0].salient
    spread = ((weight / wide).square() @ coded / coded.sum()).sqrt()
    torch.testing.assert_close(rows[:, 1], STEP * spread, rtol=0.05, atol=0)  # codes of scales: 2.2 % each


@pytest.mark.parametrize(("count", "together"), [(48, 0.0), (4, 100.0)])
def test_refit_never_hurts(trained: tuple[Tensor, Statistics], count: int, together: float) -> None:
    """Of few rows and inputs that move together the best columns, rounded as they are stored, are often worse."""
    hessian = trained[1].hessian[:64, :64] + 0.01 * torch.eye(64) + together
    lost = lambda found: float((((weight - found) @ hessian) * (weight - found)).sum())  # noqa: E731
    for start in (0, 48):
        weight = trained[0][start : start + count, :64]
        rounder = rounder_for(Binary(share=0.2, rows=20), (count, 64), weight.device, SEARCH)
        rounder.fit(0, weight, hessian.diagonal())
        found = torch.cat([rounder.round(torch.tensor([i]), weight[:, i : i + 1]) for i in range(64)], 1)
        errors = [lost(found), *(lost(rounder.refit(weight, hessian)) for _ in range(6))]
        assert errors[1] < 0.99 * errors[0]
        assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
        packed = rounder.pack()
        packed.validate()
        assert lost(packed.dequantize()) <= errors[-1] * (1 + 1e-4)


def test_a_checkpoint_keeps_its_promise_and_runs(llama: Path, words: Path, tmp_path: Path) -> None:
    data = load_recipe("balanced").to_dict() | {"spec": Binary(bits=2.5).to_dict()}
    small = (f"calibration.text={words}", "calibration.samples=4", "calibration.sequence_length=32")
    recipe = override(recipe_from_dict(data), small)
    first = quant.quantize(str(llama), tmp_path / "a", recipe)
    assert first.report["bits"]["promised"] == pytest.approx(first.written.measured_bits)
    assert first.written.measured_bits <= 2.5
    assert all(site["spec"]["share"] for site in first.report["sites"])
    with torch.no_grad():
        assert bool(torch.isfinite(quant.load(tmp_path / "a")(torch.arange(10, 40)[None]).logits).all())
