"""Codebooks of vectors whose assignments are learned among candidates, block by block (VQ4DiT)."""

from quant.kernels.spec import Codebook
from quant.recipe import Recipe
from quant.recovery.assignments import Assignments

RECIPE = Recipe(spec=Codebook(bits=2), match="float", recovery=Assignments())
