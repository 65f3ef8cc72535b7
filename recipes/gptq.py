"""GPTQ with group-aware reordering, true sequential: the default. Minutes for a small model, hours for a large one."""

from quant.recipe import Recipe

RECIPE = Recipe()
