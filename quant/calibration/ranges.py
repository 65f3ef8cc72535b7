"""What rounding a layer's inputs will meet: the largest values of each channel, and some whole tokens.

Largest values are kept for each range of timesteps apart (ViDiT-Q, arXiv 2406.02540, section 3.3: a channel that is
large at the start of the way to the image need not be at its end); models without timesteps have one range. What
rounding a token costs depends on all its channels at once, so a few hundred tokens are kept as they are, spread evenly
over everything that was seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RANGES = 4
"""Ranges of timesteps, of equally many timesteps each."""
KEPT = 256
"""Tokens kept at least, where there are as many; fewer than twice that."""


class RangeCollector:
    """Streams tokens; see the module."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.features, self.device = features, device
        self._peaks: dict[float, Tensor] = {}  # by timestep
        self._kept: list[Tensor] = []
        self._seen, self._every, self._count = 0, 1, 0

    def update(self, x: Tensor, time: float) -> None:
        """Adds the tokens `x` `[..., in]` of one timestep."""
        rows = x.detach().reshape(-1, self.features)
        if not len(rows):
            return
        peak = rows.abs().amax(0).to(self.device, torch.float32)
        known = self._peaks.get(time)
        self._peaks[time] = peak if known is None else torch.maximum(known, peak)
        self._kept.append(rows[-self._seen % self._every :: self._every].to(self.device, torch.float32))
        self._seen += len(rows)
        self._count += len(self._kept[-1])
        while self._count >= 2 * KEPT:  # every second one of what is kept
            self._kept, self._every = [torch.cat(self._kept)[::2].clone()], 2 * self._every
            self._count = len(self._kept[0])

    def finish(self) -> tuple[Tensor, Tensor] | None:
        """Largest absolute values `[ranges, in]` and kept tokens `[n, in]`, float32; None if none was seen."""
        if not self._peaks:
            return None
        steps = torch.stack([self._peaks[time] for time in sorted(self._peaks)])
        peaks = torch.stack([part.amax(0) for part in steps.tensor_split(min(RANGES, len(steps)))])
        return peaks, torch.cat(self._kept)


def timestep(batch: Mapping[str, Any]) -> float:
    """The timestep of a batch, its first row's; 0 where its model has none."""
    time = batch.get("timestep")
    return 0.0 if time is None else float(torch.as_tensor(time).flatten()[0])
