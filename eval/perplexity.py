"""Perplexity with its window rule named, and per byte and per word so that tokenizers compare.

Two rules, both over the whole text without special tokens, mean over all predicted tokens:

    non-overlapping   windows of L tokens, L = min(512, model maximum) unless given; the first token of a window is
                      context only, so L - 1 predictions each; the ragged tail shorter than L is dropped. The rule of
                      the GPTQ paper and of most tables, and our default.
    strided           windows of L tokens whose ends lie `stride` apart; a window scores only the tokens behind the end
                      of the one before, so every token of the text but the first is predicted exactly once, with at
                      least L - stride and at most L - 1 tokens of context (less at the start of the text, where there
                      is no more). The last window is moved left to be full. Costs L / stride times as much.

Some models (Gemma) predict nothing sensible without the token that begins every text. Then, unless told otherwise, and
where told to, it goes before each window, where no prediction of it or behind it alone is scored: the same predictions,
one token of context more.

Bits per byte and word perplexity divide the same sum of losses by the UTF-8 bytes and the words (whitespace-separated)
of exactly the scored tokens: what a window does not score, first tokens and the dropped tail, is not counted either.

    python -m quant.eval.perplexity MODEL --text wikitext2 --stride 256
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import cross_entropy, pad

from quant.calibration.beginning import begins, needed
from quant.calibration.texts import Encoded, encode, resolve
from quant.errors import BitwrightError, ModelError, SettingsError
from quant.eval.subject import Subject, check_ids, open_subject

DEFAULT_WINDOW = 512
_CHUNK = 1 << 20  # logits turned to float32 at once: 4 MB stays in a CPU's cache
_BATCH_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}  # float32 logits of one batch

Progress = Callable[[int, int], None]  # (windows done, windows in all)


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop - 1` go in; the predictions of tokens `first` to `stop - 1` are scored."""

    start: int
    first: int
    stop: int


@dataclass(frozen=True)
class Rule:
    """How a text is cut. `stride` None means non-overlapping; `bos`: the token that begins a text, to go before every
    window. Raises `SettingsError` when the numbers cannot be."""

    length: int
    stride: int | None = None
    max_windows: int | None = None
    bos: int | None = None

    def __post_init__(self) -> None:
        if self.length < 2:
            raise SettingsError(f"window is {self.length}; it needs at least 2 tokens, one to predict from the other.")
        if self.stride is not None and not 1 <= self.stride < self.length:
            raise SettingsError(
                f"stride is {self.stride}; with windows of {self.length} give 1 to {self.length - 1}, or leave it out "
                "for non-overlapping windows."
            )
        if self.max_windows is not None and self.max_windows < 1:
            raise SettingsError(f"max-windows is {self.max_windows}; give at least 1.")

    @property
    def name(self) -> str:
        return "non-overlapping" if self.stride is None else "strided"

    def cut(self, tokens: int) -> list[Window]:
        """The windows of a text of that many tokens, all of the same length.

        Raises:
            SettingsError: the text is too short for one window (non-overlapping) or has no two tokens.
        """
        L = self.length
        if tokens < 2 or (self.stride is None and tokens < L):
            raise SettingsError(
                f"the text has {tokens} tokens, fewer than one window of {L}; give --window or more text."
            )
        if self.stride is None:
            windows = [Window(start, start + 1, start + L) for start in range(0, tokens - L + 1, L)]
        else:
            stops = [min(L, tokens)]
            while stops[-1] < tokens:
                stops.append(min(stops[-1] + self.stride, tokens))
            firsts = [1, *stops[:-1]]
            windows = [Window(max(0, stop - L), first, stop) for first, stop in zip(firsts, stops, strict=True)]
        return windows[: self.max_windows]


@dataclass(frozen=True)
class Perplexity:
    """`nll` is the mean loss per token in nats; `token` its exponential. `word` and `bits_per_byte` are None for a
    tokenizer that cannot tell which characters a token stands for."""

    token: float
    word: float | None
    bits_per_byte: float | None
    nll: float
    tokens: int
    words: int | None
    bytes: int | None
    windows: int


def rule_for(subject: Subject, window: int | None, stride: int | None, max_windows: int | None) -> Rule:
    """The rule for this model: `window` None is min(512, model maximum).

    Raises:
        SettingsError: a window longer than the model's maximum.
    """
    longest = subject.max_length
    if window is None:
        window = DEFAULT_WINDOW if longest is None else min(DEFAULT_WINDOW, longest)
    if longest is not None and window > longest:
        raise SettingsError(f"window is {window}, but {subject.name} takes at most {longest} tokens.")
    return Rule(window, stride, max_windows)


def measure(subject: Subject, encoded: Encoded, rule: Rule, progress: Progress | None = None) -> Perplexity:
    """Perplexity of a causal model over the windows of a text.

    Raises:
        SettingsError: the text does not hold one window.
        ModelError: logits that are not finite.
    """
    windows = rule.cut(len(encoded.ids))
    total, done = 0.0, 0
    for batch, ids_BT in batches(windows, encoded, subject):
        logits_BTV = forward(subject, ids_BT, rule.bos)
        for window, logits_TV, ids_T in zip(batch, logits_BTV, ids_BT, strict=True):
            for logits_CV, targets_C in scored(window, logits_TV, ids_T):
                total += float(cross_entropy(logits_CV.float(), targets_C, reduction="none").double().sum())
        check_finite(total, subject, batch[0])
        done += len(batch)
        if progress is not None:
            progress(done, len(windows))
    return summarize(total, windows, encoded)


def batches(windows: Sequence[Window], encoded: Encoded, subject: Subject) -> Iterator[tuple[Sequence[Window], Any]]:
    """Windows in groups whose logits stay small, with their ids `[B, T]` int64 on the model's device."""
    length = windows[0].stop - windows[0].start
    bound = _BATCH_BYTES.get(subject.device.type, _BATCH_BYTES["cpu"])
    size = max(1, min(32, bound // (4 * length * subject.model.config.get_text_config().vocab_size)))
    for at in range(0, len(windows), size):
        batch = windows[at : at + size]
        ids_BT = torch.stack([encoded.ids[window.start : window.stop] for window in batch])
        yield batch, ids_BT.to(subject.device)


@torch.no_grad()
def forward(subject: Subject, ids_BT: torch.Tensor, bos: int | None = None) -> torch.Tensor:
    """Logits `[B, T, V]` in the model's dtype, of the tokens behind `bos`."""
    if bos is None:
        return subject.model(input_ids=ids_BT, use_cache=False).logits
    return subject.model(input_ids=pad(ids_BT, (1, 0), value=bos), use_cache=False).logits[:, 1:]


def bos_of(subject: Subject, tokenizer: Any) -> int:
    """The token that begins a text. Raises `SettingsError` for a tokenizer without."""
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise SettingsError(f"{subject.name}: its tokenizer has no token that begins a text; leave --bos out.")
    return bos


def behind_bos(rule: Rule, subject: Subject, tokenizer: Any) -> Rule:
    """With the token that begins a text, for which there must be room. Raises `SettingsError` as `bos_of`."""
    length = min(rule.length, (subject.max_length or rule.length + 1) - 1)
    return replace(rule, bos=bos_of(subject, tokenizer), length=length)


def missing(subject: Subject, tokenizer: Any, ids_T: torch.Tensor) -> str | None:
    """Half a sentence if a tokenizer begins texts with a token, and without it the model predicts `ids_T` far worse."""
    bos = begins(tokenizer)
    if bos is None or len(ids_T) < 2:
        return None
    says = lambda given: (forward(subject, ids_BT.to(subject.device)) for ids_BT in given)  # noqa: E731
    found = needed(says, ids_T[: -1 if len(ids_T) == subject.max_length else None], bos)
    if found is None:
        return None
    behind, without = found
    return (
        f"{subject.name} has a perplexity of {behind:.4g} on the first window behind the token that begins a text, "
        f"and {without:.4g} without: "
    )


def scored(window: Window, logits_TV: torch.Tensor, ids_T: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The scored predictions of one window in chunks: logits `[C, V]` and the tokens that came, `[C]`."""
    low, high = window.first - window.start, window.stop - window.start
    rows = max(1, _CHUNK // logits_TV.shape[-1])
    for at in range(low, high, rows):
        end = min(at + rows, high)
        yield logits_TV[at - 1 : end - 1], ids_T[at:end]


def check_finite(total: float, subject: Subject, window: Window) -> None:
    """Raises `ModelError` when a sum of losses stopped being a number."""
    if not math.isfinite(total):
        dtype = str(subject.model.dtype).removeprefix("torch.")
        raise ModelError(
            f"{subject.name}: logits are not finite at tokens {window.start} and following, computed in {dtype}. "
            + ("The weights are damaged." if dtype == "float32" else "Try --dtype float32.")
        )


def summarize(total: float, windows: Sequence[Window], encoded: Encoded) -> Perplexity:
    """Turns a sum of losses (nats) over the scored tokens of `windows` into the three normalized figures."""
    tokens = sum(window.stop - window.first for window in windows)
    extents = [extent for window in windows if (extent := encoded.extent(window.first, window.stop)) is not None]
    bytes_ = sum(size for size, _ in extents) if extents else None
    words = sum(count for _, count in extents) if extents else None
    return Perplexity(
        token=_exp(total / tokens),
        word=_exp(total / words) if words else None,
        bits_per_byte=total / math.log(2) / bytes_ if bytes_ else None,
        nll=total / tokens,
        tokens=tokens,
        words=words,
        bytes=bytes_,
        windows=len(windows),
    )


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # e^700 is the last that fits; nobody wants more digits of a model that bad


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    text: Annotated[str, typer.Option(help="python-docs, wikitext2 or a UTF-8 file.")] = "python-docs",
    window: Annotated[int | None, typer.Option(help="Tokens per window; default min(512, model maximum).")] = None,
    stride: Annotated[int | None, typer.Option(help="Strided windows this far apart.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Score only the first so many.")] = None,
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
) -> None:
    """Print the perplexity of one model on one text, with the rule it was measured by."""
    try:
        source = resolve(text)
        subject = open_subject(model, device, dtype)
        if subject.kind != "causal-lm":
            raise ModelError(f"{model}: no causal language model head; use `quant-eval {model} --against ORIGINAL`.")
        rule = rule_for(subject, window, stride, max_windows)
        encoded = encode(subject.tokenizer(), source)
        check_ids(encoded.ids, subject)
        got = measure(subject, encoded, rule)
    except BitwrightError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    word = "-" if got.word is None else f"{got.word:.4f}"
    per_byte = "-" if got.bits_per_byte is None else f"{got.bits_per_byte:.5f}"
    typer.echo(f"perplexity {got.token:.5f}  bits/byte {per_byte}  word perplexity {word}")
    strides = "" if stride is None else f", stride {stride}"
    typer.echo(
        f"{got.windows} {rule.name} windows of {rule.length} tokens{strides}, {got.tokens} tokens predicted, {dtype} "
        f"on {device}, text {source.name} sha256 {source.sha256[:12]}"
    )


if __name__ == "__main__":
    typer.run(main)
