"""Encoders: how far the hidden states turned away from the original's.

A model without a language-model head predicts nothing that could be scored on plain text, so it is compared with its
original: the cosine between the last hidden states on the same input, per token, and per line after averaging over the
line's tokens (the usual sentence embedding). Every non-empty line of the text is one input, with the special tokens the
model was trained with, cut at the window. Lines are sorted by length so that a batch carries little padding, which is
masked out of everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from quant.calibration.texts import Text
from quant.errors import ModelError, SettingsError
from quant.eval.perplexity import Progress
from quant.eval.subject import Subject, check_ids

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class HiddenStates:
    """Cosines to the original: of each token's last hidden state, and of each line's mean over its tokens."""

    token: float
    token_min: float
    sentence: float
    sentence_min: float
    tokens: int
    sentences: int


def compare_encoders(
    candidate: Subject,
    original: Subject,
    text: Text,
    tokenizer: Any,
    window: int,
    max_lines: int | None = None,
    progress: Progress | None = None,
) -> HiddenStates:
    """Cosines over the lines of a text, at most the first `max_lines`.

    Raises:
        SettingsError: no lines, or hidden states of different width.
        ModelError: hidden states that are not finite.
    """
    lines = [line.strip() for line in text.text.splitlines() if line.strip()][:max_lines]
    encoded: list[list[int]] = tokenizer(lines, truncation=True, max_length=window, verbose=False)["input_ids"]
    encoded = [ids for ids in encoded if ids]
    if not encoded:
        raise SettingsError(f"text {text.name}: no line has a token.")
    check_ids(torch.tensor([max(ids) for ids in encoded]), candidate, original)
    tokens, sentences, done = [], [], 0
    for ids_BT, mask_BT in _batches(encoded, getattr(tokenizer, "pad_token_id", None) or 0):
        h_BTD = _hidden(candidate, ids_BT, mask_BT)
        h0_BTD = _hidden(original, ids_BT, mask_BT).to(h_BTD.device)
        if h_BTD.shape != h0_BTD.shape:
            sizes = f"{h_BTD.shape[-1]} and {h0_BTD.shape[-1]}"
            raise SettingsError(
                f"{candidate.name} and {original.name} have hidden sizes {sizes}; they cannot be compared."
            )
        mask_BT = mask_BT.to(h_BTD.device)
        tokens.append(cosine_similarity(h_BTD, h0_BTD, dim=-1)[mask_BT.bool()].cpu())
        sentences.append(cosine_similarity(_mean(h_BTD, mask_BT), _mean(h0_BTD, mask_BT), dim=-1).cpu())
        if not bool(torch.isfinite(sentences[-1]).all()):
            raise ModelError(f"{candidate.name} or {original.name}: hidden states are not finite. Try --dtype float32.")
        done += len(ids_BT)
        if progress is not None:
            progress(done, len(encoded))
    token, sentence = torch.cat(tokens).double(), torch.cat(sentences).double()
    cosines = (float(token.mean()), float(token.min()), float(sentence.mean()), float(sentence.min()))
    return HiddenStates(*cosines, len(token), len(sentence))


@torch.no_grad()
def _hidden(subject: Subject, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[B, T, D]` float32; a head on top, if the checkpoint kept one, is left out."""
    device = subject.device
    return subject.model.base_model(
        input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)
    ).last_hidden_state.float()


def _mean(h_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    weight_BT1 = mask_BT.unsqueeze(-1).to(h_BTD.dtype)
    return (h_BTD * weight_BT1).sum(1) / weight_BT1.sum(1)


def _batches(encoded: list[list[int]], pad: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask `[B, T]` int64, padded on the right, longest lines first."""
    order = sorted(encoded, key=len, reverse=True)
    at = 0
    while at < len(order):
        longest = len(order[at])
        rows = order[at : at + max(1, _BATCH_TOKENS // longest)]
        at += len(rows)
        ids_BT = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        yield ids_BT, mask_BT
