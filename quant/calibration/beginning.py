"""Whether a model needs the token that begins a text.

Some (Gemma) say nothing sensible in a window that does not begin with it; to all others it is one token of context
more, worth a few per cent. So where a tokenizer begins texts with one, the same predictions are made behind it and
without it. Before a calibration, by the float model, one block in memory: it costs two short windows of the pass that
all calibration windows take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad

from quant.models.skeleton import Skeleton
from quant.models.stream import stream_all
from quant.progress import Progress

FAR_BETTER = 0.7  # a single token of context more is worth a few per cent
TOKENS = 128  # that a calibration is decided on: logits of a large vocabulary are 80 MB


def begins(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else None


def needed(
    says: Callable[[Sequence[torch.Tensor]], Iterable[torch.Tensor]], ids_T: torch.Tensor, bos: int
) -> tuple[float, float] | None:
    """Perplexities of `ids_T` behind `bos` and without, the same predictions; None unless the first is far better.
    `says`: logits `[1, T, V]` of inputs `[1, T]`."""
    given = [pad(ids_T, (1, 0), value=bos)[None], ids_T[None]]
    lost = (cross_entropy(logits[0, -len(ids_T) : -1].float(), ids_T[1:].to(logits.device)) for logits in says(given))
    behind, without = (math.exp(min(float(nats), 700.0)) for nats in lost)
    return (behind, without) if behind < FAR_BETTER * without else None


def calibrates_behind(
    skeleton: Skeleton, chain: Sequence[str], tokenizer: Any, ids_T: torch.Tensor, progress: Progress
) -> bool:
    """Whether calibration windows, of which `ids_T` is the first, are to begin with the token that begins a text."""
    bos, ids_T = begins(tokenizer) if skeleton.model.can_generate() else None, ids_T[:-1][:TOKENS]
    if bos is None or len(ids_T) < 2:
        return False
    progress.step("trying a window behind the token that begins a text, and without")
    says = lambda given: stream_all(skeleton, chain, [{"input_ids": ids.to(skeleton.device)} for ids in given])  # noqa: E731
    found = needed(says, ids_T, bos)
    if found is not None:
        progress.say(
            f"calibration windows begin with the token that begins a text: perplexity {found[0]:.4g} on the first one "
            f"behind it, {found[1]:.4g} without (--set calibration.bos=false leaves it out)"
        )
    return found is not None
