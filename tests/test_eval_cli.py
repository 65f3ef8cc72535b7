"""`quant-eval` and `python -m quant.eval.perplexity` as a user calls them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from quant.errors import ResourceError
from quant.eval import cli, perplexity
from quant.eval import evaluate as evaluation
from quant.eval.evaluate import evaluate
from quant.eval.table import table
from tests import tiny


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _no_side_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command quietens transformers for its process; a test process has other tests."""
    monkeypatch.setattr(cli, "_calm", lambda: None)


def test_table_json_and_plot(packed_llama: Path, llama: Path, words: Path, tmp_path: Path) -> None:
    plot, data = tmp_path / "size.png", tmp_path / "figures.json"
    settings = ("--text", words, "--max-windows", 3, "--prompts", 2)
    result = call(packed_llama, llama, "--against", llama, *settings, "--plot", plot, "--json", data)
    assert result.exit_code == 0, result.output
    for heading in ("model", "MB", "bits", "perplexity", "KL", "top-1", "prefix", "decode/s", "RAM MB"):
        assert heading in result.stdout
    assert "words.txt" in result.stdout
    assert "of 24 the same" in result.stdout or "of 40 the same" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")

    figures: dict[str, Any] = json.loads(data.read_text())
    packed, same = figures["models"]
    assert figures["original"]["perplexity"] == same["perplexity"] == packed["original"]
    assert same["divergence"] == {"kl": 0, "kl_p99": 0, "kl_max": 0, "top1": 1}
    assert packed["divergence"]["kl"] > 0
    assert packed["perplexity_ratio"] == packed["perplexity"]["token"] / packed["original"]["token"]
    assert len(packed["generations"]) == 2
    stated = packed["settings"]
    assert stated["text"] == "words.txt"
    assert len(stated["text_sha256"]) == 64
    assert (stated["window_rule"], stated["window"], stated["stride"]) == ("non-overlapping", 64, None)
    assert (stated["max_windows"], stated["device"], stated["dtype"], stated["prompts"]) == (3, "cpu", "float32", 2)
    assert {"python", "torch", "transformers", "bitwright"} <= stated["versions"].keys()
    assert stated["machine"]["threads"] == 1
    assert stated["machine"]["cpu"]


def test_the_original_reads_the_text_no_more_often_than_it_is_compared(
    packed_llama: Path, llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[Any]()
    monkeypatch.setattr(evaluation, "measure", lambda *given: read.append(given) or perplexity.measure(*given))
    data = tmp_path / "figures.json"
    settings = ("--text", words, "--max-windows", 2, "--window", 32, "--no-generate", "--json", data)
    assert call(packed_llama, "--against", llama, *settings).exit_code == 0
    assert not read
    figures = json.loads(data.read_text())
    alone = evaluate(llama, text=words, max_windows=2, window=32)
    assert read
    assert figures["original"]["perplexity"] == figures["models"][0]["original"] == alone.to_dict()["perplexity"]
    assert figures["original"]["settings"] == alone.to_dict()["settings"]


def test_json_on_stdout_is_json_alone(llama: Path, words: Path) -> None:
    result = call(llama, "--text", words, "--max-windows", 2, "--stride", 32, "--no-generate", "--json", "-")
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    assert figures["original"] is None
    assert figures["models"][0]["settings"]["window_rule"] == "strided"
    assert figures["models"][0]["generations"] == []
    assert "perplexity" in result.stderr


def test_quiet_is_the_table_alone(llama: Path, words: Path) -> None:
    loud = call(llama, "--text", words, "--max-windows", 1)
    quiet = call(llama, "--text", words, "--max-windows", 1, "--quiet")
    assert "╭" in loud.stdout
    assert "╭" not in quiet.stdout
    assert "perplexity" in quiet.stdout


def test_encoders_show_cosines(words: Path, tmp_path: Path) -> None:
    bert = tiny.model("bert", tmp_path / "bert")
    result = call(bert, "--against", bert, "--text", words, "--window", "16")
    assert result.exit_code == 0, result.output
    assert "line cos" in result.stdout
    assert "perplexity" not in result.stdout
    alone = call(bert, "--text", words)
    assert alone.exit_code == 2
    assert "give --against ORIGINAL" in alone.stderr


def test_errors_are_a_sentence_and_a_code(packed_llama: Path, llama: Path, words: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(packed_llama, tmp_path / "broken"))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    for arguments, code, said in [
        ((llama, "--text", "nonsense"), 2, "not a known name"),
        ((llama, "--text", words, "--window", 999), 2, "takes at most 64 tokens"),
        ((llama, "--text", words, "--stride", 64), 2, "stride is 64"),
        ((llama, "--text", words, "--plot", tmp_path / "no" / "p.png"), 2, "its folder does not exist"),
        ((llama, "--text", "nonsense", "--plot", tmp_path / "p.nonsense"), 2, "no known kind of picture"),
        ((llama, "--text", "nonsense", "--plot", tmp_path / "p"), 2, "no known kind of picture"),
        ((llama, "--text", "nonsense", "--plot", "."), 2, "a folder; give a file in it"),
        ((llama, "--text", "nonsense", "--json", tmp_path), 2, "a folder; give a file in it"),
        ((tmp_path / "nothing", "--text", words), 3, "not a folder"),
        (("somebody/model", "--text", words), 3, "path of a local folder"),
        ((broken, "--text", words), 6, "model.safetensors"),
        ((llama, "--text", words, "--judge", tmp_path / "j.safetensors"), 2, "--judge judges images"),
        ((), 2, "MODEL"),
    ]:
        result = call(*arguments)
        assert result.exit_code == code, (arguments, result.output)
        assert said in result.stderr
        assert "Traceback" not in result.output


def test_models_read_in_other_windows_say_so(llama: Path, demo: Path, words: Path, tmp_path: Path) -> None:
    """Perplexities over windows of 64 and of 512 tokens do not compare, and each is said to be its own."""
    result = call(llama, demo, "--text", words, "--no-generate", "--quiet", "--json", tmp_path / "kept.json")
    assert result.exit_code == 0, result.output
    counts = [model["perplexity"]["tokens"] for model in json.loads((tmp_path / "kept.json").read_text())["models"]]
    title = " ".join(result.stdout.split())
    for window, tokens in zip((64, 512), counts, strict=True):
        assert re.search(rf"window {window}, \d+ windows, {tokens:,} tokens predicted, float32 [/o]", title), title


def test_a_tokenizer_of_another_model_is_a_sentence(llama: Path, demo: Path, words: Path, tmp_path: Path) -> None:
    for name, model in (("causal", llama), ("encoder", tiny.model("bert", tmp_path / "bert"))):
        shutil.copyfile(demo / "tokenizer.json", Path(shutil.copytree(model, tmp_path / name)) / "tokenizer.json")
        result = call(tmp_path / name, "--against", model, "--text", words, "--window", 16, "--no-generate")
        assert (result.exit_code, type(result.exception)) == (3, SystemExit), result.output
        assert "the model knows 128; they do not belong together" in result.stderr


def test_a_card_is_of_a_folder_packed_by_us(
    llama: Path, packed_llama: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never of the hub's cache."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(packed_llama))
    for models in ((llama,), (packed_llama, "somebody/model")):
        result = call(*models, "--text", words, "--card")
        assert (result.exit_code, "give its folder, no float model and no hub's name" in result.stderr) == (2, True), (
            result.output
        )


def test_figures_are_kept_when_the_plot_fails(llama: Path, words: Path, tmp_path: Path) -> None:
    """A link into a folder that is gone looks like any file to be made."""
    (tmp_path / "size.png").symlink_to(tmp_path / "gone" / "size.png")
    kept = tmp_path / "kept.json"
    options = ("--text", words, "--max-windows", 1, "--no-generate", "--json", kept)
    result = call(llama, *options, "--plot", tmp_path / "size.png")
    assert (result.exit_code, "size.png: cannot be written" in result.stderr) == (8, True), result.output
    assert json.loads(kept.read_text())["models"][0]["perplexity"]["windows"] == 1
    full = call(llama, *options[:-1], "/dev/full")
    assert (full.exit_code, "No space left on device" in full.stderr) == (ResourceError.exit_code, True), full.output


@pytest.mark.parametrize(("raised", "code"), [(MemoryError(), ResourceError.exit_code), (KeyboardInterrupt(), 130)])
def test_exhaustion_and_interruption(
    raised: BaseException, code: int, llama: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "evaluate", fail)
    assert call(llama, "--text", words).exit_code == code


def test_help_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No word is cut at 80 columns."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    result = call("--help")
    assert result.exit_code == 0
    assert "…" not in result.stdout


def test_help_has_examples() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert "--against models/original" in " ".join(result.stdout.split())


def test_perplexity_as_a_module_in_a_process_of_its_own(llama: Path, words: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "quant.eval.perplexity"]
    done = subprocess.run(
        [*command, llama, "--text", words, "--stride", "40", "--max-windows", "3"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    expected = evaluate(llama, text=words, stride=40, max_windows=3).perplexity
    assert expected is not None
    assert f"perplexity {expected.token:.5f}" in done.stdout
    assert "3 strided windows of 64 tokens, stride 40" in done.stdout


def test_perplexity_as_a_module_fails_in_a_sentence(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit_:
        perplexity.main(str(llama), text="nonsense")
    assert exit_.value.exit_code == 2
    assert capsys.readouterr().err.startswith("error: text nonsense: no such file")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_column_is_lost_on_a_narrow_terminal(width: int, llama: Path, words: Path) -> None:
    report = evaluate(llama, against=llama, text=words, max_windows=1, generate=1)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table([report, report], width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    rules = [index for index, line in enumerate(lines) if "──" in line]
    headings = [heading for index in rules for heading in lines[index - 1].split("  ") if heading.strip()]
    assert [heading.strip() for heading in headings if heading.strip() != "model"] == [
        *("MB", "bits", "all", "perplexity", "x", "bits/byte", "KL", "KL 99%", "top-1"),
        *("prefix", "repeat", "prefill/s", "decode/s", "RAM MB"),
    ]
    assert all("llama" in lines[index + 1] for index in rules)
