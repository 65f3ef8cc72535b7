"""The low-rank branches of a checkpoint as a LoRA adapter in PEFT's layout, and the model without them.

A branch `B A` is a LoRA adapter of scale 1 beside its base, so it can be trained on, replaced or shipped apart with the
tools made for adapters. PEFT need not be installed to write one:

    adapter_config.json          `lora_alpha` equals the rank (the scale is their quotient), ranks that differ by site
    adapter_model.safetensors    base_model.model.<site>.lora_A.weight [r, in], .lora_B.weight [out, r]

The checkpoint keeps its branches, so the adapter belongs on `detach(quant.load(folder))`, not on the model as loaded,
which would have every branch twice. So it names no base model: what opens one by an adapter would take the checkpoint.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quant.checkpoint.manifest import PackedSite, verify, weight_files
from quant.errors import CheckpointError, ResourceError, SettingsError
from quant.held import Holder
from quant.kernels.spec import LowRank, Smoothed, Spec
from quant.linear import stored_name
from quant.models.source import first_line

FACTORS = ("lora_a", "lora_b", "smooth")


def save_adapter(checkpoint: str | Path, out: str | Path) -> int:
    """Writes the branches of a packed checkpoint as the adapter folder `out`; returns how many there are.

    Raises:
        CheckpointError: the checkpoint is damaged or has no branch.
        ResourceError: the folder cannot be written.
        SettingsError: the folder holds something else.
    """
    folder, out = Path(checkpoint), Path(out)
    sites = {name: site for name, site in verify(folder).items() if _has_branch(site.spec)}
    if not sites:
        raise CheckpointError(f"{folder}: no site has a low-rank branch; quantize with a LowRank spec to have some")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out}: not an empty folder; choose another one for the adapter")
    stored, ranks = _branches(folder, sites.values()), dict[str, int]()
    tensors: dict[str, torch.Tensor] = {}
    for name, one in sites.items():
        lora_a, lora_b = (stored[stored_name(one.site, f"lora_{factor}")] for factor in "ab")
        if isinstance(one.spec, Smoothed):  # an adapter reads the inputs as they are
            lora_a = lora_a.float() * stored[stored_name(one.site, "smooth")].float()
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b
        ranks[name] = lora_a.shape[0]
    config = adapter_config(ranks, all(one.site.transposed for one in sites.values()))
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(dict(sorted(tensors.items())), out / "adapter_model.safetensors", {"format": "pt"})
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{out}: the adapter cannot be written ({first_line(error)})") from None
    return len(sites)


def _branches(folder: Path, sites: Iterable[PackedSite]) -> dict[str, torch.Tensor]:
    """The stored factors of the branches, and of the inputs."""
    wanted, found = {stored_name(one.site, key) for one in sites for key in FACTORS}, dict[str, torch.Tensor]()
    for file in weight_files(folder):
        with safe_open(folder / file, "pt") as stored:
            found |= {key: stored.get_tensor(key) for key in wanted.intersection(stored.keys())}
    return found


def _has_branch(spec: Spec) -> bool:
    return isinstance(spec.base if isinstance(spec, Smoothed) else spec, LowRank)


def adapter_config(ranks: dict[str, int], transposed: bool) -> dict[str, Any]:
    """PEFT's `LoraConfig` for branches of these ranks by site name, as it lies in adapter_config.json."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in sorted(ranks.items()) if rank != usual}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(ranks),
    }


def detach(model: Any) -> Any:
    """Takes the branches out of a loaded packed model: the second factor of each becomes zero. Returns the model."""
    for module in model.modules():
        if isinstance(module, Holder):
            for slot in module.slots():
                if _has_branch(slot.spec):
                    slot.tensors["lora_b"].zero_()
    return model
