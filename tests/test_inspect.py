"""quant-inspect: what it says of sound, damaged, unfinished and foreign folders, and how it exits."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import quant
import quant.cli
import quant.eval.cli
import quant.inspect
from quant.checkpoint.journal import FOLDER
from quant.inspect import app
from quant.progress import Progress
from tests import tiny


def inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(*arguments: str | Path) -> dict[str, Any]:
    result = inspect(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def mine(packed_llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(packed_llama, tmp_path / "copy"))


# --- packed


def test_a_packed_checkpoint(packed_llama: Path) -> None:
    result = inspect(packed_llama)
    report = json.loads((packed_llama / "report.json").read_text())
    assert result.exit_code == 0
    for fact in (
        f"{report['bits']['measured']:.5g} measured, {report['bits']['promised']:.5g} promised",
        "every file is what was written",
        "4-bit, groups of 32, asymmetric",
        "model.layers.1.mlp.down_proj",
        report["command"].split(" --")[1],
        report["calibration"]["sha256"],
        "outside the blocks",
    ):
        assert fact in result.stdout


def test_json_has_the_bytes_of_the_files(packed_llama: Path) -> None:
    found = told(packed_llama)
    weights = sum(file.stat().st_size for file in packed_llama.glob("*.safetensors"))
    assert found["kind"] == "packed"
    assert found["bits"]["measured"] == found["bits"]["promised"] == pytest.approx(4.6333, abs=1e-4)
    assert found["packed_bytes"] == sum(site["nbytes"] for site in found["sites"])
    assert weights - 20_000 < found["packed_bytes"] + found["float_bytes"] < weights
    assert found["damage"] is None
    assert all(0 < site["error"] < 1 for site in found["sites"])


@pytest.mark.parametrize("command", [quant.inspect, quant.cli, quant.eval.cli])
def test_an_output_of_few_characters(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model says, or a multiplication sign, ended a command after all its work where a locale is not UTF-8."""
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written := BytesIO(), encoding="ascii"))
    monkeypatch.setattr(command, "app", lambda **_: print("128 \xd7 384", flush=True))
    if command is quant.cli:
        monkeypatch.setattr(quant.cli.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit):
            command.main()
    else:
        command.main()
    assert written.getvalue() == b"128 ? 384\n"


def test_many_sites_are_the_worst_ones(packed_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.inspect.MOST_SITES", 3)
    worst = max(told(packed_llama)["sites"], key=lambda site: site["error"])["site"]
    shown = inspect(packed_llama).stdout
    assert worst in shown
    assert "the 3 of most error, of 14 sites" in shown


def test_experts_and_what_is_left_float(packed_moe: Path) -> None:
    shown = inspect(packed_moe).stdout
    assert "8 × " in shown
    assert "a matrix of MixtralTopKRouter" in shown


def test_a_copy_by_save_pretrained_has_no_checksums(packed_llama: Path, tmp_path: Path) -> None:
    quant.load(packed_llama).save_pretrained(tmp_path)
    result = inspect(tmp_path)
    assert result.exit_code == 0
    assert "no checksums; tensors as promised" in result.stdout
    assert told(tmp_path)["report"] == "missing"


# --- damaged


def test_a_flipped_byte_is_found_and_named(mine: Path) -> None:
    file = mine / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    result = inspect(mine)
    assert result.exit_code == 6
    assert "DAMAGED" in result.stdout
    assert "model.safetensors: its content is not what was written" in result.stderr
    assert inspect(mine, "--no-verify").exit_code == 0
    said = inspect(mine, "--json")
    assert said.exit_code == 6
    assert "model.safetensors" in json.loads(said.stdout)["damage"]


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_file_cut_short(mine: Path, length: int) -> None:
    file = mine / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    for flag in ("--verify", "--no-verify"):
        result = inspect(mine, flag)
        assert result.exit_code == 6, result.output
        assert "model.safetensors" in result.stderr
    assert "None measured" in result.stdout


def test_config_json_of_nonsense(mine: Path) -> None:
    config = json.loads((mine / "config.json").read_text())
    for change in ({"format_version": 99}, {"sites": {"a": {"shape": [0, 1]}}}, {"sites": 3}, {"extra": 1}):
        changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (mine / "config.json").write_text(json.dumps(changed))
        assert inspect(mine).exit_code == 6


def test_names_cannot_write_to_the_terminal(mine: Path) -> None:
    config = json.loads((mine / "config.json").read_text())
    sites = config["quantization_config"]["sites"]
    sites["\x1b[31m[bold]evil\x07\n"] = sites.pop("model.layers.0.self_attn.q_proj")
    (mine / "config.json").write_text(json.dumps(config))
    result = inspect(mine)
    assert result.exit_code == 6
    assert "\x1b" not in result.output
    assert "[bold]evil" in result.stdout


REPORTS = [
    "", "{", "[]", "3", "null", "[" * 100_000, '{"sites": 3}', '{"left_float": {}}', '{"sites": [{"site": []}]}',
]  # fmt: skip


@pytest.mark.parametrize("content", REPORTS)
def test_a_damaged_report_is_left_out(mine: Path, content: str) -> None:
    (mine / "report.json").write_text(content)
    result = inspect(mine)
    assert result.exit_code == 0, result.output
    assert told(mine)["report"] == "damaged"
    assert told(mine)["sites"][0]["error"] is None


STRANGE = [None, [], "x", {"a": {"b": []}}, -1, 1e400, 10**400, float("nan")]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: str(value)[:9])
def test_a_report_with_one_strange_value(mine: Path, value: Any) -> None:
    report = json.loads((mine / "report.json").read_text())
    keys = ("model", "recipe", "calibration", "compute", "versions", "plan", "command", "left_float", "sites")
    for change in [
        *({key: value} for key in keys),
        *({"sites": [{**report["sites"][0], key: value}]} for key in ("error", "tokens", "notes", "site")),
    ]:
        (mine / "report.json").write_text(json.dumps({**report, **change}))
        result = inspect(mine, "--no-verify")
        assert result.exit_code == 0, (change, result.exception, result.output)


# --- unfinished


class Stop(Progress):
    """Ctrl-C after the first block."""

    def advanced(self, index: int, weights: int) -> None:
        raise KeyboardInterrupt


def test_an_unfinished_run_and_the_command_that_ends_it(llama: Path, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "the out"
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(llama), out, tiny.recipe(words, "match=float"), progress=Stop())
    result = inspect(out)
    assert result.exit_code == 0
    assert (told(out)["blocks_done"], told(out)["sites_done"], told(out)["sites_planned"]) == (1, 7, 14)
    again = shlex.split(result.stdout.split("Continue with:\n")[1])
    assert again == shlex.split(told(out)["resume"])
    assert CliRunner().invoke(quant.cli.app, again[1:]).exit_code == 0
    assert told(out)["kind"] == "packed"


@pytest.mark.parametrize("content", ["{", "[]", '{"plan": 3}', "{}"])
def test_an_unreadable_unfinished_run(tmp_path: Path, content: str) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "run.json").write_text(content)
    result = inspect(tmp_path)
    assert result.exit_code == 7
    assert "begin anew with quantize --restart" in result.stderr


# --- anything else


def test_a_float_model(llama: Path) -> None:
    result = inspect(llama)
    assert result.exit_code == 0
    assert "float model, not packed" in result.stdout
    assert "quantize --model" in result.stdout
    assert told(llama)["dtypes"].keys() == {"F32"}


def test_a_model_packed_by_another_tool(llama: Path, tmp_path: Path) -> None:
    config = {**json.loads((llama / "config.json").read_text()), "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = inspect(tmp_path)
    assert result.exit_code == 6
    assert "not a bitwright checkpoint" in result.stderr


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert inspect(tmp_path / "nowhere").exit_code == 2
    assert "not there; give the folder" in inspect(tmp_path / "nowhere").stderr
    assert inspect(tmp_path).exit_code == 2
    assert "no config.json; give the folder" in inspect(tmp_path).stderr
    (tmp_path / "config.json").write_text("{}")
    assert inspect(tmp_path).exit_code == 3
    assert inspect(tmp_path / "config.json").exit_code == 2


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_pipeline_whose_index_cannot_be_read(llama: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(llama, tmp_path / "transformer")
    (tmp_path / "model_index.json").write_bytes(content.encode("latin-1"))
    result = inspect(tmp_path)
    assert result.exit_code == 3
    assert "model_index.json: " in result.stderr
