"""SVDQuant: smoothing searched with a low-rank branch active, GPTQ on what the branch leaves (arXiv 2411.05007)."""

from quant.kernels.spec import LowRank, Smoothed, Uniform
from quant.recipe import Recipe

RECIPE = Recipe(spec=Smoothed(LowRank(Uniform(group_size=64))))
