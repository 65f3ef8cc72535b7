"""Codebooks: layout against its definition and price, k-means, and the solver against uniform grids on a trained
weight."""

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
from quant.kernels.codebook import Codebook, PackedCodebook, codebook_for
from quant.kernels.layouts import LAYOUTS, LayoutError
from quant.kernels.packed import concatenate
from quant.kernels.packing import pack_planes, unpack_planes
from quant.kernels.scales import NO_SCALE
from quant.kernels.spec import DTYPES, Rotated, SpecError, Uniform, spec_from_dict
from quant.recipe import load_recipe, override, recipe_from_dict
from quant.solvers import kmeans
from quant.solvers.codebook import CodebookRounder
from quant.solvers.feedback import Feedback
from quant.solvers.grid import SEARCH
from quant.solvers.rounder import rounder_for
from quant.solvers.solution import relative_error
from tests import tiny

specs = st.builds(
    Codebook,
    length=st.integers(1, 5),
    index_bits=st.integers(1, 10),
    second_bits=st.sampled_from([0, 0, 3, 9]),
    share=st.sampled_from([0.2, 0.5, 1.0]),
    rows=st.sampled_from([7, 16, 4096]),
)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 19))


def random_packed(spec: Codebook, shape: tuple[int, int], seed: int = 0) -> PackedCodebook:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, size: torch.randint(0, high, size, generator=generator, dtype=torch.int32)  # noqa: E731
    promised, vectors, fine = spec.tensors(shape), sum(spec.vectors(shape[0])), spec.finer(shape[1])
    made = {n: torch.randn(t.shape, generator=generator).half() for n, t in promised.items() if t.dtype == "float16"}
    made["peaks"] = made["peaks"].abs()
    made["scales"] = draw(256, promised["scales"].shape).byte()
    first, second = draw(1 << spec.index_bits, (vectors, shape[1])), draw(1 << spec.second_bits, (vectors, fine))
    columns = torch.randperm(shape[1], generator=generator)[:fine].sort()[0]
    return PackedCodebook.from_indices(spec, shape, first, second, columns, made)


def naive_dequantize(packed: PackedCodebook) -> Tensor:
    """The definition, index by index, read bit by bit."""
    spec, (rows, columns) = packed.spec, packed.shape
    stored, weight = packed.tensors(), torch.full(packed.shape, torch.nan)
    streams = stored["weight"].view(-1, sum(spec.widths(columns))).tolist()

    def index(stream: list[int], n: int, i: int, bits: int) -> int:
        low = min(bits, 8)
        read = lambda part, width: sum(  # noqa: E731
            (part[(i * width + b) // 8] >> (i * width + b) % 8 & 1) << b for b in range(width)
        )
        return read(stream, low) + (read(stream[n:], bits - 8) << 8 if bits > 8 else 0)

    for row in range(rows):
        group, place = row // spec.rows, row % spec.rows
        vector = sum(spec.vectors(rows)[:group]) + place // spec.length
        marked = list(range(columns)) if spec.second_bits else []
        if "columns" in stored:
            marked = [i for i in range(columns) if int(stored["columns"][group, i // 8]) >> i % 8 & 1]
        code = int(stored["scales"][row])
        scale = 0.0 if code == NO_SCALE else float(stored["peaks"][group]) * 2 ** (-code / 16)
        for i in range(columns):
            value = stored["codebook"][group, index(streams[vector], columns, i, spec.index_bits), place % spec.length]
            value = float(value)
            if i in marked:
                rest = streams[vector][spec.widths(columns)[0] :]
                found = index(rest, len(marked), marked.index(i), spec.second_bits)
                value += float(stored["second"][group, found, place % spec.length])
            weight[row, i] = value * scale
    return weight


@settings(max_examples=30, deadline=None)
@given(specs, shapes, st.integers(0, 9))
def test_the_layout_is_the_definition_at_its_price(spec: Codebook, shape: tuple[int, int], seed: int) -> None:
    packed = random_packed(spec, shape, seed)
    packed.validate()
    whole = packed.dequantize()
    torch.testing.assert_close(whole, naive_dequantize(packed), rtol=1e-6, atol=1e-7)
    start, stop = seed % shape[0], shape[0] - seed % 2
    assert torch.equal(packed.dequantize(start=start, stop=stop), whole[start:stop])
    assert sum(t.nbytes for t in packed.tensors().values()) == spec.nbytes(shape)
    for name, promise in spec.tensors(shape).items():
        assert (packed.tensors()[name].dtype, packed.tensors()[name].shape) == (DTYPES[promise.dtype], promise.shape)
    assert spec_from_dict(spec.to_dict()) == spec
    again = LAYOUTS["codebook"].from_tensors(spec, shape, packed.tensors())
    assert torch.equal(again.dequantize(), whole)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16), st.integers(0, 20), st.integers(0, 9))
def test_planes_come_back(bits: int, n: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, n), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_planes(pack_planes(codes, bits), bits, n), codes)


def test_parts_of_whole_groups_can_be_stacked() -> None:
    spec = Codebook(length=3, index_bits=4, second_bits=2, share=0.3, rows=10)
    parts = [random_packed(spec, (rows, 9), rows) for rows in (20, 10, 4)]
    assert torch.equal(concatenate(parts).dequantize(), torch.cat([part.dequantize() for part in parts]))
    with pytest.raises(LayoutError, match="multiple of 10"):
        concatenate(parts[::-1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"length": 17}, "length"),
        ({"length": 2}, "index_bits"),
        ({"length": 2, "index_bits": 17}, "index_bits"),
        ({"share": 0}, "share"),
        ({"bits": "2"}, "bits"),
        ({"rows": 0}, "rows"),
    ],
)
def test_impossible_codebooks_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        spec_from_dict({"layout": "codebook", **settings})


@settings(max_examples=25, deadline=None)
@given(st.floats(1.2, 5), st.integers(16, 1024), st.integers(32, 1024))
def test_a_choice_stays_within_the_bits_asked(bits: float, rows: int, columns: int) -> None:
    try:
        found = codebook_for(Codebook(bits=bits), (rows, columns))
    except SpecError:
        assert rows * columns < 4096 or bits < 1.7
        return
    fast = (found.length, found.index_bits, found.second_bits) == (4, 8, 0)
    assert found.bits_per_weight((rows, columns)) <= bits * (1.005 if fast else 1)
    assert Codebook(bits=bits).nbytes((rows, columns)) == found.nbytes((rows, columns))


def test_the_fast_codebook_where_it_costs_little() -> None:
    """2 bits of a large matrix; not more bits, nor a matrix on which its table weighs."""
    for shape, bits in [
        ((8192, 8192), 2.0015),
        ((28672, 8192), 2.0015),
        ((8192, 28672), 2.0004),
        ((4096, 4096), 2.003),
    ]:
        found = codebook_for(Codebook(bits=2), shape)
        assert (found.length, found.index_bits, found.second_bits, found.share) == (4, 8, 0, 1.0)
        assert found.bits_per_weight(shape) == pytest.approx(bits, abs=1e-4)
    assert codebook_for(Codebook(bits=2), (1024, 1024)).bits_per_weight((1024, 1024)) <= 2
    assert codebook_for(Codebook(bits=2.1), (8192, 8192)).index_bits > 8


def test_longer_vectors_where_the_matrix_can_pay_for_them() -> None:
    lengths = [codebook_for(Codebook(bits=2.25), (size, size)).length for size in (64, 256, 1024, 4096)]
    assert lengths == sorted(lengths)
    assert lengths[0] <= 2 < lengths[-1]
    with pytest.raises(SpecError, match="no codebook"):
        codebook_for(Codebook(bits=0.2), (64, 64))


@pytest.mark.parametrize(
    ("size", "bits", "chosen"),
    [(64, 2.0, (2, 3, 2, 16)), (512, 2.0, (4, 7, 3, 128)), (1024, 2.5, (4, 9, 3, 256)), (2048, 3.0, (4, 11, 3, 512))],
)
def test_what_is_left_goes_into_finer_columns(size: int, bits: float, chosen: tuple[int, int, int, int]) -> None:
    """Length, index, second index and its columns; a recipe that leaves them open means these."""
    found = codebook_for(Codebook(bits=bits), (size, size))
    assert (found.length, found.index_bits, found.second_bits, found.finer(size)) == chosen


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("codebook", torch.nan, "finite"),
        ("second", torch.inf, "finite"),
        ("peaks", -1.0, "at least 0"),
        ("columns", 0, "marked"),
        ("weight", 255, "padding"),
    ],
)
def test_altered_contents_are_refused(name: str, value: float, said: str) -> None:
    packed = random_packed(Codebook(length=3, index_bits=5, second_bits=3, share=0.4), (10, 9))
    tensors = {key: tensor.clone() for key, tensor in packed.tensors().items()}
    tensors[name].view(-1)[:] = value
    with pytest.raises(LayoutError, match=said):
        PackedCodebook.from_tensors(packed.spec, packed.shape, tensors).validate()
    del tensors[name]
    with pytest.raises(LayoutError, match="missing"):
        PackedCodebook.from_tensors(packed.spec, packed.shape, tensors)


def test_the_nearest_are_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn((50, 3), generator=generator), torch.rand((50, 3), generator=generator)
    first, second = torch.randn((2, 4, 3), generator=generator)
    loss = lambda found: ((x[:, None] - found).square() * weight[:, None]).sum(2)  # noqa: E731
    assert torch.equal(kmeans.nearest(x, weight, first), loss(first).argmin(1))
    pairs = (first[:, None] + second).flatten(0, 1)
    found = kmeans.nearest_pair(x, weight, first, second, None)  # as many starts as entries: exact
    assert torch.equal(found[0] * 4 + found[1], loss(pairs).argmin(1))
    assert kmeans.nearest(torch.zeros((1, 3)), torch.ones((1, 3)), torch.ones((5, 3))).item() == 0


def test_k_means_does_not_depend_on_threads_and_uses_every_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn((12_000, 3), generator=generator), torch.rand((12_000, 3), generator=generator)
    one = kmeans.kmeans(x, weight, 64)
    try:
        torch.set_num_threads(2)
        assert torch.equal(kmeans.kmeans(x, weight, 64), one)
    finally:
        torch.set_num_threads(1)
    crowd = torch.cat([torch.zeros(1000, 3), x[:15]])  # nearly all that k-means starts from is one point
    found = kmeans.kmeans(crowd, torch.ones_like(crowd), 16)
    torch.testing.assert_close(found[kmeans.nearest(crowd, torch.ones_like(crowd), found)], crowd)
    index = kmeans.nearest(x[:400], weight[:400], settled := kmeans.kmeans(x[:400], weight[:400], 8))
    mine = index == 3
    mean = (weight[:400] * x[:400])[mine].sum(0) / weight[:400][mine].sum(0)
    torch.testing.assert_close(settled[3], mean, rtol=0.02, atol=0.02)
    few = kmeans.kmeans(x[:5], weight[:5], 16)  # more entries than vectors: every vector has its own
    torch.testing.assert_close(few[kmeans.nearest(x[:5], weight[:5], few)], x[:5])


def test_two_bits_of_pairs_beat_the_best_scalar_code() -> None:
    """Unit Gaussians: 0.1175 is what no scalar quantizer of 2 bits gets below."""
    x = torch.randn((20_000, 2), generator=torch.Generator().manual_seed(1))
    table = kmeans.kmeans(x, torch.ones_like(x), 16)
    assert float((x - table[kmeans.nearest(x, torch.ones_like(x), table)]).square().mean()) < 0.112


def test_fewer_bits_less_error_than_a_uniform_grid(trained: tuple[Tensor, Statistics]) -> None:
    weight, statistics = trained
    grid = Uniform(bits=2, group_size=64)
    asked = grid.bits_per_weight((160, weight.shape[1]))
    uniform = Feedback().solve(weight, statistics, grid)
    found = Feedback().solve(weight, statistics, Codebook(bits=asked))
    assert found.packed.spec.bits_per_weight(found.packed.shape) <= asked
    assert found.error < 0.9 * uniform.error
    assert found.error == pytest.approx(relative_error(weight, found.packed.dequantize(), statistics.hessian))
    turned = Feedback().solve(weight, statistics, Rotated(Codebook(bits=asked - 0.05)))
    assert turned.error < 0.9 * uniform.error


def test_sweeps_and_finer_columns_help(trained: tuple[Tensor, Statistics]) -> None:
    weight, statistics = trained
    spec = Codebook(length=2, index_bits=4, rows=96)
    plain, swept = (Feedback(sweeps=sweeps).solve(weight, statistics, spec).error for sweeps in (0, 2))
    assert swept < plain
    few = Codebook(length=2, index_bits=4, second_bits=3, share=0.1, rows=96)
    all_columns = Codebook(length=2, index_bits=4, second_bits=3, rows=96)
    errors = [Feedback().solve(weight, statistics, s).error for s in (few, all_columns)]
    assert errors[1] < errors[0] < swept


def test_rows_with_large_scales_count_more(trained: tuple[Tensor, Statistics]) -> None:
    """Vectors lie across rows: what they lose is little where rows are unlike, if it is counted in the weight."""
    weight, statistics = trained
    spread = torch.exp(torch.randn(len(weight), 1, generator=torch.Generator().manual_seed(1)))
    even, apart = (Feedback().solve(w, statistics, Codebook(length=2, index_bits=4)) for w in (weight, weight * spread))
    assert apart.error < 0.7 * even.error


def test_inputs_that_are_always_zero_choose_no_vectors(trained: tuple[Tensor, Statistics]) -> None:
    weight, importance = trained[0][:, :64].clone(), trained[1].diagonal[:64].clone()
    importance[40:] = 0
    made: list[CodebookRounder] = []
    for silent in (1.0, 100.0):
        weight[:, 40:] *= silent
        made.append(CodebookRounder(Codebook(length=2, index_bits=6), (160, 64), weight.device))
        made[-1].fit(0, weight, importance)
    assert torch.equal(made[0].scales, made[1].scales)
    heard = [torch.cat([one.round(torch.tensor([i]), weight[:, i : i + 1]) for i in range(40)], 1) for one in made]
    errors = [float((weight[:, :40] - found).square().sum()) for found in heard]
    assert errors[1] < 1.5 * errors[0]


def test_a_column_is_never_rounded_to_a_worse_pair() -> None:
    """The best pair may begin with a vector that is far away, and so with none of those that are looked at."""
    generator = torch.Generator().manual_seed(0)
    rounder = CodebookRounder(Codebook(length=2, index_bits=5, second_bits=5), (64, 3), torch.device("cpu"))
    weight = torch.randn(64, 3, generator=generator)
    rounder.fit(0, weight, torch.ones(3))
    rounder.tables = [torch.randn(table.shape, generator=generator) for table in rounder.tables]
    pairs = (rounder.tables[0][0][:, None] + rounder.tables[1][0]).flatten(0, 1)
    x = rounder.vectors(weight[:, :1] * rounder.inverse[:, None])[:, 0]
    best = kmeans.nearest(x, rounder.vectors(rounder.energy[:, None])[:, 0], pairs)
    missed = lambda: (weight[:, :1] - rounder.round(torch.tensor([0]), weight[:, :1])).square().sum()  # noqa: E731
    looked = missed()
    rounder.index[:, :, 0] = torch.stack([best // 32, best % 32])
    assert missed() < 0.999 * looked
    assert torch.equal(rounder.index[:, :, 0], torch.stack([best // 32, best % 32]))


def test_refit_never_hurts_and_finds_the_best_codebooks(trained: tuple[Tensor, Statistics]) -> None:
    weight, hessian = trained[0][:30], trained[1].hessian
    rounder = rounder_for(Codebook(length=2, index_bits=2, second_bits=2, share=0.5), (30, 64), weight.device, SEARCH)
    weight, hessian = weight[:, :64], hessian[:64, :64] + 0.01 * torch.eye(64)
    rounder.fit(0, weight, hessian.diagonal())
    found = torch.cat([rounder.round(torch.tensor([i]), weight[:, i : i + 1]) for i in range(64)], 1)
    lost = lambda found: float((((weight - found) @ hessian) * (weight - found)).sum())  # noqa: E731
    errors = [lost(found), *(lost(rounder.refit(weight, hessian)) for _ in range(6))]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[1] < 0.97 * errors[0]
    assert errors[-1] > 0.99 * errors[-2]
    packed = rounder.pack()
    packed.validate()
    torch.testing.assert_close(packed.dequantize(), rounder.refit(weight, hessian), rtol=0.05, atol=0.05)


def test_a_checkpoint_keeps_its_promise_and_runs(llama: Path, words: Path, tmp_path: Path) -> None:
    data = load_recipe("balanced").to_dict() | {"spec": Codebook(bits=4.5).to_dict()}
    small = (f"calibration.text={words}", "calibration.samples=4", "calibration.sequence_length=32")
    recipe = override(recipe_from_dict(data), small)
    first = quant.quantize(str(llama), tmp_path / "a", recipe)
    assert first.report["bits"]["promised"] == pytest.approx(first.written.measured_bits)
    assert first.written.measured_bits <= 4.5
    assert all(site["spec"]["length"] for site in first.report["sites"])
    quant.quantize(str(llama), tmp_path / "b", recipe)
    assert tiny.contents(tmp_path / "a") == tiny.contents(tmp_path / "b")
    with torch.no_grad():
        assert bool(torch.isfinite(quant.load(tmp_path / "a")(torch.arange(10, 40)[None]).logits).all())


def test_stacks_of_experts(words: Path, tmp_path: Path) -> None:
    model = tiny.model("mixtral", tmp_path / "model")
    data = load_recipe("balanced").to_dict() | {"spec": Codebook(bits=6.0).to_dict()}
    small = (f"calibration.text={words}", "calibration.samples=4", "calibration.sequence_length=32")
    result = quant.quantize(str(model), tmp_path / "out", override(recipe_from_dict(data), small))
    stacks = [site for site in result.report["sites"] if site["experts"]]
    assert stacks
    assert all(site["spec"]["rows"] == site["shape"][0] // site["experts"] for site in stacks)
    with torch.no_grad():
        assert bool(torch.isfinite(quant.load(tmp_path / "out")(torch.arange(10, 40)[None]).logits).all())
