"""Calibration inputs: windows of tokens cut from one text, the same for everyone with the same seed.

Windows are full, so no padding ever enters a Hessian.
The starting places are the ones that the shared rule for comparing tools prescribes (`torch.randint`, seed 0).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from quant.calibration.batch import Batch as Batch
from quant.calibration.batch import moved as moved
from quant.calibration.batch import timestep
from quant.calibration.texts import Text, encode, resolve
from quant.errors import CalibrationError, ModelError, SettingsError
from quant.models.source import Source, first_line
from quant.recipe import Calibration

UNBOUNDED = 2**31


@dataclass(frozen=True)
class Samples:
    """`text`, `sha256`: what the batches were cut from; `tokens`: how many. `probe`: what the verification runs on,
    where it is not a part of the first batch. `weights`: how much each batch counts, of mean 1 over rows. `bos`:
    whether each window begins with the token that begins a text."""

    batches: tuple[Batch, ...]
    text: str
    sha256: str
    tokens: int
    probe: Batch | None = None
    weights: Sequence[float] | None = None
    bos: bool = False

    def by_timestep(self) -> dict[str, float] | None:
        """The weights of the timesteps, by their value."""
        if self.weights is None:
            return None
        return {f"{timestep(batch):g}": weight for batch, weight in zip(self.batches, self.weights, strict=True)}

    def tokens_sha256(self) -> str:
        """What the model will be given: it tells two tokenizers apart where the text does not."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for name, value in sorted(batch.items()):
                for x in pytree.tree_leaves(value):
                    said = list(x.shape) if isinstance(x, torch.Tensor) else x
                    digest.update(f"{name}{said}".encode())
                    if isinstance(x, torch.Tensor):
                        digest.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_tokenizer(source: Source) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=False)
    except Exception as error:  # tokenizers raise of every kind, down to a bare Exception
        reason = first_line(error).rstrip(": ")
        raise ModelError(
            f"{source.name}: its tokenizer cannot be loaded ({reason}); calibration needs one: add tokenizer.json, or "
            "use --recipe rtn, which reads no text"
        ) from None


def read_text(calibration: Calibration) -> Text:
    """Raises `CalibrationError` for a text that cannot be read."""
    try:
        return resolve(calibration.text)
    except SettingsError as error:
        raise CalibrationError(f"calibration {error}") from None


def draw(calibration: Calibration, source: Source, model: Any) -> Samples:
    """`samples` windows from the calibration text; without `bos` where that is not decided.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    text = read_text(calibration)
    tokenizer = load_tokenizer(source)
    ids, bos = encode(tokenizer, text).ids, getattr(tokenizer, "bos_token_id", None)
    if calibration.bos and bos is None:
        raise CalibrationError(f"{source.name}: its tokenizer has no token that begins a text; leave calibration.bos")
    length = min(calibration.sequence_length, context_length(model)) - bool(calibration.bos)
    if len(ids) <= length + 1:
        raise CalibrationError(
            f"calibration text {text.name}: {len(ids)} tokens, and one window takes {length}; give a longer text "
            "(128 windows want about 65,000 tokens) or a smaller --sequence-length"
        )
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise CalibrationError(
            f"calibration text {text.name}: the tokenizer gave id {int(ids.max())}, the model knows {vocabulary}; "
            "tokenizer and model do not belong together"
        )
    generator = torch.Generator().manual_seed(calibration.seed)
    starts = torch.randint(0, len(ids) - length - 1, (calibration.samples,), generator=generator).tolist()
    windows = torch.stack([ids[start : start + length] for start in starts])
    windows = pad(windows, (1, 0), value=bos) if calibration.bos else windows
    batches = tuple({"input_ids": part} for part in windows.split(calibration.batch_size))
    return Samples(batches, text.name, text.sha256, windows.numel(), bos=bool(calibration.bos))


def noise(model: Any, length: int = 64) -> Samples:
    """Random token ids, for recipes that read no text: only the verification of the saved checkpoint runs on them."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, min(length, context_length(model))), generator=generator)
    return Samples(({"input_ids": ids},), "none (data-free)", "", ids.numel())


def context_length(model: Any) -> int:
    """The most tokens that the model's positions allow: all, or where their table has a row for padding (RoBERTa and
    its kin) those after that row."""
    text = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == value]
            padded = (m.padding_idx for m in tables if m is not model.get_input_embeddings())
            return value - max((row + 1 for row in padded if row is not None), default=0)
    return UNBOUNDED
