"""CLIP score: how well images fit the prompts they were drawn for (Hessel et al., arXiv:2104.08718).

`100 max(cos(image, text), 0)`, mean over the images, with whatever CLIP model lies in a local folder: the figure says
nothing without that folder's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, interpolate
from transformers import AutoTokenizer, CLIPModel

from quant.errors import ModelError
from quant.models.source import first_line

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def open_clip(folder: Path, batch: int = 32) -> Callable[[torch.Tensor, Sequence[str]], float]:
    """Returns the score of images `[N, C, H, W]` in [0, 1] for their `N` prompts.

    Raises:
        ModelError: no CLIP model there.
    """
    try:
        model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval().float()
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        said = folder / "preprocessor_config.json"
        kept = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
    except Exception as error:  # the file decides what goes wrong in transformers
        raise ModelError(f"CLIP {folder}: transformers could not load it ({first_line(error)}).") from error
    side = model.config.vision_config.image_size
    mean = torch.tensor(kept.get("image_mean", _MEAN)).view(-1, 1, 1)
    deviation = torch.tensor(kept.get("image_std", _DEVIATION)).view(-1, 1, 1)

    @torch.no_grad()
    def score(images: torch.Tensor, prompts: Sequence[str]) -> float:
        total = 0.0
        for start in range(0, len(images), batch):
            x = interpolate(images[start : start + batch].expand(-1, 3, -1, -1), (side, side), mode="bicubic")
            words = tokenizer(list(prompts[start : start + batch]), padding=True, truncation=True, return_tensors="pt")
            out = model(pixel_values=(x.clamp(0, 1) - mean) / deviation, **words)
            total += float(cosine_similarity(out.image_embeds, out.text_embeds).clamp_min(0).sum())
        return 100 * total / len(images)

    return score
