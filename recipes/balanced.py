"""Rotated trellis codes that aim at the float path's outputs, bits and rows by what an error costs: the best quality
per bit without training."""

from quant.kernels.spec import Rotated
from quant.recipe import Recipe

RECIPE = Recipe(spec=Rotated(), match="float", mixed=True)
