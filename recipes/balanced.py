"""Rotated trellis codes with error feedback and descent: the best quality per bit without training."""

from quant.kernels.spec import Rotated
from quant.recipe import Recipe

RECIPE = Recipe(spec=Rotated())
