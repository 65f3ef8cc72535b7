"""GPTQ that aims at the float path's outputs from the quantized path's inputs: undoes errors of earlier blocks. Twice
the calibration time of `gptq`."""

from quant.recipe import Recipe

RECIPE = Recipe(match="float")
