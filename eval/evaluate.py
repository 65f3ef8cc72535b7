"""`evaluate`: one call that judges a model, alone or against its original.

    original = open_subject("path/to/model")
    report = evaluate("path/to/model-4bit", against=original, text="python-docs")
    print(report.perplexity.token, report.divergence.kl, report.size.linear_bits)

An original that several candidates are compared with is opened once and handed in; its logits are computed again for
each candidate, batch by batch, which costs a forward pass and keeps memory flat. What it says itself of the text is
known from there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quant.calibration.texts import Encoded, Text, encode, resolve
from quant.errors import SettingsError
from quant.eval.compare import Divergence, compare
from quant.eval.encoder import HiddenStates, compare_encoders
from quant.eval.footprint import cost_of, size_of
from quant.eval.generate import NEW_TOKENS, Generation, continued
from quant.eval.perplexity import Perplexity, Progress, Rule, behind_bos, measure, missing, rule_for
from quant.eval.report import Report, Settings
from quant.eval.subject import Subject, check_ids, open_subject
from quant.machine import machine, versions

Source = str | Path | PreTrainedModel | Subject


def evaluate(
    model_or_path: Source,
    *,
    against: Source | None = None,
    text: str | Path | Text = "python-docs",
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    bos: bool | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    generate: int = 0,
    progress: Progress | None = None,
    known: Perplexity | None = None,
) -> Report:
    """Judges a model on a text.

    Args:
        model_or_path: a folder, a hub name, a model in memory or a `Subject`; packed by bitwright or not.
        against: the original, likewise; enables KL divergence, top-1 agreement and the cosines of an encoder.
        text: a name (see `quant.calibration.texts`), a UTF-8 file or a `Text`.
        window: tokens per window; None is min(512, model maximum).
        stride: None for non-overlapping windows, else how far the ends of the windows lie apart.
        max_windows: only the first so many windows (lines, for an encoder).
        bos: before each window the token that begins a text; None: where the original, or without one the model, says
            nothing sensible without it, which the report's note tells. An encoder has its special tokens anyway.
        device, dtype: for models opened here; "auto" is the checkpoint's own dtype.
        generate: how many prompts to continue greedily.
        progress: called with (windows done, windows in all).
        known: the perplexity that another report has for this model as its original, so that it is not measured again.

    Raises:
        SettingsError: settings that cannot be, a text too short, tokenizers that differ.
        ModelError: a model that cannot be opened, or whose outputs are not finite.
        CheckpointError: a packed checkpoint that is damaged.
    """
    start = time.perf_counter()
    source = resolve(text)
    subject = open_subject(model_or_path, device, dtype)
    original = None if against is None else open_subject(against, device, dtype)
    rule = _rule(subject, original, window, stride, max_windows)
    judge = _judge_causal if subject.kind == "causal-lm" else _judge_encoder
    found = judge(subject, original, source, rule, bos, generate, progress, known)
    return _report(subject, original, found, _settings(subject, source, found.rule, generate), start)


@dataclass(frozen=True)
class _Found:
    """What a judge saw, by which rule, and the ids `[T]` of one window to measure speed with."""

    rule: Rule
    window_ids: torch.Tensor
    perplexity: Perplexity | None = None
    original: Perplexity | None = None
    divergence: Divergence | None = None
    hidden: HiddenStates | None = None
    generations: tuple[Generation, ...] = ()
    note: str | None = None


def _report(subject: Subject, original: Subject | None, found: _Found, settings: Settings, start: float) -> Report:
    speed, memory = cost_of(subject, found.window_ids)
    return Report(
        model=subject.name,
        path=str(subject.folder) if subject.folder else None,
        kind=subject.kind,
        against=original.name if original else None,
        perplexity=found.perplexity,
        original=found.original,
        divergence=found.divergence,
        hidden=found.hidden,
        generations=found.generations,
        size=size_of(subject),
        speed=speed,
        memory=memory,
        seconds=time.perf_counter() - start,
        settings=settings,
        note=found.note,
    )


def _settings(subject: Subject, text: Text, rule: Rule, prompts: int) -> Settings:
    return Settings(
        text=text.name,
        text_sha256=text.sha256,
        window_rule=rule.name if subject.kind == "causal-lm" else "lines",
        window=rule.length,
        stride=rule.stride,
        max_windows=rule.max_windows,
        bos=rule.bos is not None,
        device=str(subject.device),
        dtype=str(subject.model.dtype).removeprefix("torch."),
        prompts=prompts,
        new_tokens=NEW_TOKENS if prompts else 0,
        machine=machine(),
        versions=versions(),
    )


def _rule(
    subject: Subject, original: Subject | None, window: int | None, stride: int | None, max_windows: int | None
) -> Rule:
    rule = rule_for(subject, window, stride, max_windows)
    if original is None:
        return rule
    if original.kind != subject.kind:
        raise SettingsError(
            f"{subject.name} is judged as {subject.kind}, {original.name} as {original.kind}: nothing to compare."
        )
    return rule_for(original, rule.length, stride, max_windows)


def _judge_causal(
    subject: Subject, original: Subject | None, text: Text, rule: Rule, bos: bool | None, prompts: int,
    progress: Progress | None, known: Perplexity | None,
) -> _Found:  # fmt: skip
    tokenizer = _tokenizer(subject, original)
    encoded = encode(tokenizer, text)
    check_ids(encoded.ids, subject, original)
    if original is not None:
        _same_tokens(subject, original, encoded)
    note = None if bos else missing(original or subject, tokenizer, encoded.ids[: rule.length])
    if note:
        note += "leave out --no-bos" if bos is False else "judged behind it (--no-bos: without)"
    if bos or (note and bos is None):
        rule = behind_bos(rule, subject, tokenizer)
    pairs = continued(subject, original, text, tokenizer, prompts, rule.bos) if prompts else ()
    ids_T = encoded.ids[: rule.length]
    if original is None:
        alone = known or measure(subject, encoded, rule, progress)
        return _Found(rule, ids_T, alone, generations=pairs, note=note)
    both = compare(subject, original, encoded, rule, progress)
    return _Found(rule, ids_T, both.candidate, both.original, both.divergence, generations=pairs, note=note)


def _judge_encoder(
    subject: Subject, original: Subject | None, text: Text, rule: Rule, bos: bool | None, prompts: int,
    progress: Progress | None, known: Perplexity | None,
) -> _Found:  # fmt: skip
    del bos, prompts, known  # an encoder continues nothing
    tokenizer = _tokenizer(subject, original)
    ids_T = encode(tokenizer, Text(text.name, text.text[: 16 * rule.length])).ids[: rule.length]
    check_ids(ids_T, subject)
    if original is None:
        return _Found(rule, ids_T)
    hidden = compare_encoders(subject, original, text, tokenizer, rule.length, rule.max_windows, progress)
    return _Found(rule, ids_T, hidden=hidden)


def _tokenizer(subject: Subject, original: Subject | None) -> Any:
    """The model's own; a model that came from nowhere borrows the original's."""
    return (subject if subject.source or original is None else original).tokenizer()


def _same_tokens(subject: Subject, original: Subject, encoded: Encoded) -> None:
    """Raises `SettingsError` unless the original's tokenizer cuts the text into the same ids."""
    if not original.source or not subject.source or str(original.source) == str(subject.source):
        return
    files = [Path(source) / "tokenizer.json" for source in (subject.source, original.source)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    theirs = encode(original.tokenizer(), encoded.text)
    if not torch.equal(theirs.ids, encoded.ids):
        raise SettingsError(
            f"{subject.name} and {original.name} cut the text into different tokens, so their predictions cannot be "
            "compared one by one; evaluate both without --against and compare bits per byte."
        )
