"""Texts, window rules and perplexity against loops written out plainly."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant.calibration import texts
from quant.calibration.texts import Text, encode, resolve
from quant.errors import ModelError, SettingsError
from quant.eval.perplexity import Rule, Window, measure, rule_for
from quant.eval.subject import open_subject


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo)


# texts


def test_a_file_is_named_and_hashed(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("één\ntwo\n", encoding="utf-8")
    text = resolve(file)
    assert (text.name, text.text) == ("notes.txt", "één\ntwo\n")
    assert text.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_name_is_its_default_split() -> None:
    heldout = resolve("python-docs")
    assert heldout.name == "python-docs:heldout"
    assert heldout is resolve("python-docs"), "reading it takes seconds: once is enough"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/such/file.txt", "no such file, and not a known name"),
        ("python-docs:test", "has no split 'test'; it has heldout, calibration, train"),
        ("my texts/latin.txt", "byte 1 is not UTF-8.* -f latin1 -t utf-8 'my texts/latin.txt' > utf8.txt"),
        ("wide.txt", "byte 0 is not UTF-8.* -f utf-16 -t utf-8 wide.txt > utf8.txt"),
        ("empty.txt", "it is empty"),
        (".", "cannot be read"),
    ],
)
def test_texts_that_cannot_be_say_what_to_do(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my texts").mkdir()
    Path("my texts/latin.txt").write_bytes(b"h\xe9")
    Path("wide.txt").write_text("as Windows writes it", encoding="utf-16")
    Path("empty.txt").write_bytes(b"\n \n")
    with pytest.raises(SettingsError, match=said):
        resolve(source)


def test_wikitext_is_joined_as_everybody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((*args, kwargs["split"]))
        return [{"text": ""}, {"text": " = A =\n"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    texts._named.cache_clear()
    assert resolve("wikitext2:validation").text == "\n\n = A =\n"
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")]
    texts._named.cache_clear()


def test_a_hub_out_of_reach_points_to_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(SettingsError, match=r"could not be downloaded \(no route\)\. Give the path of a local"):
        resolve("wikitext2")


def test_pieces_are_cut_behind_newlines(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 10)
    source = "abc def\nghi jkl mno pqr stu\n\nvw"
    assert [piece for _, piece in texts._pieces(source)] == ["abc def\n", "ghi jkl mn", "o pqr stu\n", "\nvw"]
    encoded = encode(tokenizer, Text("t", source))
    plain = [i for _, piece in texts._pieces(source) for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    assert encoded.ids.tolist() == plain


@given(source=st.text(min_size=1, max_size=60), cuts=st.lists(st.integers(0, 200), max_size=4))
def test_extents_add_up_to_the_text(demo: Path, source: str, cuts: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    encoded = encode(tokenizer, Text("t", source))
    edges = sorted({0, len(encoded.ids), *(cut % (len(encoded.ids) + 1) for cut in cuts)})
    parts = [encoded.extent(low, high) for low, high in pairwise(edges)]
    assert sum(part[0] for part in parts if part) == len(source.encode())
    assert sum(part[1] for part in parts if part) == len(source.split())


# rules


@given(tokens=st.integers(2, 90), length=st.integers(2, 30), stride=st.integers(1, 29))
def test_strided_predicts_every_token_once(tokens: int, length: int, stride: int) -> None:
    if stride >= length:
        with pytest.raises(SettingsError, match="stride"):
            Rule(length, stride)
        return
    windows = Rule(length, stride).cut(tokens)
    assert [token for w in windows for token in range(w.first, w.stop)] == list(range(1, tokens))
    assert {w.stop - w.start for w in windows} == {min(length, tokens)}
    assert all(w.first - w.start >= min(w.first, length - stride) for w in windows)


def test_non_overlapping_drops_the_tail() -> None:
    assert Rule(4).cut(11) == [Window(0, 1, 4), Window(4, 5, 8)]
    assert Rule(4, max_windows=1).cut(11) == [Window(0, 1, 4)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rule(1), "at least 2 tokens"),
        (lambda: Rule(8, max_windows=0), "max-windows is 0"),
        (lambda: Rule(8).cut(7), "7 tokens, fewer than one window of 8"),
    ],
)
def test_rules_that_cannot_be(make: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        make()


def test_the_default_window_ends_at_512_and_at_the_models_maximum(demo: Path, llama: Path) -> None:
    assert rule_for(open_subject(demo), None, None, None).length == 512
    assert rule_for(open_subject(llama), None, None, None).length == 64
    with pytest.raises(SettingsError, match="llama takes at most 64 tokens"):
        rule_for(open_subject(llama), 65, None, None)


# perplexity


def test_agrees_with_five_plain_lines_of_transformers(demo: Path) -> None:
    text = resolve("python-docs")
    subject = open_subject(demo)
    got = measure(subject, encode(subject.tokenizer(), text), Rule(128, max_windows=20))

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32),
        AutoTokenizer.from_pretrained(demo),
    )
    ids = torch.tensor(tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)[:20]
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    assert got.token == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (got.windows, got.tokens) == (20, 20 * 127)

    scored = [tokenizer.decode(window) for window in windows]
    firsts = [tokenizer.decode(window[:1]) for window in windows]
    size = sum(len(text.encode()) for text in scored) - sum(len(text.encode()) for text in firsts)
    assert got.bytes == size
    assert got.bits_per_byte == pytest.approx(got.nll * got.tokens / math.log(2) / size)
    assert got.word is not None
    assert got.words is not None
    assert math.log(got.word) * got.words == pytest.approx(got.nll * got.tokens)


def test_strided_equals_one_forward_per_token(llama: Path, words: Path) -> None:
    subject = open_subject(llama)
    encoded = encode(subject.tokenizer(), resolve(words))
    short = texts.Encoded(encoded.ids[:101], None, encoded.text)
    rule = Rule(24, stride=7)
    got = measure(subject, short, rule)

    total = 0.0
    stop, scored_until = 24, 1
    for token in range(1, 101):
        while token >= stop:
            stop, scored_until = min(stop + 7, 101), stop
        context = short.ids[max(0, stop - 24) : token]
        assert len(context) >= min(token, 24 - 7)
        with torch.no_grad():
            logits = subject.model(input_ids=context[None]).logits[0, -1]
        total += float(cross_entropy(logits, short.ids[token]))
    assert scored_until < 101
    assert got.tokens == 100
    assert got.nll == pytest.approx(total / 100, rel=1e-5)
    assert got.bits_per_byte is None, "without offsets nothing is claimed per byte"


def test_batches_do_not_change_the_sum(llama: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject(llama)
    encoded = encode(subject.tokenizer(), resolve(words))
    seen: list[tuple[int, int]] = []
    whole = measure(subject, encoded, Rule(50), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (whole.windows, whole.windows)
    monkeypatch.setattr("quant.eval.perplexity._BATCH_BYTES", {"cpu": 1})
    monkeypatch.setattr("quant.eval.perplexity._CHUNK", 300)
    assert measure(subject, encoded, Rule(50)).nll == pytest.approx(whole.nll, rel=1e-6)


def test_damaged_weights_cost_perplexity(demo: Path) -> None:
    subject = open_subject(demo)
    encoded = encode(subject.tokenizer(), resolve("python-docs"))
    levels = []
    for step in (0.0, 0.1, 0.5):  # rounding to multiples of step times the largest weight
        for name, parameter in subject.model.named_parameters():
            if step and "proj" in name:
                grid = step * float(parameter.data.abs().max())
                parameter.data = (parameter.data / grid).round() * grid
        levels.append(measure(subject, encoded, Rule(256, max_windows=8)).token)
    assert levels == sorted(levels)
    assert levels[2] > 2 * levels[0]


def test_logits_that_are_not_finite_are_an_error(llama: Path, words: Path) -> None:
    subject = open_subject(llama)
    encoded = encode(subject.tokenizer(), resolve(words))
    next(subject.model.parameters()).data[:] = math.nan  # the embedding
    with pytest.raises(ModelError, match="llama: logits are not finite at tokens 0 and following, computed in float32"):
        measure(subject, encoded, Rule(64, max_windows=2))


def test_low_precision_models_are_scored_in_float32(llama: Path, words: Path) -> None:
    subject = open_subject(llama, dtype="bfloat16")
    encoded = encode(subject.tokenizer(), resolve(words))
    got = measure(subject, encoded, Rule(64, max_windows=1))
    ids = encoded.ids[:64]
    with torch.no_grad():
        logits = subject.model(input_ids=ids[None]).logits[0, :-1]
    assert logits.dtype == torch.bfloat16
    plain = -log_softmax(logits.float(), -1)[torch.arange(63), ids[1:]].mean()
    assert got.nll == pytest.approx(float(plain), rel=1e-6)
