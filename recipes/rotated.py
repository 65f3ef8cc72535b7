"""GPTQ on uniform grids, in a rotated basis where that loses less: with `--activations 8` outliers are spread first."""

from quant.kernels.spec import Rotated, Uniform
from quant.recipe import Recipe

RECIPE = Recipe(spec=Rotated(Uniform(group_size=64)))
