"""What a pipeline is to show while it is calibrated: prompts of a file, or class labels, or those built in here.

The subjects of prompts.txt, each in all the manners of its second part, in a seeded order: enough for the usual 128
samples to differ. Real images come with their labels, if their folders tell them, and with these prompts otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quant.calibration.pictures import Pictures
from quant.calibration.texts import resolve
from quant.errors import CalibrationError
from quant.recipe import Calibration

SUBJECTS, MANNERS = map(str.splitlines, Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n\n"))


def prompts(calibration: Calibration, labels: Any, seen: Pictures | None) -> tuple[list[Any], str, str]:
    """What each sample shows: prompts, or class labels for a model with this config; their name and sha256."""
    count = calibration.samples
    if seen is not None:
        if labels is not None and seen.labels is not None:
            return seen.labels.tolist(), seen.name, seen.sha256
        said, name, _ = prompts(replace(calibration, text=Calibration.text), labels, None)
        return said, f"{seen.name}, {name}", seen.sha256
    if calibration.text != Calibration.text:
        text = resolve(calibration.text if not Path(calibration.text).exists() else Path(calibration.text))
        lines = [line.strip() for line in text.text.splitlines() if line.strip()]
        if labels is not None and not all(line.isdecimal() for line in lines):
            raise CalibrationError(f"calibration {text.name}: this model takes class labels; give numbers, one a line")
        shown: list[Any] = [lines[n % len(lines)] for n in range(count)]
        return [int(x) for x in shown] if labels is not None else shown, text.name, text.sha256
    generator = torch.Generator().manual_seed(calibration.seed)
    if labels is not None:
        drawn = torch.randint(0, labels["num_embeds_ada_norm"], (count,), generator=generator).tolist()
        return drawn, "random class labels", ""
    order = torch.randperm(len(SUBJECTS) * len(MANNERS), generator=generator).tolist()
    pairs = [divmod(order[n % len(order)], len(MANNERS)) for n in range(count)]
    return [f"{MANNERS[manner]} of {SUBJECTS[subject]}" for subject, manner in pairs], "built-in prompts", ""
