"""`balanced`, then codes, scales and norms tuned end to end against the float model (a DiT: scales and norms). A state
for each weight (`inst`): tuning codes improves it more than pairs, for twice the time of a product."""

from quant.kernels.spec import Rotated, Trellis
from quant.recipe import Calibration, Recipe, Trajectory
from quant.recovery.distillation import Distillation

RECIPE = Recipe(
    spec=Rotated(Trellis(code="inst", window=12)),
    match="float",
    mixed=True,
    calibration=Calibration(batch_size=4),
    trajectory=Trajectory(keep=8),
    distillation=Distillation(samples=512, codes=1.0),
)
