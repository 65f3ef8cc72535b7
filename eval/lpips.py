"""LPIPS, the perceptual distance of Zhang et al. (arXiv:1801.03924), for those who have its weights.

Version 0.1 with AlexNet: five feature maps, each pixel's channels scaled to length 1, squared difference, weighted by
learned non-negative weights, mean over pixels, sum over the maps. Nothing is downloaded: the file is the state dict of
`lpips.LPIPS(net="alex")`, saved as safetensors once by whoever has it:

    import lpips, safetensors.torch
    state = lpips.LPIPS(net="alex").state_dict()
    safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, "lpips-alex.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import conv2d, max_pool2d, normalize

from quant.errors import ModelError
from quant.models.source import first_line

# the convolutions by their names there; stride, padding, and whether a pooling of 3 pixels by 2 comes before
_LAYERS = (
    ("slice1.0", 4, 2, False),
    ("slice2.3", 1, 2, True),
    ("slice3.6", 1, 1, True),
    ("slice4.8", 1, 1, False),
    ("slice5.10", 1, 1, False),
)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def open_lpips(file: Path, batch: int = 32) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns the distance of two batches of images `[N, C, H, W]` in [0, 1], `[N]`; grey ones become coloured.

    Raises:
        ModelError: not such a file. The distance raises it for images smaller than the network takes (31 pixels).
    """
    try:
        state = {name: tensor.float() for name, tensor in load_file(file).items()}
        convolutions = [(state[f"net.{name}.weight"], state[f"net.{name}.bias"]) for name, *_ in _LAYERS]
        weights = [state[f"lin{index}.model.1.weight"] for index in range(len(_LAYERS))]
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"LPIPS {file}: not a state dict of lpips.LPIPS(net='alex') in safetensors ({first_line(error)})."
        ) from error
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (_SHIFT, _SCALE))

    def maps(images: torch.Tensor) -> list[torch.Tensor]:
        x = (images.float().expand(-1, 3, -1, -1) * 2 - 1 - shift) / scale
        found: list[torch.Tensor] = []
        for (_, stride, padding, pooled), (weight, bias) in zip(_LAYERS, convolutions, strict=True):
            x = conv2d(max_pool2d(x, 3, 2) if pooled else x, weight, bias, stride, padding).relu()
            found.append(normalize(x, dim=1, eps=1e-10))
        return found

    @torch.no_grad()
    def distance(images: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        total: list[torch.Tensor] = []
        for a, b in zip(images.split(batch), original.split(batch), strict=True):
            try:
                pairs = zip(maps(a), maps(b), weights, strict=True)
                total.append(torch.stack([conv2d((p - q) ** 2, w).mean((1, 2, 3)) for p, q, w in pairs]).sum(0))
            except RuntimeError as error:
                raise ModelError(f"LPIPS: cannot look at images of {list(a.shape[1:])}.") from error
        return torch.cat(total)

    return distance
