"""bitwright: post-training quantization of language models, from a float checkpoint to a packed low-bit one.

`quantize(model, out, recipe)` makes a checkpoint, `load(out)` gives a transformers model that runs it. Importing this
package also teaches `from_pretrained` of transformers and of diffusers to read such checkpoints.
"""

import os

# Threads that wait shall sleep. Spinning ones take the core that the working one needs on a machine with other users: a
# matrix of 1024 x 2816 took GPTQ 111 s on two busy cores, and 3 s with this. OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from quant.checkpoint import lora as _lora
from quant.checkpoint import pipelines as _pipelines
from quant.checkpoint.announcement import when_imported as _when_imported
from quant.checkpoint.loader import load
from quant.errors import BitwrightError
from quant.kernels.spec import Uniform
from quant.pipeline import quantize
from quant.prepare import Settings
from quant.recipe import Calibration, Recipe, load_recipe
from quant.version import VERSION as __version__

_when_imported(_pipelines.TABLES, _pipelines.register)
_when_imported(_lora.LORA, _lora.register)

__all__ = [
    "BitwrightError", "Calibration", "Recipe", "Settings", "Uniform", "__version__", "load", "load_recipe", "quantize",
]  # fmt: skip
