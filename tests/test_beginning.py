"""The token that begins a text: who needs it is found out, gets it, and the finished checkpoint says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy, one_hot
from transformers import AutoTokenizer, LlamaForCausalLM

from quant.calibration import beginning
from quant.calibration.samples import draw
from quant.calibration.texts import encode, resolve
from quant.errors import CalibrationError, ResumeError, SettingsError
from quant.estimate import estimate
from quant.eval.evaluate import evaluate
from quant.eval.subject import open_subject
from quant.models.source import find
from quant.pipeline import quantize, run
from quant.prepare import prepare
from quant.progress import Progress
from quant.recipe import Calibration, load_recipe
from tests import tiny


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A tiny Llama whose tokenizer begins texts with `<s>`."""
    folder = tiny.model("llama", tmp_path / "begun")
    made = AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def needy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llamas that know what comes behind `<s>`, and else as much as they did."""
    real: Any = LlamaForCausalLM.forward

    def forward(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        found = real(self, input_ids=input_ids, **rest)
        if int(input_ids[0, 0]) == 1:
            found.logits = 3 * one_hot(input_ids.roll(-1, 1), found.logits.shape[-1]).float()
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


class Heard(Progress):
    def __init__(self) -> None:
        self.lines = list[str]()

    def say(self, what: str) -> None:
        self.lines.append(what)

    @property
    def told(self) -> int:
        return sum("calibration windows begin with the token" in line for line in self.lines)


def test_behind_the_first_token_the_same_predictions(begun: Path, tmp_path: Path) -> None:
    subject, text = open_subject(begun), tiny.text(tmp_path, 300)
    ids = encode(subject.tokenizer(), resolve(text)).ids
    lost = list[torch.Tensor]()
    with torch.no_grad():
        for start in range(0, len(ids) - 31, 32):
            window = ids[start : start + 32]
            logits = subject.model(torch.cat([torch.tensor([1]), window])[None]).logits[0, 1:-1]
            lost.append(cross_entropy(logits, window[1:], reduction="none"))
    report = evaluate(subject, against=subject, text=text, window=32, bos=True, generate=1)
    assert report.perplexity is not None
    assert report.original == report.perplexity
    assert report.perplexity.nll == pytest.approx(float(torch.cat(lost).mean()), rel=1e-5)
    assert report.settings.bos
    assert evaluate(subject, text=text, window=32).perplexity.tokens == report.perplexity.tokens  # pyright: ignore[reportOptionalMemberAccess]
    longest = evaluate(subject, text=tiny.text(tmp_path, 2000), window=subject.max_length, bos=True)
    assert longest.settings.window == (subject.max_length or 0) - 1
    draws = Calibration(str(text), samples=3, sequence_length=16, bos=True), find(str(begun)), subject.model
    first, second = draw(*draws).batches[0]["input_ids"], draw(replace(draws[0], bos=False), *draws[1:]).batches[0]
    assert first[:, 0].tolist() == [1, 1, 1]
    assert (second["input_ids"] == 1).sum() == 0
    assert first.shape == second["input_ids"].shape == (3, 16)


@pytest.mark.usefixtures("needy")
def test_who_needs_the_first_token_is_judged_behind_it(begun: Path, tmp_path: Path) -> None:
    subject, text = open_subject(begun), tiny.text(tmp_path, 300)
    found = evaluate(subject, against=subject, text=text, window=32, generate=1)
    assert found.note is not None
    assert found.note.endswith("judged behind it (--no-bos: without)")
    told = evaluate(subject, text=text, window=32, bos=True)
    assert told.note is None
    assert found.settings.bos
    assert found.perplexity == found.original == told.perplexity
    without = evaluate(subject, text=text, window=32, bos=False)
    assert without.note is not None
    assert without.note.endswith("leave out --no-bos")
    assert not without.settings.bos
    assert without.perplexity is not None
    assert told.perplexity is not None
    assert told.perplexity.token < 0.7 * without.perplexity.token


def test_who_does_not_need_it_is_judged_as_ever(begun: Path, tmp_path: Path) -> None:
    text = tiny.text(tmp_path, 300)
    found, without = evaluate(begun, text=text, window=32), evaluate(begun, text=text, window=32, bos=False)
    assert (found.note, without.note) == (None, None)
    assert not found.settings.bos
    assert found.perplexity == without.perplexity


@pytest.mark.usefixtures("needy")
def test_a_calibration_gives_it_to_who_needs_it(begun: Path, words: Path, tmp_path: Path) -> None:
    heard, given = Heard(), tiny.recipe(words)
    result = quantize(str(begun), tmp_path / "found", given, progress=heard)
    assert heard.told == 1
    told = quantize(str(begun), tmp_path / "told", tiny.recipe(words, "calibration.bos=true"))
    assert tiny.contents(tmp_path / "found", people=False) == tiny.contents(tmp_path / "told", people=False)
    assert json.loads((tmp_path / "found" / "recipe.json").read_text())["calibration"]["bos"] is True
    assert "calibration.bos" not in result.report["command"], "it finds out again"
    assert "--set calibration.bos=true" in told.report["command"]
    quantize(str(begun), tmp_path / "without", tiny.recipe(words, "calibration.bos=false"))
    assert tiny.contents(tmp_path / "found") != tiny.contents(tmp_path / "without")
    again = load_recipe(str(tmp_path / "found" / "recipe.json"))
    assert again.calibration == replace(given.calibration or Calibration(), bos=True)


def test_who_does_not_need_it_is_calibrated_as_ever(begun: Path, words: Path, tmp_path: Path) -> None:
    heard = Heard()
    quantize(str(begun), tmp_path / "found", tiny.recipe(words), progress=heard)
    quantize(str(begun), tmp_path / "told", tiny.recipe(words, "calibration.bos=false"))
    assert heard.told == 0
    assert tiny.contents(tmp_path / "found", people=False) == tiny.contents(tmp_path / "told", people=False)
    assert json.loads((tmp_path / "found" / "recipe.json").read_text())["calibration"]["bos"] is False


@pytest.mark.usefixtures("needy")
def test_it_is_found_out_once(begun: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run goes on as it began, a finished one is what it is, and a dry run needs no pass through the model."""
    recipe, out, tried = tiny.recipe(words), tmp_path / "out", list[int]()
    real = beginning.needed
    monkeypatch.setattr(beginning, "needed", lambda *given: tried.append(1) or real(*given))
    estimate(prepare(str(begun), recipe))
    assert not tried
    whole = tmp_path / "whole"
    quantize(str(begun), whole, recipe)
    assert len(tried) == 1

    class Killed(Exception):
        pass

    class Dying(Progress):
        def advanced(self, index: int, weights: int) -> None:
            raise Killed

    with pytest.raises(Killed):
        quantize(str(begun), out, recipe, progress=Dying())
    assert len(tried) == 2
    monkeypatch.setattr(beginning, "needed", lambda *_: pytest.fail("it was found out already"))
    with pytest.raises(ResumeError, match=r"calibration.*bos"):
        quantize(str(begun), out, tiny.recipe(words, "calibration.bos=false"), mode="resume")
    run(prepare(str(begun), recipe), out, "resume")
    assert tiny.contents(out) == tiny.contents(whole)
    quantize(str(begun), out, recipe, mode="resume")  # complete


def test_a_tokenizer_without_a_first_token(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no token that begins a text"):
        evaluate(demo, text=tiny.text(tmp_path), bos=True)
    subject = open_subject(demo)
    with pytest.raises(CalibrationError, match="has no token that begins a text"):
        draw(Calibration(str(tiny.text(tmp_path)), bos=True), find(str(demo)), subject.model)
