"""ImageReward: the published names of its weights in transformers' BLIP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import ModelError
from quant.eval.reward import open_reward

WIDTH, INNER, WORDS, PATCH, SIDE = 64, 96, 40, 8, 3
HEAD = (WIDTH, 32, 16, 16, 8, 1)


def made_up() -> dict[str, Tensor]:
    """Weights of a small ImageReward, in the order in which they are drawn."""
    source, made = torch.Generator().manual_seed(0), dict[str, Tensor]()

    def put(name: str, *shape: int, scale: float = 0.1, base: float = 0.0) -> None:
        made[name] = base + scale * torch.randn(shape, generator=source)

    def linear(name: str, outputs: int, inputs: int) -> None:
        put(f"{name}.weight", outputs, inputs, scale=0.2)
        put(f"{name}.bias", outputs)

    def norm(name: str) -> None:
        put(f"{name}.weight", WIDTH, base=1.0)
        put(f"{name}.bias", WIDTH)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    put(f"{see}.cls_token", 1, 1, WIDTH)
    put(f"{see}.pos_embed", 1, SIDE * SIDE + 1, WIDTH)
    put(f"{see}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    put(f"{see}.patch_embed.proj.bias", WIDTH)
    for block in (f"{see}.blocks.{n}" for n in range(2)):
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", INNER, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, INNER)
    norm(f"{see}.norm")
    put(f"{read}.embeddings.word_embeddings.weight", WORDS, WIDTH)
    put(f"{read}.embeddings.position_embeddings.weight", 48, WIDTH)
    norm(f"{read}.embeddings.LayerNorm")
    for block in (f"{read}.encoder.layer.{n}" for n in range(2)):
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{block}.{attention}.self.{part}", WIDTH, WIDTH)
            linear(f"{block}.{attention}.output.dense", WIDTH, WIDTH)
            norm(f"{block}.{attention}.output.LayerNorm")
        linear(f"{block}.intermediate.dense", INNER, WIDTH)
        linear(f"{block}.output.dense", WIDTH, INNER)
        norm(f"{block}.output.LayerNorm")
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), HEAD, HEAD[1:], strict=False):
        linear(f"mlp.layers.{number}", outputs, inputs)
    return made


def folder(home: Path) -> Path:
    home.mkdir()
    save_file(made_up(), home / "reward.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(5, WORDS))]
    (home / "vocab.txt").write_text("\n".join(words))
    return home


def test_scores_are_those_of_the_authors_code(tmp_path: Path) -> None:
    """image-reward 1.5 under transformers 4.35 gives 0.534026 and -0.142970 for these weights, images and tokens."""
    score = open_reward(folder(tmp_path / "reward"), batch=2)
    images = torch.rand((2, 3, 24, 24), generator=torch.Generator().manual_seed(1))
    prompts = ["w5 w6 w7", "w8 w9 w10 w11 w12"]
    alone = [score(images[n : n + 1], prompts[n : n + 1]) for n in range(2)]
    assert alone == pytest.approx([0.534026, -0.142970], abs=2e-6)
    assert score(images, prompts) == pytest.approx(sum(alone) / 2, abs=1e-6)
    assert score(images, prompts[::-1]) != pytest.approx(sum(alone) / 2, abs=1e-3)


def test_images_of_any_size_are_cut_to_their_middle(tmp_path: Path) -> None:
    score = open_reward(folder(tmp_path / "reward"))
    image = torch.rand((1, 1, 24, 24), generator=torch.Generator().manual_seed(2))
    wide = torch.cat([torch.zeros(1, 1, 24, 6), image, torch.ones(1, 1, 24, 6)], -1)
    assert score(wide, ["w5"]) == pytest.approx(score(image, ["w5"]), abs=1e-6)
    large = torch.nn.functional.interpolate(image, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert score(large, ["w5"]) == pytest.approx(score(image, ["w5"]), abs=0.1)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="one safetensors file"):
        open_reward(tmp_path)
    home = folder(tmp_path / "reward")
    save_file({"mlp.layers.0.weight": torch.zeros(2, 2)}, home / "reward.safetensors")
    with pytest.raises(ModelError, match="BERT's tokenizer"):
        open_reward(home)
