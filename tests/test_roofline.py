"""The roofline against numbers worked out by hand and bytes really held; the gate, the tuner's choice and cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.kernels import benchmark, blocks, measure, trellis_blocks, tune
from quant.kernels.blocks import Config
from quant.kernels.layouts import PackedUniform
from quant.kernels.order import arrange
from quant.kernels.roofline import work
from quant.kernels.spec import Codebook, Trellis, Uniform
from tests.rerun import rerun

NAME = "nvidia-h200_torch-2.11.0_triton-3.6.0.json"


def held(weight: Any) -> int:
    """Bytes of its tensors."""
    return sum(tensor.nbytes for tensor in weight.tensors().values())


@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_those_in_memory(symmetric: bool) -> None:
    for bits, group, columns in [(3, 128, 300), (4, -1, 256), (7, 32, 1000)]:
        spec = Uniform(bits=bits, group_size=group, symmetric=symmetric)
        grid = torch.zeros((5, spec.groups(columns)))
        codes = torch.zeros((5, columns), dtype=torch.uint8)
        packed = PackedUniform.from_codes(spec, (5, columns), codes, grid.half(), None if symmetric else grid.byte())
        need = work(2, 5, columns, spec)
        assert need.weight == held(arrange(packed))
        assert (need.inputs, need.outputs, need.flops) == (4 * columns, 20, 20 * columns)


def test_bytes_of_a_trellis_are_those_in_memory() -> None:
    for bits, rows, columns in [(2, 512, 64), (3, 300, 70), (1, 16, 32)]:
        packed = measure.random_trellis(Trellis(bits=bits), rows, columns, "cpu")
        assert work(1, rows, columns, packed.spec).weight == held(measure.arrange(packed))
    whole = work(1, 8192, 8192, Trellis(bits=2)).weight
    assert work(1, 8192, 8192, None).weight / whole == pytest.approx(8, rel=1e-3)


def test_bytes_of_a_codebook_are_those_in_memory() -> None:
    for spec, rows, columns in [(Codebook(bits=3), 300, 512), (Codebook(length=3, index_bits=5, rows=20), 50, 70)]:
        packed = measure.random_codebook(spec, rows, columns, "cpu")
        assert work(1, rows, columns, spec).weight == held(measure.arrange(packed))
        packed.validate()
    whole = work(1, 8192, 8192, Codebook(bits=2)).weight
    assert work(1, 8192, 8192, None).weight / whole == pytest.approx(8, rel=2e-2)


def test_limit_and_ratios() -> None:
    plain = work(1, 8192, 8192, None)
    assert plain.nbytes == 2 * 8192**2 + 4 * 8192
    assert plain.limit(4e12, 8e14) == pytest.approx(33.56e-6, rel=1e-3)  # bytes decide
    for bits, most in [(4, 3.82), (3, 5.02), (2, 7.31)]:  # 16 / (bits + 24 / 128)
        assert plain.weight / work(1, 8192, 8192, Uniform(bits=bits)).weight == pytest.approx(most, rel=1e-3)
    prefill = work(4096, 8192, 8192, Uniform())
    assert prefill.limit(4e12, 8e14) == 2 * 4096 * 8192**2 / 8e14  # operations decide


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert tune.main([]) == 2
    assert capsys.readouterr().out.count("No CUDA device was found") == 2


def test_the_most_important_rows_come_first() -> None:
    every, quick = benchmark.rows(False), benchmark.rows(True)
    assert every[: len(quick)] == quick
    assert len(set(every)) == len(every) == 11 * 10 * sum(map(len, measure.SHAPES.values()))
    assert {(row[0], row[2].tokens) for row in every[:72]} == {("Llama-3-70B", 1), ("Llama-3-70B", 16)}


def test_a_table_is_written_of_what_was_measured(tmp_path: Path) -> None:
    row = {"model": "Llama-3-8B", "layer": "down", "N": 8, "K": 16, "M": 1, "bits": 4, "us": 12.34567, "bf16 us": None}
    benchmark.write({"device": "none", "rows": [row], "not measured": 3}, tmp_path, None)
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == [row]
    table = (tmp_path / "kernels.md").read_text()
    assert "- not measured: 3" in table
    assert "| Llama-3-8B | down | 8 | 16 | 1 | 4 |  | 12.35 |" in table


def test_candidates_fit_and_leave_no_split_without_work() -> None:
    for tokens in tune.BUCKETS[:-1]:
        for columns in (300, 8192, 28672):
            found = tune.candidates(tokens, 8192, columns, 4, 132)
            assert 2 <= len(found) == len(set(found)) <= 64
            assert all(config.bn * config.bm <= 1024 and config.warps == 1 for config in found)  # registers
            count = -(-columns // blocks.step_columns(4))
            assert all((config.splits - 1) * -(-count // config.splits) < count for config in found)


def test_candidates_for_a_trellis_leave_no_split_without_work() -> None:
    for tokens in (1, 16, 64):
        for columns in (300, 8192, 28672):
            found = trellis_blocks.candidates(tokens, 8192, columns, 132)
            assert (1 if columns == 300 else 2) <= len(found) == len(set(found)) <= 64
            most = {2: 16, 4: 8, 8: 4, 16: 4}  # warps: registers
            assert all(config.bn == 256 or (config.bn, config.bm, tokens) == (128, 2, 1) for config in found)
            assert all(config.warps <= most[config.bm] for config in found)
            assert all(trellis_blocks.busy(config, -(-columns // 32)) for config in found)


def test_tuned_finds_nearby_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("known", "tuned"):
        getattr(tune, name).cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "file_name", lambda device: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    entry = Config(8, 64, 1, 1, 16)
    file = tune.cache_folder() / NAME
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"configs": {tune.key(1, 8192, 8192, 4, "bf16"): asdict(entry)}}))
    gpu = torch.device("cuda")
    assert tune.tuned(gpu, 1, 8192, 8192, 4, "bf16") == entry
    assert tune.tuned(gpu, 1, 10240, 6144, 4, "bf16") == Config(8, 64, 1, 1, 12)  # 24 tiles
    assert tune.tuned(gpu, 2, 8192, 8192, 4, "bf16") is None
    assert tune.tuned(torch.device("cpu"), 1, 8192, 8192, 4, "bf16") is None
    file.write_text("[]")
    for name in ("known", "tuned"):
        getattr(tune, name).cache_clear()
    with pytest.warns(UserWarning, match="is ignored"):
        assert tune.tuned(gpu, 1, 8192, 8192, 4, "bf16") is None
    for name in ("known", "tuned"):
        getattr(tune, name).cache_clear()


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    rerun(__file__)


def interpreted_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    case = measure.Case(3, 20, 300, Uniform(bits=4))
    assert measure.wrong(case, "cpu") is None
    right = measure.multiply

    def damaged(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = right(x, *rest)
        out[1, 7] += 0.05 * out[1, 7].abs() + 0.02 * out.abs().max()
        return out

    assert measure.wrong(measure.Case(2, 40, 70, Trellis(length=32), "fp16"), "cpu") is None
    assert measure.wrong(measure.Case(1, 40, 96, Trellis(length=32), "fp16", block=32), "cpu") is None
    monkeypatch.setattr(measure, "multiply", damaged)
    assert "times what rounding explains" in str(measure.wrong(case, "cpu"))
    monkeypatch.setattr(measure, "multiply", lambda *given: right(*given) * torch.nan)
    assert "inf times" in str(measure.wrong(case, "cpu"))
    bad = measure.Case(3, 20, 300, Uniform(bits=4), "bf16", Config(8, 24, 1, 1, 1))
    assert "Error" in str(measure.wrong(bad, "cpu"))  # 24 is no power of two
