"""Learned rounding on uniform grids: GPTQ, then codes and scales of each block trained against the float block."""

from quant.recipe import Calibration, Recipe
from quant.recovery.tuning import BlockTuning

RECIPE = Recipe(calibration=Calibration(batch_size=2), recovery=BlockTuning())
