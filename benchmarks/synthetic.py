"""Llama models of any depth with random weights, written one block at a time: the maker needs the memory of one block.

    python benchmarks/synthetic.py OUT --blocks 16 --hidden 1024 --intermediate 2816

All blocks have the same size and a file of their own. Embedding and head are small (the demo model's vocabulary of
1,024) and its tokenizer is used, so that calibration runs on real text.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 1024


def config(blocks: int, hidden: int, intermediate: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "dtype": "bfloat16",
    }


def shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one block."""
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden // 2, hidden),
        "self_attn.v_proj.weight": (hidden // 2, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
    }


def write(out: Path, tokenizer: Path, blocks: int, hidden: int, intermediate: int, seed: int = 0) -> Path:
    """Writes the model into `out`; `tokenizer` is a folder that holds one of at most 1,024 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator).mul_(0.7 * shape[1] ** -0.5).to(torch.bfloat16)

    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config(blocks, hidden, intermediate), indent=2) + "\n")
    for name in TOKENIZER:
        shutil.copyfile(tokenizer / name, out / name)
    files = [f"model-{number:05d}-of-{blocks + 1:05d}.safetensors" for number in range(1, blocks + 2)]
    outside = {"model.embed_tokens.weight": tensor((VOCABULARY, hidden)), "model.norm.weight": tensor((hidden,))}
    places, total = dict.fromkeys(outside, files[0]), sum(t.nbytes for t in outside.values())
    save_file(outside, out / files[0], metadata={"format": "pt"})
    for block, file in enumerate(files[1:]):
        made = {f"model.layers.{block}.{name}": tensor(s) for name, s in shapes(hidden, intermediate).items()}
        save_file(made, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(made, file)
        total += sum(t.nbytes for t in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return out


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path)
    options.add_argument("--tokenizer", type=Path, default=Path(__file__).parent.parent / "demo" / "model")
    options.add_argument("--blocks", type=int, default=4)
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--intermediate", type=int, default=2816)
    given = options.parse_args()
    write(given.out, given.tokenizer, given.blocks, given.hidden, given.intermediate)
