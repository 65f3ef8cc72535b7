"""Greedy continuations, side by side.

The common prefix of two greedy continuations says after how many tokens a user could first notice a difference; the
repetition rate (share of 4-grams that occurred before in the same continuation) catches the loops that low-bit models
fall into while their perplexity still looks fine.

The loop is written out instead of `model.generate`, whose result depends on penalties and sampling settings stored with
each checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

from quant.calibration.texts import Text
from quant.errors import SettingsError
from quant.eval.subject import Subject

PROMPT_TOKENS = 24
NEW_TOKENS = 48
_SMALLEST_PROMPT = 4


@dataclass(frozen=True)
class Generation:
    """One prompt continued greedily; the fields of the original are None without one. `common_prefix` counts tokens."""

    prompt: str
    text: str
    repetition: float
    tokens: int
    original_text: str | None = None
    original_repetition: float | None = None
    common_prefix: int | None = None


@torch.no_grad()
def greedy(subject: Subject, ids_BT: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yields the most likely next tokens `[B]`, `steps` times; the first yield is the end of the prefill."""
    # transformers 5.24 calls it `cache`, and warns of the name that it had until then
    name = "cache" if "cache" in signature(subject.model.forward).parameters else "past_key_values"
    cache: Any = None
    step_BT = ids_BT.to(subject.device)
    seen_BT = step_BT
    for _ in range(steps):
        out = subject.model(input_ids=step_BT, use_cache=True, **{name: cache})
        next_B = out.logits[:, -1].argmax(-1)
        yield next_B
        cache = getattr(out, name, None)
        seen_BT = torch.cat([seen_BT, next_B[:, None]], 1)
        step_BT = next_B[:, None] if cache is not None else seen_BT  # no cache: the whole sequence again


def prompts(text: Text, tokenizer: Any, count: int, length: int = PROMPT_TOKENS) -> list[tuple[str, list[int]]]:
    """The first tokens of `count` paragraphs spread evenly over the text, all of the same length.

    Raises:
        SettingsError: the text has no tokens to start from.
    """
    paragraphs = [paragraph.strip() for paragraph in text.text.split("\n\n")]
    long = [paragraph for paragraph in paragraphs if len(paragraph) >= 8 * length]
    if len(long) < count:  # few blank lines: cut anywhere instead
        size = max(1, len(text.text) // count)
        long = [text.text[at : at + size].strip() for at in range(0, len(text.text), size)]
    chosen = [long[index * len(long) // count] for index in range(min(count, len(long)))]
    encoded = [
        tokenizer(piece[: 32 * length], add_special_tokens=False, verbose=False)["input_ids"] for piece in chosen
    ]
    encoded = [ids for ids in encoded if len(ids) >= _SMALLEST_PROMPT]
    if not encoded:
        raise SettingsError(f"text {text.name}: too short to take a prompt from; use --no-generate.")
    length = min(length, *(len(ids) for ids in encoded))
    return [(tokenizer.decode(ids[:length]), ids[:length]) for ids in encoded]


def continued(
    candidate: Subject, original: Subject | None, text: Text, tokenizer: Any, count: int, bos: int | None = None
) -> tuple[Generation, ...]:
    """Continues `count` prompts from the text, behind `bos`, with both models, in one batch each."""
    chosen = prompts(text, tokenizer, count)
    ids_BT = torch.tensor([ids if bos is None else [bos, *ids] for _, ids in chosen])
    steps = NEW_TOKENS
    for subject in (candidate, original):
        if subject is not None and subject.max_length is not None:
            steps = min(steps, subject.max_length - ids_BT.shape[1])
    if steps < 1:
        raise SettingsError(f"{candidate.name}: no room for new tokens behind a prompt; use --no-generate.")
    mine = _continue(candidate, ids_BT, steps, tokenizer)
    theirs = _continue(original, ids_BT, steps, tokenizer) if original is not None else [None] * len(mine)
    return tuple(_pair(prompt, a, b, tokenizer) for (prompt, _), a, b in zip(chosen, mine, theirs, strict=True))


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two continuations share from the start."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def repetition(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams that occurred before; 0 when there is none."""
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _continue(subject: Subject, ids_BT: torch.Tensor, steps: int, tokenizer: Any) -> list[list[int]]:
    columns = list(greedy(subject, ids_BT, steps))
    rows: list[list[int]] = torch.stack(columns, 1).tolist()
    end = getattr(tokenizer, "eos_token_id", None)
    return [row[: row.index(end)] if end in row else row for row in rows]


def _pair(prompt: str, mine: list[int], theirs: list[int] | None, tokenizer: Any) -> Generation:
    text = tokenizer.decode(mine)
    if theirs is None:
        return Generation(prompt, text, repetition(mine), len(mine))
    original = (tokenizer.decode(theirs), repetition(theirs), common_prefix(mine, theirs))
    return Generation(prompt, text, repetition(mine), len(mine), *original)
