"""What a solver knows of a layer's inputs: the mean of `x xT`, streamed.

The output error of a weight `Q` in place of `W` is `E |(W - Q) x|^2 = tr((W - Q) H (W - Q)T)` with `H = E[x xT]`, so
`H` is all that the layer-wise solvers need (GPTQ, arXiv 2210.17323, section 3). Sites that share an input share one
`Statistics`, and with it one factorisation. `cross = E[x_float xT]` also records what the float model would have fed
the layer: it lets a solver match the float path's outputs from the quantized path's inputs (GPTAQ, arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from quant.errors import CalibrationError

RANGES = 4
"""Ranges of timesteps, of equally many timesteps each."""
KEPT = 256
"""Tokens kept at least, where there are as many; fewer than twice that."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """`hessian` `[in, in]` float32: MEAN over `tokens` tokens of `x xT`, with `x` the inputs that the layer will really
    see; of `r x xT` with weights `r` of mean 1 where tokens count unequally (`importance.py`).

    `cross` `[in, in]` float32: mean of `x_float xT`, or None. `prior`: a sentence on what was mixed in beyond the
    tokens seen, or None. `sample` `[n, in]` float32: some of the tokens, and `peaks` `[ranges, in]` float32: the
    largest absolute values of each range of timesteps, where a spec asks for them (`RangeCollector`). `anchor` `[in]`
    float32: the first token, likewise (`solvers/anchor.py`).
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None
    prior: str | None = None
    sample: Tensor | None = None
    peaks: Tensor | None = None
    anchor: Tensor | None = None
    _cache: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def identity(cls, features: int, device: torch.device | str = "cpu") -> Self:
        """Data-free: every input equally likely, none correlated."""
        return cls(torch.eye(features, device=device), 0, prior="identity: no calibration data")

    @property
    def features(self) -> int:
        return self.hessian.shape[0]

    @property
    def diagonal(self) -> Tensor:
        """`[in]`: mean square of each input."""
        return self.hessian.diagonal()

    def with_prior(self, prior_hessian: Tensor, strength: float, name: str) -> Statistics:
        """As if `strength` more tokens had come whose mean `x xT` is `prior_hessian` `[in, in]`.

        For experts that saw few tokens: with the Hessian of all the layer's tokens as prior, many own tokens drown it
        and none leave it alone. The prior's float and quantized inputs count as equal.
        """
        share = strength / (self.tokens + strength)
        prior = prior_hessian.to(self.hessian)
        return replace(
            self,
            hessian=torch.lerp(self.hessian, prior, share),
            cross=None if self.cross is None else torch.lerp(self.cross, prior, share),
            prior=f"{name} counted as {strength:g} tokens beside {self.tokens} seen",
        )

    def mapped(self, both: Callable[[Tensor], Tensor], each: Callable[[Tensor], Tensor]) -> Statistics:
        """Of a linear map of the inputs: `both` takes a mean of `x yT` through it, `each` tokens `[..., in]`."""
        some = lambda part, through: None if part is None else through(part)  # noqa: E731
        return replace(
            self,
            hessian=both(self.hessian),
            cross=some(self.cross, both),
            sample=some(self.sample, each),
            anchor=some(self.anchor, each),
            peaks=None,
        )

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, once per key for as long as these statistics live: sites that share them share it."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def forget(self) -> None:
        """Gives back what was computed once, three times the Hessian's memory and more: a stack has many experts."""
        self._cache.clear()


class HessianCollector:
    """Streams activations into `Statistics`. Products and sums in float32, whatever dtype the model runs in."""

    def __init__(self, features: int, device: torch.device | str = "cpu", cross: bool = False) -> None:
        self.features = features
        self.tokens = 0
        self._sum = torch.zeros((features, features), device=device)
        self._cross = torch.zeros_like(self._sum) if cross else None

    def update(self, x: Tensor, reference: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Adds the tokens of `x` `[..., in]`.

        `reference` `[..., in]`: the same tokens in the float path; required exactly when the collector was made with
        `cross`. `weights` `[...]`: how much each token counts, of mean 1 over those added, so that sums stay means.
        """
        if (reference is None) != (self._cross is None):
            raise CalibrationError(
                "reference inputs and a collector with cross=True need each other; one of them is missing"
            )
        rows = self._rows(x, weights)
        self.tokens += rows.shape[0]
        self._sum.addmm_(rows.T, rows)
        if reference is not None and self._cross is not None:
            self._cross.addmm_(self._rows(reference, weights).T, rows)

    def finish(self) -> Statistics:
        """The means. With no token seen the Hessian is zero and `tokens` 0: the caller decides on a prior.

        Raises `CalibrationError` if an input was not finite (a NaN or infinity stays visible on the sum's diagonal) or
        the squares left the range of float32.
        """
        bad = (~torch.isfinite(self._sum.diagonal())).nonzero().flatten().tolist()
        if bad or (self._cross is not None and not bool(torch.isfinite(self._cross).all())):
            where = f"channels {bad[:4]} of {self.features}" if bad else "the float path"
            raise CalibrationError(
                f"inputs of {where} are not finite, or their squares leave float32 ({self.tokens} tokens seen); "
                "check the model in this dtype, or calibrate in float32"
            )
        count = max(1, self.tokens)
        return Statistics(self._sum / count, self.tokens, None if self._cross is None else self._cross / count)

    def _rows(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """`x sqrt(r)` `[tokens, in]`."""
        if x.shape[-1] != self.features:
            raise CalibrationError(f"inputs have {x.shape[-1]} channels; the layer takes {self.features}")
        rows = x.reshape(-1, self.features).to(self._sum.device, torch.float32)
        return rows if weights is None else rows * weights.reshape(-1).to(rows).sqrt()[:, None]


class RangeCollector:
    """What rounding a layer's inputs will meet: the largest values of each channel, and some whole tokens.

    Largest values are kept for each range of timesteps apart (ViDiT-Q, arXiv 2406.02540, section 3.3: a channel that is
    large at the start of the way to the image need not be at its end); models without timesteps have one range. What
    rounding a token costs depends on all its channels at once, so a few hundred tokens are kept as they are, spread
    evenly over everything that was seen.
    """

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
