"""`balanced` with a larger trellis window, more descent, and scales trained against each float block."""

from quant.kernels.spec import Rotated, Trellis
from quant.recipe import Calibration, Recipe
from quant.recovery.tuning import BlockTuning
from quant.solvers.feedback import Feedback

RECIPE = Recipe(
    spec=Rotated(Trellis(window=14)),
    solver=Feedback(sweeps=4),
    match="float",
    calibration=Calibration(batch_size=2),
    recovery=BlockTuning(),
)
