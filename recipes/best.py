"""`balanced` with a larger trellis window, then scales and norms tuned end to end against the float model."""

from quant.kernels.spec import Rotated, Trellis
from quant.recipe import Calibration, Recipe
from quant.recovery.distillation import Distillation

RECIPE = Recipe(
    spec=Rotated(Trellis(window=14)),
    match="float",
    calibration=Calibration(batch_size=4),
    distillation=Distillation(),
)
