"""What a recipe says about calibration inputs: of a text, of experts, and of a diffusion transformer's own way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quant.errors import SettingsError

MOST_SAMPLES = 1_000_000
MOST_STEPS = 1000
MOST_SEED = 2**62  # torch takes 64 bits, and samples count on from it


@dataclass(frozen=True)
class Calibration:
    """Which text the inputs come from. `text`: a name or a file; `samples` windows of `sequence_length` tokens, cut at
    random places by `seed`; `batch_size` windows run at once (it can change the last bits of a sum). `bos`: each window
    begins with the token that begins a text, without which some models (Gemma) say nothing sensible; None: where this
    one does not (`beginning.py`), which the recipe of the finished checkpoint then says.
    """

    text: str = "python-docs:calibration"
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    batch_size: int = 8
    bos: bool | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"calibration.{name} is {getattr(self, name)}; give at least 1")
        if self.samples > MOST_SAMPLES:
            raise SettingsError(f"calibration.samples is {self.samples:,}; at most {MOST_SAMPLES:,} windows are cut")
        if abs(self.seed) > MOST_SEED:
            raise SettingsError(f"calibration.seed is {self.seed}; give at most {MOST_SEED}")


@dataclass(frozen=True)
class Experts:
    """Experts that saw fewer than `minimum_tokens` get the Hessian of all experts of their stack as a prior, counted as
    that many tokens. Each such expert is named in the report."""

    minimum_tokens: int = 256


@dataclass(frozen=True)
class Trajectory:
    """For a diffusion transformer: its `calibration.samples` samples go `steps` steps of the model's own scheduler,
    under classifier-free `guidance` (1: none; None: the pipeline's own, and none without a pipeline), and `keep` of
    each one's steps are calibrated on. `mix`: rows of different timesteps in a step of the end-to-end tuning.
    `weighting`: of timesteps in Hessians; `image`: by how far an error there moves the final image. `height`, `width`
    in pixels and `frames`: of what a pipeline draws; 0: its own, which a video's calibration may find too large."""

    steps: int = 20
    keep: int = 4
    guidance: float | None = None
    mix: int = 40
    weighting: Literal["uniform", "image"] = "uniform"
    height: int = 0
    width: int = 0
    frames: int = 0

    @property
    def size(self) -> dict[str, int]:
        """What is asked of a pipeline's size, by its arguments."""
        asked = {"height": self.height, "width": self.width, "num_frames": self.frames}
        return {name: value for name, value in asked.items() if value}

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.frames) < 0:
            raise SettingsError("trajectory.height, width and frames are positive, or 0 for the pipeline's own")
        for name in ("steps", "keep", "mix"):
            if not 1 <= getattr(self, name) <= MOST_STEPS:
                raise SettingsError(f"trajectory.{name} is {getattr(self, name)}; give 1 to {MOST_STEPS}")

    def kept(self, sample: int, steps: int) -> set[int]:
        """The steps that are kept of one sample: spread evenly, and shifted from sample to sample."""
        keep = min(self.keep, steps)
        return {(sample + place * steps // keep) % steps for place in range(keep)}
