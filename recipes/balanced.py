"""Rotated trellis codes that aim at the float path's outputs, more bits where an error costs more: the best quality per
bit without training."""

from quant.kernels.spec import Rotated
from quant.recipe import Recipe

RECIPE = Recipe(spec=Rotated(), match="float", mixed=True)
