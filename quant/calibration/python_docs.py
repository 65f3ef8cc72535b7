"""English text that is already on every machine: the documentation shipped inside CPython.

A quantizer needs text three times: to calibrate, to judge, and here to train the demonstration model. Downloading a
corpus makes the tests depend on a network and on somebody's server, so this module reads what the interpreter carries:
the language reference that `help()` prints (`pydoc_data.topics`, one document per topic) and the docstrings of the
standard library. Modules are parsed with `ast` and never imported, so nothing is executed.

Every document has an owner, `topic:<name>` or the dotted module name, and an owner belongs to exactly one split: the
SHA-256 of its name modulo 11 gives held-out (0), calibration (1) or train (2 to 10). The rule does not depend on the
Python version, the text does: bytes are the same only for the same CPython release with the same modules installed. A
document that occurs twice is kept once, for the first owner in sorted order, so no exact text is on both sides of a
split. CPython 3.11 to 3.13 have 1.71 to 1.75 MB of train, 0.16 to 0.17 MB of calibration and 0.15 to 0.16 MB of
held-out text. Cost: some seconds, once.
"""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Split = Literal["train", "calibration", "heldout"]

_BUCKETS = 11
_RESERVED: dict[int, Split] = {0: "heldout", 1: "calibration"}
_SKIPPED = {
    "__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_docs(split: Split) -> str:
    """Returns one split of the documentation of the running CPython, documents separated by a blank line.

    Args:
        split: "train", "calibration" or "heldout".

    Raises:
        ValueError: `split` is none of the three.
    """
    if split not in ("train", "calibration", "heldout"):
        raise ValueError(f"python_docs: split is {split!r}; expected 'train', 'calibration' or 'heldout'.")
    return "\n\n".join(_splits()[split]) + "\n"


@cache
def _splits() -> dict[Split, list[str]]:
    seen: set[str] = set()
    chosen: dict[Split, list[str]] = {"train": [], "calibration": [], "heldout": []}
    for owner, text in _documents():
        if text not in seen:
            seen.add(text)
            chosen[_split_of(owner)].append(text)
    return chosen


def _split_of(owner: str) -> Split:
    bucket = int.from_bytes(hashlib.sha256(owner.encode()).digest(), "big") % _BUCKETS
    return _RESERVED.get(bucket, "train")


def _documents() -> Iterator[tuple[str, str]]:
    """Yields (owner, text) in sorted order of owners; the documents of a module come in the order of its source."""
    sources = {f"topic:{name}": text for name, text in topics.items()}
    root = Path(sysconfig.get_path("stdlib"))
    modules = {".".join(path.relative_to(root).with_suffix("").parts): path for path in _module_files(root)}
    for owner in sorted(sources | modules):
        texts = [sources[owner]] if owner in sources else _docstrings(modules[owner])
        for text in texts:
            if cleaned := inspect.cleandoc(text).strip():
                yield owner, cleaned


def _module_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name in _SKIPPED or path.name.startswith("config-"):
            continue
        if path.is_dir():
            yield from _module_files(path)
        elif path.suffix == ".py":
            yield path


def _docstrings(path: Path) -> list[str]:
    """Returns the raw docstrings of one file in source order; a file that does not parse has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    nodes = [node for node in _statements(tree) if isinstance(node, _DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node, clean=False))]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all statements in it. Expressions, most of a tree, hold none."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from _statements(child)
