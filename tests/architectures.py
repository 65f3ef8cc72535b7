"""Tiny random models of the architectures that the toolkit must handle, for any test that wants one.

`make(name)` builds a seeded model, `save(name, folder)` writes it as save_pretrained does (the MoE ones with one matrix
per expert, which loading merges again). Every parameter is shaken, so that a forgotten bias or a norm left at one
shows. Sizes are small, and unequal where the architecture allows it.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 128

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}

# class, then what its config takes
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "llama-tied": ("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 24, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {**_LLAMA, "head_dim": 16, "sliding_window": 5}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **_LLAMA,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "gemma4": (  # the last two layers read the keys and values of the first two
        "Gemma4ForCausalLM",
        {
            **_LLAMA,
            "head_dim": 16,
            "global_head_dim": 24,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
        },
    ),
    "phi3": ("Phi3ForCausalLM", _LLAMA),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 64,
        },
    ),
    "opt-projected": (
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 40,
            "do_layer_norm_before": False,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_inner": 96,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    ),
    "falcon": (
        "FalconForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "parallel_attn": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bert": (
        "BertModel",
        {key: value for key, value in _LLAMA.items() if key not in ("num_key_value_heads", "bos_token_id")},
    ),
    "mixtral": ("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**_LLAMA, **_EXPERTS, "num_experts": 9}),
}
ARCHITECTURES = tuple(_MODELS)


def make(name: str) -> Any:
    """The model, float32, in eval mode. Experts run one by one, as they do when bitwright builds a model."""
    kind, settings = _MODELS[name]
    return make_from(kind, **settings)


def make_from(kind: str, **settings: Any) -> Any:
    """A seeded, shaken model of a transformers class."""
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls._from_config(cls.config_class(**settings), dtype=torch.float32, experts_implementation="eager")
    return shake(model)


def save(name: str, folder: Path) -> Path:
    """Writes the model of that name into `folder`."""
    make(name).save_pretrained(folder)
    return folder


@cache
def checkpoint(name: str) -> Path:
    """The folder of that model, written once per process. Read it, never write into it."""
    folder = Path(tempfile.mkdtemp(prefix=f"bitwright-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save(name, folder)


def batch(rows: int = 1, length: int = 12, *, padded: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens; `padded`: the last row is padded on the right, with a mask that says so."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def shake(model: Any, scale: float = 0.05) -> Any:
    """Adds seeded noise to every parameter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model.eval().requires_grad_(False)


class Mlp(nn.Module):
    """A residual block of two linears."""

    def __init__(self, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks in an nn.ModuleList between an embedding and a head."""

    def __init__(self, depth: int = 3, block: Callable[[], nn.Module] = Mlp) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def module_list() -> nn.Module:
    """Blocks in a list, called by a forward of one's own."""
    return _seeded(Stack)


def sequential() -> nn.Module:
    """A whole model as one nn.Sequential of blocks. Its forward takes `input`."""
    return _seeded(lambda: nn.Sequential(nn.Embedding(VOCABULARY, 32), Mlp(), Mlp(), nn.Linear(32, 16)))


def bare_linears() -> nn.Module:
    """Linears, norms of different widths and activations, no block to be seen. Its forward takes `input`."""
    return _seeded(
        lambda: nn.Sequential(
            nn.Embedding(VOCABULARY, 32),
            nn.Linear(32, 48),
            nn.LayerNorm(48),
            nn.ReLU(),
            nn.Linear(48, 40),
            nn.LayerNorm(40),
            nn.Linear(40, 16),
        )
    )


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return shake(build())
