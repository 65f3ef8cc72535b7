"""What is judged: a model with its tokenizer, opened the same way whether bitwright packed it or not.

A folder whose `config.json` says `quant_method: bitwright` goes through `quant.load`; everything else through the class
of transformers that it names, from safetensors only and without remote code. Transformers fills weights that a
checkpoint lacks with random numbers and merely logs it; a judge must not, so a missing weight is an error here.

A model is judged as a causal language model if its configuration names an architecture with such a head, otherwise as
an encoder: its hidden states are compared with the original's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import quant
from quant.calibration.samples import UNBOUNDED, context_length
from quant.checkpoint.manifest import JOURNAL
from quant.errors import BitwrightError, CheckpointError, ModelError, SettingsError
from quant.machine import check_device
from quant.models.building import named_class
from quant.models.source import first_line, local

Kind = Literal["causal-lm", "encoder"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """An opened model. `folder` holds exactly these weights, None for a float model handed over in memory."""

    name: str
    model: PreTrainedModel = field(repr=False)
    kind: Kind
    folder: Path | None

    @property
    def source(self) -> Path | str:
        """Where the tokenizer is read from; empty for a model that came from nowhere."""
        return self.folder or self.model.name_or_path or ""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int | None:
        """Longest sequence the configuration promises, None if it promises none."""
        most = context_length(self.model)
        return most if most < UNBOUNDED else None

    def tokenizer(self) -> Any:
        """The tokenizer stored with the model.

        Raises:
            ModelError: there is none.
        """
        if not self.source:
            raise ModelError(
                f"{self.name}: built in memory, it has no tokenizer; set name_or_path to a folder with one."
            )
        try:
            return AutoTokenizer.from_pretrained(self.source, trust_remote_code=False)
        except Exception as error:  # tokenizers fail with whatever their files provoke
            raise ModelError(
                f"{self.name}: no tokenizer could be loaded from {self.source} "
                f"({first_line(error)}). Copy the tokenizer files of the original model into that folder."
            ) from error


def open_subject(
    source: str | Path | PreTrainedModel | Subject, device: str = "cpu", dtype: str = "float32"
) -> Subject:
    """Opens a folder, a hub name or a model already in memory (left on its device and in its dtype).

    `dtype` is float32, bfloat16, float16, or auto for the checkpoint's own.

    Raises:
        SettingsError: unknown dtype or device.
        ModelError: not a model, not reachable, or weights missing.
        CheckpointError: a packed checkpoint is damaged.
    """
    if isinstance(source, Subject):
        return source
    if isinstance(source, PreTrainedModel):
        # packed weights are those of the files; a float model may have been changed since it was read
        name = source.name_or_path or type(source).__name__
        packed = getattr(source.config, "quantization_config", None) is not None and Path(name).is_dir()
        folder = Path(name) if packed else None
        return Subject(short(name), source.eval(), _kind([type(source).__name__]), folder)
    if dtype not in (*DTYPES, "auto"):
        raise SettingsError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}, auto.")
    check_device(device)
    folder = local(str(source))
    model, kind = _load(str(source), folder, device, dtype)
    return Subject(short(str(source)), model.eval(), kind, folder)


def check_ids(ids_T: torch.Tensor, *subjects: Subject | None) -> None:
    """Raises `ModelError` for a token id that a model does not know."""
    for subject in filter(None, subjects):
        size = getattr(subject.model.config.get_text_config(), "vocab_size", UNBOUNDED)
        if bool((ids_T >= size).any()):
            raise ModelError(
                f"{subject.name}: the tokenizer gave id {int(ids_T.max())}, the model knows {size}; they do not belong "
                "together: copy the tokenizer files of this model again."
            )


def packed_by_us(folder: Path) -> bool:
    """Whether `config.json` names our quantization method."""
    return (read_config(folder).get("quantization_config") or {}).get("quant_method") == "bitwright"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dictionary.

    Raises:
        ModelError: missing or not JSON.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (folder / JOURNAL).is_dir():
            raise CheckpointError(f"{folder}: an unfinished run; continue it with quantize --resume.") from error
        raise ModelError(f"{folder}: no config.json, so this is not a Hugging Face model folder.") from error
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({first_line(error)}).") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds a {type(config).__name__}, expected an object.")
    return config


def _load(source: str, folder: Path, device: str, dtype: str) -> tuple[PreTrainedModel, Kind]:
    try:
        if packed_by_us(folder):
            model = quant.load(folder, device=device, dtype=dtype)
            return model, _kind([type(model).__name__])
        return _load_plain(source, folder, device, dtype)
    except (BitwrightError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # the file decides what goes wrong in transformers
        raise ModelError(
            f"{source}: transformers could not load it ({first_line(error)}). It must be a safetensors checkpoint of "
            "an architecture that transformers knows without remote code."
        ) from error


def _load_plain(source: str, folder: Path, device: str, dtype: str) -> tuple[PreTrainedModel, Kind]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind, named = _kind(getattr(config, "architectures", None) or []), named_class(config)
    decodes = named is None or "decoder_input_ids" in signature(named.forward).parameters
    if getattr(config, "is_encoder_decoder", False) and decodes:
        raise ModelError(
            f"{source}: an encoder-decoder ({config.model_type}); only causal models and encoders are judged."
        )
    opened: Any = named or (AutoModelForCausalLM if kind == "causal-lm" else AutoModel)
    loaded: Any = opened.from_pretrained(
        folder,
        dtype=DTYPES.get(dtype, "auto"),
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, info = loaded
    # an encoder saved from a masked-LM class has no pooler, and the hidden states do not need it
    missing = sorted(key for key in info["missing_keys"] if kind == "causal-lm" or "pooler" not in key)
    if missing:
        raise ModelError(
            f"{source}: {len(missing)} weights are missing from its files (first: {missing[0]}), and transformers "
            "would run on random ones. Copy the checkpoint again."
        )
    return model.to(device), kind


def _kind(architectures: list[str]) -> Kind:
    heads: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        heads.update((value,) if isinstance(value, str) else value)
    return "causal-lm" if any(name in heads for name in architectures) else "encoder"


def short(name: str) -> str:
    """A folder's last part; a hub name as it is."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().exists() else name
