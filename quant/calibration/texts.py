"""Texts to judge on, their names, and their tokens.

A perplexity means nothing without its text, so a text always travels with a name and the SHA-256 of what was read. A
name is `python-docs` (what every CPython carries: needs no network), `wikitext2` (downloaded by `datasets`), or the
path of a UTF-8 file. Names win over files; `./wikitext2` is the file.

Token ids are those of the whole text without special tokens. The tokenizer is fed pieces of at most 200,000 characters
cut after a newline, since some tokenizers take quadratic time and most warn about length; the cut is part of the rule,
because a token may not cross it. Beside each id stands the character offset where it ends, so that a score over some
tokens can be divided by the bytes and words of exactly those tokens: that number compares across tokenizers, perplexity
per token does not.
"""

from __future__ import annotations

import bisect
import hashlib
import re
import shlex
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from quant.calibration.python_docs import python_docs
from quant.errors import SettingsError
from quant.models.source import first_line

PIECE = 200_000  # characters handed to a tokenizer at once
_LOCAL = "Give the path of a local UTF-8 file instead."


@dataclass(frozen=True)
class Text:
    """A named text. `sha256` is over its UTF-8 bytes; newlines of a file are read as `\\n`."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """A tokenized text: `ids` `[T]` int64; `ends` `[T]`, the character offset where each token ends, never decreasing.

    `ends` is None for a tokenizer that cannot tell (the slow kind). Characters that a tokenizer drops or that several
    tokens share (one emoji, four byte-level tokens) belong to the first token that reaches past them.
    """

    ids: torch.Tensor
    ends: list[int] | None
    text: Text

    @cached_property
    def _word_starts(self) -> list[int]:
        return [match.start() for match in re.finditer(r"\S+", self.text.text)]

    def extent(self, first: int, stop: int) -> tuple[int, int] | None:
        """UTF-8 bytes and words of tokens `first` to `stop - 1`; a word belongs to the token with its first letter.

        None when the tokenizer gave no offsets. The extents of adjacent ranges add up to that of their union.
        """
        if self.ends is None:
            return None
        low = self.ends[first - 1] if first else 0
        high = self.ends[stop - 1]
        words = bisect.bisect_left(self._word_starts, high) - bisect.bisect_left(self._word_starts, low)
        return len(self.text.text[low:high].encode()), words


def resolve(source: str | Path | Text) -> Text:
    """Finds a text by name or path.

    Raises:
        SettingsError: no such name or file, not UTF-8, empty, or a download that failed.
    """
    if isinstance(source, Text):
        return source
    text = _named(source) if isinstance(source, str) and _known(source) else _from_file(Path(source))
    if not text.text.strip():
        raise SettingsError(f"text {text.name}: it is empty. {_LOCAL}")
    return text


def encode(tokenizer: Any, text: Text) -> Encoded:
    """Token ids of the whole text, no special tokens, in pieces (see the module's docstring)."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    ids: list[int] = []
    ends: list[int] = []
    last = 0
    for start, piece in _pieces(text.text):
        got = tokenizer(piece, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
        ids += got["input_ids"]
        for _, end in got["offset_mapping"] if fast else ():
            last = max(last, start + end)
            ends.append(last)
    return Encoded(torch.tensor(ids, dtype=torch.int64), ends if fast else None, text)


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    while start < len(text):
        stop = min(len(text), start + PIECE)
        if stop < len(text):
            newline = text.rfind("\n", start, stop)
            if newline > start:
                stop = newline + 1
        yield start, text[start:stop]
        start = stop


def _wikitext2(split: str) -> str:
    try:
        from datasets import load_dataset  # slow to import, and needed for this one text only

        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return "\n\n".join(row["text"] for row in rows)  # pyright: ignore
    except Exception as error:  # datasets raises a dozen kinds for "not here, not reachable"
        why = f"it could not be downloaded ({first_line(error)}). {_LOCAL}"
        raise SettingsError(f"text wikitext2:{split}: {why}") from error


# name -> reader, and its splits, the default first
_NAMED: dict[str, tuple[Callable[[Any], str], tuple[str, ...]]] = {
    "python-docs": (python_docs, ("heldout", "calibration", "train")),
    "wikitext2": (_wikitext2, ("test", "validation", "train")),
}


def _known(name: str) -> bool:
    return name.partition(":")[0] in _NAMED


@lru_cache(maxsize=4)
def _named(name: str) -> Text:
    base, _, split = name.partition(":")
    read, splits = _NAMED[base]
    split = split or splits[0]
    if split not in splits:
        raise SettingsError(f"text {name}: {base} has no split {split!r}; it has {', '.join(splits)}.")
    return Text(f"{base}:{split}", read(split))


def _from_file(path: Path) -> Text:
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        written = "utf-16" if error.object.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "latin1"
        raise SettingsError(
            f"text {path}: byte {error.start} is not UTF-8; convert it first, for example with "
            f"`iconv -f {written} -t utf-8 {shlex.quote(str(path))} > utf8.txt`."
        ) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise SettingsError(f"text {path}: no such file, and not a known name ({', '.join(_NAMED)}).") from error
        raise SettingsError(f"text {path}: cannot be read ({error.strerror}).") from error
