"""Learned rounding on uniform grids: GPTQ, then codes, scales and norms tuned end to end against the float model."""

from quant.recipe import Calibration, Recipe
from quant.recovery.distillation import Distillation

RECIPE = Recipe(match="float", calibration=Calibration(batch_size=4), distillation=Distillation(samples=512, codes=2.0))
