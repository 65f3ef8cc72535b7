"""What a checkpoint costs: bytes on disk, bits per weight, speed, memory.

Sizes are read from the headers of the safetensors files, not from what a configuration promises. A linear's bits count
every tensor stored for it (codes, scales, zeros and whatever a layout adds), not its bias. How its weights are counted:

    packed by bitwright       `quantization_config.sites` in config.json gives the float shape of each site
    packed by someone else    the same architecture built on torch's meta device gives the float shapes
    float                     the bits of the dtype in which the matrices are stored
"""

from __future__ import annotations

import json
import math
import statistics
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from quant.errors import CheckpointError, ModelError
from quant.eval.generate import greedy
from quant.eval.memory import watch
from quant.eval.subject import Subject, read_config

_PROMPT, _STEPS = 16, 32
_PATIENCE = 2.0  # seconds: a window slower than this is timed once


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file; `dtype` by the format's name (F32, BF16, U8, ...)."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def floating(self) -> bool:
        """Whether these are numbers of a network, not position ids or masks."""
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class Size:
    """`bytes`: the weight files. `linear_bits`: bits per weight of the quantized linears (float: of its matrices),
    `total_bits`: all tensors over all parameters. `measured` says where all this was read."""

    bytes: int
    parameters: int
    linear_bits: float | None
    total_bits: float
    measured: str


@dataclass(frozen=True)
class Speed:
    """Tokens per second: `prefill` of one full window (median of 3, without the first), `decode` greedily with a cache,
    batch 1; None for an encoder."""

    prefill: float
    decode: float | None
    window: int


@dataclass(frozen=True)
class Memory:
    """Bytes. `model`: parameters and buffers in memory. `running`: the rise of `meter` above them during prefill of one
    window and greedy decode. `peak`: its highest level then, with everything else in the process."""

    model: int
    running: int
    peak: int
    meter: str


def size_of(subject: Subject) -> Size:
    """Measures the files of a model, or its tensors when it was built in memory.

    Raises:
        CheckpointError: a safetensors header that cannot be read.
        ModelError: no weights in the folder.
    """
    if subject.folder is None:
        tensors = {id(p): p for p in subject.model.parameters()}.values()
        numel, nbytes = sum(p.numel() for p in tensors), sum(p.nbytes for p in tensors)
        return Size(nbytes, numel, 8 * nbytes / numel, 8 * nbytes / numel, "parameters in memory")
    files = weight_files(subject.folder)
    stored: dict[str, Stored] = {}
    for file in files:
        stored |= read_header(file)
    total = sum(file.stat().st_size for file in files)
    sites, ends = _sites(subject, stored)
    if sites is None:
        matrices = [t for t in stored.values() if t.floating and len(t.shape) > 1]
        parameters = sum(math.prod(t.shape) for t in stored.values() if t.floating)
        bits = 8 * sum(t.nbytes for t in matrices) / max(1, sum(math.prod(t.shape) for t in matrices))
    else:
        inside, packed = ({name for name in stored if _within(name, some)} for some in (sites, {**sites, **ends}))
        weights = sum(sites.values())
        plain = sum(math.prod(t.shape) for name, t in stored.items() if t.floating and name not in packed)
        parameters = weights + sum(ends.values()) + plain
        bits = 8 * sum(stored[name].nbytes for name in inside) / weights if weights else None
    total_bits = 8 * sum(t.nbytes for t in stored.values()) / max(1, parameters)
    return Size(total, parameters, bits, total_bits, "safetensors headers")


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads: model.safetensors, else those of the index, else every safetensors file."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: cannot be read ({error}); copy the checkpoint again.") from error
        files = [folder / name for name in sorted(names)]
    elif not files[0].is_file():
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is named in the index and not there; copy the checkpoint again.")
    if not files:
        raise ModelError(f"{folder}: no safetensors files; other formats are not read.")
    return files


def read_header(file: Path) -> dict[str, Stored]:
    """Names and sizes of the tensors in one safetensors file, without reading them.

    Raises:
        CheckpointError: the file is not a whole safetensors file.
    """
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > file.stat().st_size:
                raise ValueError("header longer than the file")
            header: dict[str, Any] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        return {
            name: Stored(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}); copy it again.") from error


def _sites(subject: Subject, stored: dict[str, Stored]) -> tuple[dict[str, int] | None, dict[str, int]]:
    """Prefix of a quantized site's tensors -> number of its weights, None for a float checkpoint; and those of a packed
    embedding and head, whose bits are no linear's.

    The prefix is `<linear>.`, or `<parameter>_` for an expert stack, whose codes carry the parameter's own name.
    """
    assert subject.folder is not None
    config = read_config(subject.folder).get("quantization_config")
    if not config:
        return None, {}
    if config.get("quant_method") == "bitwright":
        try:
            found = dict[str, int](), dict[str, int]()
            for name, site in config["sites"].items():
                found["end" in site][name + ("_" if "experts" in site else ".")] = math.prod(site["shape"])
            return found
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{subject.folder}/config.json: quantization_config has no sound list of sites."
            ) from error
    plain = AutoConfig.from_pretrained(subject.folder, trust_remote_code=False)
    auto = AutoModelForCausalLM if subject.kind == "causal-lm" else AutoModel
    with torch.device("meta"):
        model = auto.from_config(plain, trust_remote_code=False)
    linears = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    owners = {name.rpartition(".")[0] for name in stored}
    return {
        f"{name}.": math.prod(shape)
        for name, shape in linears.items()
        if name in owners and (f"{name}.weight" not in stored or stored[f"{name}.weight"].shape != tuple(shape))
    }, {}


def _within(tensor: str, sites: dict[str, int]) -> bool:
    """Whether a stored tensor belongs to a quantized site; a bias does not."""
    if f"{tensor}_" in sites:
        return True
    cuts = [index + 1 for index, letter in enumerate(tensor) if letter in "._"]
    return any(tensor[:cut] in sites and tensor[cut:] != "bias" for cut in cuts)


def cost_of(subject: Subject, ids_T: torch.Tensor) -> tuple[Speed, Memory]:
    """Times one window and a greedy decode, and watches memory meanwhile."""
    ids_BT = ids_T[None].to(subject.device)
    decode = None
    with watch(subject.device) as watched:
        seconds = _timed(subject, ids_BT)
        if seconds < _PATIENCE:
            seconds = statistics.median(_timed(subject, ids_BT) for _ in range(3))
        if subject.kind == "causal-lm":
            prompt = min(_PROMPT, max(1, ids_BT.shape[1] // 2))
            steps = min(_STEPS, ids_BT.shape[1] - prompt + 1)
            decode = _decode(subject, ids_BT[:, :prompt], steps) if steps > 1 else None
    held = {id(t): t.nbytes for t in (*subject.model.parameters(), *subject.model.buffers())}
    rise = watched.result
    speed = Speed(ids_BT.shape[1] / seconds, decode, ids_BT.shape[1])
    return speed, Memory(sum(held.values()), rise.rise, rise.peak, rise.meter)


@torch.no_grad()
def _timed(subject: Subject, ids_BT: torch.Tensor) -> float:
    start = time.perf_counter()
    subject.model(input_ids=ids_BT)
    _wait(subject)
    return time.perf_counter() - start


def _decode(subject: Subject, ids_BT: torch.Tensor, steps: int) -> float:
    tokens = greedy(subject, ids_BT, steps)
    next(tokens)
    _wait(subject)
    start = time.perf_counter()
    for _ in tokens:
        pass
    _wait(subject)
    return (steps - 1) / (time.perf_counter() - start)


def _wait(subject: Subject) -> None:
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)
