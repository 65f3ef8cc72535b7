"""`balanced`, then codes, scales and norms tuned end to end against the float model (a DiT: scales and norms)."""

from quant.kernels.spec import Rotated
from quant.recipe import Calibration, Recipe, Trajectory
from quant.recovery.distillation import Distillation

RECIPE = Recipe(
    spec=Rotated(),
    match="float",
    calibration=Calibration(batch_size=4),
    trajectory=Trajectory(keep=8),
    distillation=Distillation(samples=512, codes=1.0),
)
