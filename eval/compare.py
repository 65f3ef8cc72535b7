"""What a candidate changed: KL divergence and top-1 agreement to the original, on the same tokens.

Perplexity can stay the same while the answers change; the divergence KL(original || candidate) per predicted token sees
every change of the distribution ("Accuracy is Not All You Need", arXiv:2407.09141). Both models run in lockstep and the
logits of one batch are all that is ever kept; of the whole text only one float32 per token remains, for the quantiles.
Softmaxes are float32 whatever the models compute in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax

from quant.calibration.texts import Encoded
from quant.errors import SettingsError
from quant.eval.perplexity import (
    Perplexity,
    Progress,
    Rule,
    batches,
    check_finite,
    forward,
    scored,
    summarize,
)
from quant.eval.subject import Subject


@dataclass(frozen=True)
class Divergence:
    """KL(original || candidate) in nats over the scored tokens: mean, 99th percentile, maximum. `top1` is the share of
    tokens where both models rank the same token first."""

    kl: float
    kl_p99: float
    kl_max: float
    top1: float


@dataclass(frozen=True)
class Comparison:
    """Both perplexities and the divergence between them, from one pass over the text."""

    candidate: Perplexity
    original: Perplexity
    divergence: Divergence


@dataclass(frozen=True)
class _Scores:
    """Per predicted token `[C]`: losses of both in nats, divergence, and whether the first ranks agree."""

    nll: torch.Tensor
    nll_original: torch.Tensor
    kl: torch.Tensor
    same: torch.Tensor


def compare(
    candidate: Subject, original: Subject, encoded: Encoded, rule: Rule, progress: Progress | None = None
) -> Comparison:
    """Scores both models on the same windows.

    Raises:
        SettingsError: different vocabularies, or the text does not hold one window.
        ModelError: logits that are not finite.
    """
    windows = rule.cut(len(encoded.ids))
    total, total_original, agreed, done = 0.0, 0.0, 0, 0
    kls: list[torch.Tensor] = []
    for batch, ids_BT in batches(windows, encoded, candidate):
        logits_BTV, logits0_BTV = (forward(one, ids_BT.to(one.device), rule.bos) for one in (candidate, original))
        if logits_BTV.shape != logits0_BTV.shape:
            sizes = f"{logits_BTV.shape[-1]} and {logits0_BTV.shape[-1]}"
            raise SettingsError(
                f"{candidate.name} and {original.name} predict {sizes} tokens; they cannot be compared."
            )
        for window, logits_TV, logits0_TV, ids_T in zip(batch, logits_BTV, logits0_BTV, ids_BT, strict=True):
            pairs = zip(scored(window, logits_TV, ids_T), scored(window, logits0_TV, ids_T), strict=True)
            for (logits_CV, targets_C), (logits0_CV, _) in pairs:
                got = _score(logits_CV, logits0_CV, targets_C)
                total += float(got.nll.double().sum())
                total_original += float(got.nll_original.double().sum())
                agreed += int(got.same.sum())
                kls.append(got.kl.cpu())
        del logits_BTV, logits0_BTV  # before the next batch's come
        check_finite(total, candidate, batch[0])
        check_finite(total_original, original, batch[0])
        done += len(batch)
        if progress is not None:
            progress(done, len(windows))
    kl = torch.cat(kls)
    divergence = Divergence(
        kl=float(kl.double().mean()), kl_p99=_quantile(kl, 0.99), kl_max=float(kl.max()), top1=agreed / len(kl)
    )
    return Comparison(summarize(total, windows, encoded), summarize(total_original, windows, encoded), divergence)


def _score(logits_CV: torch.Tensor, logits0_CV: torch.Tensor, targets_C: torch.Tensor) -> _Scores:
    q_CV = log_softmax(logits_CV.float(), -1)
    p_CV = log_softmax(logits0_CV.to(q_CV.device).float(), -1)
    at_C1 = targets_C.unsqueeze(-1)
    return _Scores(
        nll=-q_CV.gather(-1, at_C1).squeeze(-1),
        nll_original=-p_CV.gather(-1, at_C1).squeeze(-1),
        same=q_CV.argmax(-1) == p_CV.argmax(-1),
        kl=(p_CV.exp() * (p_CV - q_CV)).sum(-1).clamp_min(0),  # rounding can push a zero to -1e-8
    )


def _quantile(values: torch.Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (`torch.quantile` stops at 16 M values)."""
    rank = max(1, -(-int(len(values) * share * 1000) // 1000))
    return float(values.kthvalue(min(rank, len(values))).values)
