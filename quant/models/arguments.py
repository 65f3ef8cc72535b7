"""What a diffusion transformer's forward wants, from its signature and its config: no list of models.

diffusers' transformers share a vocabulary of arguments (`hidden_states`, `timestep`, `encoder_hidden_states`, ...) and
of config entries that say how large each is (`in_channels`, `sample_size`, `joint_attention_dim`, ...). Only how the
latents lie differs and is written nowhere: `[B, C, H, W]`, with frames after or before the channels, or packed
`[B, tokens, C]`. So each is tried on weights of no size until the first block is reached. A pipeline's own calls need
none of this; it serves the tracing pass, and calibration where there is a transformer and no pipeline around it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quant.calibration.replay import Stop
from quant.errors import ModelError
from quant.models.source import first_line
from quant.models.structure import candidates
from quant.models.weightless import weightless

SPOKEN = {"x": "hidden_states", "t": "timestep", "cap_feats": "encoder_hidden_states"}  # by some, with lists of rows
TEXT_WIDTH = (
    "caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cross_attention_dim", "cap_feat_dim",
)  # fmt: skip
TEXT_TOKENS = 5  # in the tracing pass: unlike any other size there
GUIDANCE = 3.5  # what distilled models are told when nobody says otherwise
CAST = ("hidden_states", "encoder_hidden_states", "pooled_projections", "encoder_hidden_states_image", "padding_mask")

# name -> shape of one sample of C channels, F frames, H x W places
LAYOUTS: dict[str, Callable[[int, int, int, int], tuple[int, ...]]] = {
    "image": lambda c, f, h, w: (c, h, w),
    "video": lambda c, f, h, w: (c, f, h, w),
    "frames": lambda c, f, h, w: (f, c, h, w),
    "packed": lambda c, f, h, w: (f * h * w, c),
}


@dataclass(frozen=True)
class Size:
    """Latents of `frames` x `height` x `width` places; `text`: tokens of the text that goes with them."""

    frames: int
    height: int
    width: int
    text: int


@dataclass(frozen=True)
class Form:
    """How a model takes its latents: `layout` (see `LAYOUTS`), and `traced`, a small size that it accepts."""

    layout: str
    traced: Size


def find_form(model: Any, dtype: torch.dtype = torch.float32) -> Form:
    """Tries the layouts, small first, then at the config's own size. `dtype`: the model's.

    Raises:
        ModelError: the model takes none of them.
    """
    config = model.config
    channels, patch, steps = config.get("in_channels"), _patch(config, "patch_size"), _patch(config, "patch_size_t")
    side = 4 * patch if 4 * patch != channels else 6 * patch
    frames = 2 * steps + (steps == 1)
    small = Size(frames if frames != channels else frames + 2 * steps, side, side, TEXT_TOKENS)
    said = dict[str, str]()
    for size in (small, own_size(config)):
        for layout in LAYOUTS:
            why = _refusal(model, lambda layout=layout, size=size: cast(build(model, layout, size, 2), dtype))
            if why is None:
                return Form(layout, size)
            said[layout] = why
    raise ModelError(
        f"{type(model).__name__}: takes latents in none of the layouts known here: "
        + "; ".join(f"{layout}: {why}" for layout, why in said.items())
    )


def own_size(config: Mapping[str, Any]) -> Size:
    """The size that the config speaks of, with modest ones in place of what it leaves open."""
    sample = config.get("sample_size") or 32
    height, width = sample if isinstance(sample, list | tuple) else (sample, sample)
    height, width = config.get("sample_height") or height, config.get("sample_width") or width
    frames = ((config.get("sample_frames") or 9) - 1) // (config.get("temporal_compression_ratio") or 4) + 1
    steps = _patch(config, "patch_size_t")
    return Size(-(-frames // steps) * steps, int(height), int(width), config.get("max_text_seq_length") or 77)


def build(model: Any, layout: str, size: Size, rows: int, generator: torch.Generator | None = None) -> dict[str, Any]:
    """Keyword arguments of the forward for `rows` samples of seeded noise at the middle of their way."""
    generator = generator or torch.Generator().manual_seed(0)
    config = model.config
    usual = spoken(model)
    names = {usual.get(name, name): one for name, one in inspect.signature(type(model).forward).parameters.items()}
    frames = size.frames if layout != "packed" or "num_frames" in names else 1
    shape = LAYOUTS[layout](config["in_channels"], frames, size.height, size.width)
    given: dict[str, Any] = {"hidden_states": torch.randn((rows, *shape), generator=generator)}
    share = _share_of_one(model, names)
    given["timestep"] = torch.full((rows,), 0.5 if share else 500)
    if "class_labels" in names:
        given["class_labels"] = torch.randint(0, config["num_embeds_ada_norm"] or 1, (rows,), generator=generator)
    if "encoder_hidden_states" in names:
        width = next((config[key] for key in TEXT_WIDTH if config.get(key)), None)
        given["encoder_hidden_states"] = torch.randn((rows, size.text, width or 1), generator=generator)
    if names.get("encoder_attention_mask", names["self"]).default is inspect.Parameter.empty and (
        "encoder_attention_mask" in names
    ):
        given["encoder_attention_mask"] = torch.ones((rows, size.text), dtype=torch.int64)
    if "pooled_projections" in names and config.get("pooled_projection_dim"):
        given["pooled_projections"] = torch.randn((rows, config["pooled_projection_dim"]), generator=generator)
    if "guidance" in names and config.get("guidance_embeds"):
        given["guidance"] = torch.full((rows,), GUIDANCE if share else 1000 * GUIDANCE)
    if "encoder_hidden_states_image" in names and config.get("image_dim"):
        given["encoder_hidden_states_image"] = torch.randn((rows, size.text, config["image_dim"]), generator=generator)
    return given | _places(names, config, frames, size, rows)


def spoken(model: nn.Module) -> dict[str, str]:
    """The usual names of the arguments that a model calls otherwise, by its own."""
    names = inspect.signature(type(model).forward).parameters
    return {own: usual for own, usual in SPOKEN.items() if own in names and "hidden_states" not in names}


def translate(model: nn.Module) -> None:
    """Has such a model take the usual names too, of its rows together, and answer with its rows together."""
    own = {usual: name for name, usual in spoken(model).items()}

    def ask(_: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        listed = {key: [*x] for key, x in given.items() if key in own and key != "timestep"}
        return args, {own.get(key, key): x for key, x in (given | listed).items()}

    if own:
        model.register_forward_pre_hook(ask, with_kwargs=True)
        model.register_forward_hook(lambda _, args, said: (torch.stack([*said[0]]),))


def cast(given: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments, those in it that have the model's dtype."""
    return {key: value.to(dtype) if key in CAST else value for key, value in given.items()}


def _share_of_one(model: Any, names: Container[str]) -> bool:
    """Whether the timestep is a share of 1, which the model multiplies by 1000 itself, as it does its guidance; all
    others take both that large, the timestep as the scheduler numbers it."""
    scales = (getattr(part, "scale", 1) for part in model.modules() if type(part).__name__ == "Timesteps")
    return "img_ids" in names or "img_shapes" in names or 1000 in (model.config.get("t_scale"), *scales)


def _places(names: Mapping[str, Any], config: Any, frames: int, size: Size, rows: int) -> dict[str, Any]:
    """The arguments that say where each token lies, and at which resolution."""
    given: dict[str, Any] = {}
    if "img_ids" in names:
        axes = len(config["axes_dims_rope"])
        given["txt_ids"] = torch.zeros((size.text, axes))
        given["img_ids"] = torch.zeros((size.height * size.width, axes))
        grid = torch.cartesian_prod(torch.arange(size.height), torch.arange(size.width))
        given["img_ids"][:, -2:] = grid.float()
    if "img_shapes" in names:
        given["img_shapes"] = [[(frames, size.height, size.width)]] * rows
    if "num_frames" in names:
        given |= {"num_frames": frames, "height": size.height, "width": size.width}
    if "padding_mask" in names and config.get("concat_padding_mask"):
        given["padding_mask"] = torch.zeros((1, 1, size.height, size.width))
    pixels = torch.tensor([[8.0 * size.height, 8.0 * size.width]]).expand(rows, 2).clone()
    if {"original_size", "target_size", "crop_coords"} <= names.keys():
        given |= {"original_size": pixels, "target_size": pixels.clone(), "crop_coords": torch.zeros_like(pixels)}
    if "added_cond_kwargs" in names and config.get("use_additional_conditions"):
        ratio = torch.full((rows, 1), size.height / size.width)
        given["added_cond_kwargs"] = {"resolution": pixels, "aspect_ratio": ratio}
    return given


def _patch(config: Any, name: str) -> int:
    """A patch's side; of `(1, 2, 2)` the last, which is the largest."""
    value = config.get(name) or 1
    return int(value[-1] if isinstance(value, list | tuple) else value)


def _refusal(model: nn.Module, given: Callable[[], Mapping[str, Any]]) -> str | None:
    """What the model, or making them from its config, says to these arguments before its first block; None if it gets
    there."""

    def stop(*_: object) -> None:
        raise Stop

    try:
        with torch.no_grad(), weightless(model), ExitStack() as hooks:
            for name in candidates(model):
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(stop))
            model(**given())
    except Stop:
        return None
    except Exception as error:  # a model's own code may raise anything
        return f"{type(error).__name__}: {first_line(error)}"
    return "it ran no block"
