"""Round to nearest with a searched clip: reads no text, takes seconds, and is the baseline to beat."""

from quant.recipe import Recipe
from quant.solvers.nearest import Nearest

RECIPE = Recipe(solver=Nearest(), calibration=None)
