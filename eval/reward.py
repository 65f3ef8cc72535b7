"""ImageReward: how people would rate images for their prompts (Xu et al., NeurIPS 2023, arXiv:2304.05977).

BLIP reads the prompt with cross-attention to the image, and five linear layers without a nonlinearity make a number of
its first token. The published scores have the mean and deviation of the training set taken off. The model itself is
transformers' BLIP; here are the published names of its weights, which also say how large it is. The folder to give is
made once from the published file, and gets the tokenizer's files of bert-base-uncased (`vocab.txt` is enough):

    weights = torch.load("ImageReward.pt", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, "reward/model.safetensors")

With small made-up weights the scores are those of the authors' code; the published ones have not been tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from quant.errors import ModelError
from quant.models.source import first_line

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the scores on the training set
WORDS = 35
HEAD = 64  # width of an attention head, in ViT-L and in BERT
COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION = {
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers", "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection", "norm1": "layer_norm1", "norm2": "layer_norm2",
}  # fmt: skip
LAYERS = (0, 2, 4, 6, 7)  # between them lies dropout


def open_reward(folder: Path, batch: int = 16) -> Callable[[Tensor, Sequence[str]], float]:
    """Returns the mean score of images `[N, C, H, W]` in [0, 1] for their `N` prompts.

    Args:
        folder: the weights of ImageReward as one safetensors file, and the files of BERT's tokenizer.

    Raises:
        ModelError: they are not there, or are of another model.
    """
    try:
        (file,) = folder.glob("*.safetensors")
        see, read, rate = _built(load_file(file))
        tokenizer: Any = BertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # files decide what goes wrong
        raise ModelError(
            f"ImageReward {folder}: its weights in one safetensors file and BERT's tokenizer are expected "
            f"({first_line(error)})"
        ) from error
    mean, deviation = (torch.tensor(colour).view(-1, 1, 1) for colour in COLOURS)

    @torch.no_grad()
    def score(images: Tensor, prompts: Sequence[str]) -> float:
        total = 0.0
        for start in range(0, len(images), batch):
            x = (_square(images[start : start + batch], see.config.image_size) - mean) / deviation
            some = list(prompts[start : start + batch])
            words = tokenizer(some, padding=True, truncation=True, max_length=WORDS, return_tensors="pt")
            seen = see(pixel_values=x).last_hidden_state
            out = read(words.input_ids, words.attention_mask, encoder_hidden_states=seen, is_decoder=False)
            total += float(((rate(out.last_hidden_state[:, 0]) - MEAN) / DEVIATION).sum())
        return total / len(images)

    return score


def _built(weights: Mapping[str, Tensor]) -> tuple[Any, Any, nn.Module]:
    """The image's network, the text's and the head, of the sizes that the weights have."""
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.layers.": {}}
    for name, tensor in weights.items():
        for prefix, part in parts.items():
            if name.startswith(prefix) and not name.endswith("position_ids"):
                part[name.removeprefix(prefix)] = tensor.float()
    image, text, head = parts.values()
    image = {_renamed(name): tensor for name, tensor in image.items()}
    patch, places = image["embeddings.patch_embedding.weight"], image["embeddings.position_embedding"].shape[1]
    width, words = len(patch), text["embeddings.word_embeddings.weight"]
    see = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width, num_attention_heads=width // HEAD, num_hidden_layers=_depth(image),
            intermediate_size=len(image["encoder.layers.0.mlp.fc1.weight"]), patch_size=patch.shape[-1],
            image_size=patch.shape[-1] * round((places - 1) ** 0.5), layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    read = BlipTextModel(
        BlipTextConfig(
            vocab_size=len(words), hidden_size=words.shape[1], num_attention_heads=words.shape[1] // HEAD,
            bos_token_id=None, sep_token_id=None,
            num_hidden_layers=_depth(text), intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]), encoder_hidden_size=width,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    shapes = [head[f"{n}.weight"].shape for n in LAYERS]
    rate = nn.Sequential(*(nn.Linear(inputs, outputs) for outputs, inputs in shapes))
    see.load_state_dict(image)
    read.load_state_dict(text)
    rate.load_state_dict({f"{n}.{end}": head[f"{m}.{end}"] for n, m in enumerate(LAYERS) for end in ("weight", "bias")})
    return see.eval(), read.eval(), rate.eval()


def _renamed(name: str) -> str:
    for theirs, ours in VISION.items():
        name = name.replace(theirs, ours)
    return re.sub(r"^norm\.", "post_layernorm.", name)


def _depth(part: Mapping[str, Tensor]) -> int:
    return 1 + max(int(found[1]) for name in part if (found := re.match(r"encoder\.layers?\.(\d+)\.", name)))


def _square(images: Tensor, side: int) -> Tensor:
    """The middle of images whose shorter side has become `side`."""
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    sizes = max(side, int(height * scale)), max(side, int(width * scale))
    x = interpolate(images.float().expand(-1, 3, -1, -1), sizes, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = round((sizes[0] - side) / 2), round((sizes[1] - side) / 2)
    return x[..., top : top + side, left : left + side]
