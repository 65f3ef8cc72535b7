"""Tiny float models with a tokenizer and a text: all that a run of the pipeline reads, in a fraction of a second."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quant import Recipe
from quant.recipe import override, with_spec
from tests.architectures import save

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))


def add_tokenizer(folder: Path) -> Path:
    """One token per ASCII character: 100 of the 128 ids that the models of `architectures` know."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {c: i for i, c in enumerate(CHARACTERS, 4)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    made.save_pretrained(folder)
    return folder


def model(name: str, folder: Path) -> Path:
    """An architecture of `architectures` and its tokenizer in `folder`."""
    return add_tokenizer(save(name, folder))


def text(folder: Path, length: int = 6000) -> Path:
    """Seeded words in a file."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(1, 9))) for _ in range(200)]
    file = folder / "words.txt"
    file.write_text(" ".join(source.choices(words, k=length))[:length], encoding="utf-8")
    return file


def recipe(text: Path, *settings: str, bits: int = 4, group: int = 32) -> Recipe:
    """GPTQ on four short windows in two batches, with dotted settings on top."""
    short = ["calibration.samples=4", "calibration.sequence_length=32", "calibration.batch_size=2"]
    return override(with_spec(Recipe(), bits=bits, group_size=group), [f"calibration.text={text}", *short, *settings])


def contents(folder: Path, *, people: bool = True) -> dict[str, str]:
    """sha256 of every file under `folder` by its path there, but for report.*, which holds times; `people`: README.md
    too."""
    left_out = {"report.json", "report.html"} | (set() if people else {"README.md"})
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in left_out]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
