"""Divergence, generations and the cosines of encoders against naive computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant.calibration.texts import Text, encode, resolve
from quant.errors import ModelError, SettingsError
from quant.eval import evaluate as package
from quant.eval.compare import _quantile, compare
from quant.eval.encoder import compare_encoders
from quant.eval.evaluate import evaluate
from quant.eval.generate import common_prefix, continued, greedy, prompts, repetition
from quant.eval.perplexity import Rule, measure
from quant.eval.subject import Subject, open_subject
from tests import tiny

DOCUMENT = "A short line.\nAnother, somewhat longer than the first.\n\nThe third one\n"


def noisy(folder: Path, scale: float = 0.02) -> PreTrainedModel:
    """The model with seeded noise on its matrices."""
    subject = open_subject(folder)
    generator = torch.Generator().manual_seed(3)
    for parameter in subject.model.parameters():
        if parameter.dim() > 1:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return subject.model


# divergence


def test_a_model_does_not_diverge_from_itself(demo: Path) -> None:
    report = evaluate(demo, against=demo, max_windows=3, generate=1)
    assert report.divergence is not None
    assert (report.divergence.kl, report.divergence.kl_max, report.divergence.top1) == (0.0, 0.0, 1.0)
    assert report.ratio == 1.0
    assert report.common_prefix == report.generations[0].tokens


@pytest.mark.parametrize("stride", [None, 11])
def test_divergence_equals_the_naive_one(llama: Path, words: Path, stride: int | None) -> None:
    original, candidate = open_subject(llama), open_subject(noisy(llama))
    encoded = encode(original.tokenizer(), resolve(words))
    rule = Rule(32, stride, max_windows=9)
    got = compare(candidate, original, encoded, rule)

    kls, same = [], []
    for window in rule.cut(len(encoded.ids)):
        ids = encoded.ids[window.start : window.stop]
        with torch.no_grad():
            p = original.model(input_ids=ids[None]).logits[0].double().softmax(-1)
            q = candidate.model(input_ids=ids[None]).logits[0].double().softmax(-1)
        for token in range(window.first, window.stop):
            row = token - window.start - 1
            kls.append(float((p[row] * (p[row] / q[row]).log()).sum()))
            same.append(int(p[row].argmax() == q[row].argmax()))
    assert got.divergence.kl == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert got.divergence.kl_max == pytest.approx(max(kls), rel=1e-3)
    assert got.divergence.kl_p99 == pytest.approx(sorted(kls)[-(-99 * len(kls) // 100) - 1], rel=1e-3)
    assert got.divergence.top1 == sum(same) / len(same)
    assert got.candidate == measure(candidate, encoded, rule)
    assert got.original == measure(original, encoded, rule)


def test_quantile_is_a_value_that_the_share_does_not_exceed() -> None:
    values = torch.arange(1.0, 101.0)
    assert [_quantile(values, share) for share in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert _quantile(torch.tensor([7.0]), 0.99) == 7


def test_more_damage_diverges_more(demo: Path) -> None:
    original = open_subject(demo)
    found = [evaluate(noisy(demo, scale), against=original, max_windows=4).divergence for scale in (0.01, 0.05)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].kl < found[1].kl
    assert found[0].top1 > found[1].top1


def test_other_tokenizers_and_vocabularies_are_refused(demo: Path, llama: Path, words: Path) -> None:
    with pytest.raises(SettingsError, match="cut the text into different tokens"):
        evaluate(llama, against=demo, text=words)
    original = open_subject(demo)
    encoded = encode(open_subject(llama).tokenizer(), resolve(words))
    with pytest.raises(SettingsError, match="llama and model predict 128 and 1024 tokens"):
        compare(open_subject(llama), original, encoded, Rule(16, max_windows=1))


def test_an_encoder_is_not_compared_with_a_language_model(demo: Path, bert: Path) -> None:
    with pytest.raises(SettingsError, match="bert is judged as encoder, model as causal-lm"):
        evaluate(bert, against=demo)


def test_window_must_suit_both(llama: Path, demo: Path, words: Path) -> None:
    with pytest.raises(SettingsError, match="llama takes at most 64 tokens"):
        evaluate(demo, against=llama, text=words)


# generations


def test_greedy_is_what_generate_does(demo: Path) -> None:
    subject = open_subject(demo)
    chosen = prompts(resolve("python-docs"), subject.tokenizer(), 2)
    ids = torch.tensor([ids for _, ids in chosen])
    mine = torch.stack(list(greedy(subject, ids, 12)), 1)
    model: Any = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    assert mine.tolist() == theirs[:, ids.shape[1] :].tolist()


def test_greedy_without_a_cache_sees_everything_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject(llama)
    ids = torch.arange(5, 15)[None]
    cached = torch.stack(list(greedy(subject, ids, 6)), 1)
    forward = subject.model.forward

    def uncached(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        out = forward(input_ids=input_ids, use_cache=False)
        out.past_key_values = None
        return out

    monkeypatch.setattr(subject.model, "forward", uncached)
    assert torch.equal(torch.stack(list(greedy(subject, ids, 6)), 1), cached)


def test_side_by_side(demo: Path) -> None:
    original, candidate = open_subject(demo), open_subject(noisy(demo, 0.05))
    pairs = continued(candidate, original, resolve("python-docs"), original.tokenizer(), 3)
    assert len(pairs) == 3
    for pair in pairs:
        assert pair.original_text is not None
        assert pair.common_prefix is not None
        assert 0 <= pair.common_prefix <= pair.tokens
        assert pair.prompt.strip()


def test_prefix_and_repetition() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2]) == 0


def test_a_text_too_short_for_prompts(llama: Path) -> None:
    with pytest.raises(SettingsError, match="too short to take a prompt from; use --no-generate"):
        prompts(Text("t", "ab"), open_subject(llama).tokenizer(), 3)


# encoders


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model("bert", tmp_path_factory.mktemp("encoder") / "bert")


def test_cosines_equal_the_naive_ones(bert: Path) -> None:
    original, candidate = open_subject(bert), open_subject(noisy(bert))
    tokenizer = original.tokenizer()
    got = compare_encoders(candidate, original, Text("t", DOCUMENT), tokenizer, window=32)

    tokens, lines = [], []
    for line in filter(None, DOCUMENT.splitlines()):
        batch = tokenizer(line, return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            h = candidate.model(**batch).last_hidden_state[0]
            h0 = original.model(**batch).last_hidden_state[0]
        tokens += cosine_similarity(h, h0, dim=-1).tolist()
        lines.append(float(cosine_similarity(h.mean(0), h0.mean(0), dim=0)))
    assert (got.tokens, got.sentences) == (len(tokens), 3)
    assert got.token == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)
    assert got.token_min == pytest.approx(min(tokens), rel=1e-5)
    assert got.sentence == pytest.approx(sum(lines) / 3, rel=1e-5)
    assert got.sentence_min == pytest.approx(min(lines), rel=1e-5)
    assert got.sentence < 0.9999


def test_an_encoder_is_judged_by_its_hidden_states(bert: Path, words: Path) -> None:
    report = evaluate(bert, against=bert, text=words, window=16, generate=2)
    assert report.kind == "encoder"
    assert report.hidden is not None
    assert report.hidden.token == pytest.approx(1, abs=1e-6)
    assert (report.perplexity, report.divergence, report.generations) == (None, None, ())
    assert report.settings.window_rule == "lines"


def test_a_head_on_an_encoder_is_left_out(bert: Path, words: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    whole = BertForMaskedLM(BertConfig.from_pretrained(bert))
    whole.save_pretrained(tmp_path / "masked")
    tiny.add_tokenizer(tmp_path / "masked")
    report = evaluate(whole.eval(), against=tmp_path / "masked", text=words, max_windows=1, window=16)
    assert report.hidden is not None
    assert report.hidden.token == pytest.approx(1, abs=1e-6)


def test_hidden_states_that_are_not_finite_are_an_error(bert: Path) -> None:
    broken = noisy(bert)
    next(broken.parameters()).data[:] = torch.nan  # the embedding
    with pytest.raises(ModelError, match="hidden states are not finite"):
        compare_encoders(open_subject(broken), open_subject(bert), Text("t", "abc"), open_subject(bert).tokenizer(), 32)


def test_opened_models_are_not_opened_again(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = open_subject(demo)
    opened: list[Any] = []
    monkeypatch.setattr(
        package, "open_subject", lambda source, *rest: opened.append(source) or open_subject(source, *rest)
    )
    report = evaluate(original, max_windows=1)
    assert isinstance(opened[0], Subject)
    assert opened[0].model is original.model
    assert report.against is None
