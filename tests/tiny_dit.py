"""Small random diffusion transformers of every architecture that is tested, as folders of diffusers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
TEXT: dict[str, Any] = {"caption_channels": 24, "cross_attention_dim": 32}
JOINT: dict[str, Any] = {"joint_attention_dim": 24}
ROPE = (4, 6, 6)
CONFIGS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": SIZES
    | {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10},
    "PixArtTransformer2DModel": SIZES
    | TEXT
    | {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "use_additional_conditions": False},
    "SD3Transformer2DModel": SIZES
    | JOINT
    | {"in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2, "caption_projection_dim": 32}
    | {"pooled_projection_dim": 40, "pos_embed_max_size": 16},
    "FluxTransformer2DModel": SIZES
    | JOINT
    | {"in_channels": 16, "patch_size": 1, "num_layers": 1, "num_single_layers": 2, "pooled_projection_dim": 40}
    | {"guidance_embeds": True, "axes_dims_rope": ROPE},
    "SanaTransformer2DModel": SIZES
    | TEXT
    | {"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
    | {"mlp_ratio": 2.0, "sample_size": 8, "patch_size": 1},
    "WanTransformer3DModel": SIZES
    | {"in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 32, "ffn_dim": 64, "rope_max_seq_len": 32},
    "HunyuanVideoTransformer3DModel": SIZES
    | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    | {"patch_size": 2, "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 24, "pooled_projection_dim": 40}
    | {"rope_axes_dim": ROPE},
    "CogVideoXTransformer3DModel": SIZES
    | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 24, "sample_width": 8}
    | {"sample_height": 8, "sample_frames": 9, "patch_size": 2, "max_text_seq_length": 8},
    "LTXVideoTransformer3DModel": SIZES
    | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24},
    "QwenImageTransformer2DModel": SIZES
    | JOINT
    | {"in_channels": 16, "out_channels": 4, "patch_size": 2, "axes_dims_rope": ROPE},
    "ChromaTransformer2DModel": SIZES
    | JOINT
    | {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "axes_dims_rope": ROPE}
    | {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2},
    "Lumina2Transformer2DModel": {"in_channels": 4, "hidden_size": 32, "num_layers": 3, "num_refiner_layers": 1}
    | {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": ROPE, "cap_feat_dim": 24}
    | {"axes_lens": (96, 32, 32), "sample_size": 8, "patch_size": 2},
    "ZImageTransformer2DModel": {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2}
    | {"n_kv_heads": 2, "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]},
    "CogView4Transformer2DModel": SIZES
    | {"in_channels": 4, "out_channels": 4, "text_embed_dim": 24, "time_embed_dim": 8, "condition_dim": 4}
    | {"pos_embed_max_size": 16, "sample_size": 8, "rope_axes_dim": (8, 8)},
    "CosmosTransformer3DModel": SIZES
    | {"in_channels": 4, "out_channels": 4, "text_embed_dim": 24, "adaln_lora_dim": 8, "max_size": (4, 32, 32)}
    | {"concat_padding_mask": False},
}


def library() -> Any:
    """diffusers, or the test is skipped."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'bitwright[diffusers]'")
    from quant.models.diffusion import library as real

    return real()


def transformer(name: str, **changes: Any) -> Any:
    """A model of seeded weights; what starts at zero (gates of adaLN-zero) does not stay there."""
    diffusers = library()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(diffusers, name).from_config({**CONFIGS[name], **changes}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def folder(name: str, path: Path, scheduler: str = "", **changes: Any) -> Path:
    """Such a model on disk, with a scheduler below it if one is named."""
    transformer(name, **changes).save_pretrained(path)
    if scheduler:
        getattr(library(), scheduler)().save_pretrained(path / "scheduler")
    return path
