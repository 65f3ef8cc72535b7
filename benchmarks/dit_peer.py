"""Quantizes a diffusion transformer with AutoRound or optimum-quanto, where those are installed, for `dit.py --python`.

    python dit_peer.py TASK

TASK: a folder in which `dit.py` left `inputs.safetensors` (the transformer's keyword arguments, a calibration input a
row) and `task.json` (the transformer's folder, its class, the method, bits of each linear, group size). Here it gains
`weights.safetensors`, the float weights that the quantized ones stand for, and `done.json`: seconds, bits per weight of
all that the library stores for these linears, versions. Run it in an environment of its own: it needs nothing of
bitwright.

AutoRound 0.16.1 refuses a bare transformer ("A tokenizer must be set for non-str model input") and calls pipelines with
prompts that it downloads, which a DiTPipeline does not take. So it is given a pipeline of the transformer and nothing
else, indices as prompts, and its own hook (`_autoround_pipeline_fn`) that runs the transformer on the inputs of those
indices. All the rest is its diffusion mode with its defaults: symmetric grids, 200 steps a block, 8 samples a step, one
at a time; in float32 (`amp=False`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def main() -> None:
    place = Path(sys.argv[1])
    task = json.loads((place / "task.json").read_text())
    inputs = load_file(place / "inputs.safetensors")
    model = getattr(diffusers, task["class"]).from_pretrained(task["transformer"], torch_dtype=torch.float32).eval()
    library, _, manner = task["method"].partition(" ")
    run = autoround if library == "autoround" else quanto
    weights, nbytes, seconds, packages = run(model, inputs, task, manner)
    count = sum(weight.numel() for weight in weights.values())
    save_file({name: weight.float().contiguous() for name, weight in weights.items()}, place / "weights.safetensors")
    versions = {package: version(package) for package in (*packages, "torch", "diffusers")}
    done = {"bits": 8 * nbytes / count, "seconds": seconds, "versions": versions}
    (place / "done.json").write_text(json.dumps(done))


def autoround(model: Any, inputs: dict[str, torch.Tensor], task: dict[str, Any], manner: str) -> tuple[Any, ...]:
    from auto_round import AutoRound

    class Alone(diffusers.DiffusionPipeline):
        def __init__(self, transformer: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer)

        def __call__(self, *_: Any, **__: Any) -> None:
            raise NotImplementedError

    def shown(pipe: Any, indices: list[int], **_: Any) -> None:
        pipe.transformer(**{name: tensor[indices] for name, tensor in inputs.items()})

    pipe = Alone(model)
    pipe._autoround_pipeline_fn = shown
    names, count = task["linears"], len(inputs["hidden_states"])
    least = min(names.values())
    config: dict[str, Any] = {
        name: {"bits": 16, "data_type": "fp"}
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in names
    }
    config |= {name: {"bits": bits} for name, bits in names.items() if bits != least}
    options: dict[str, Any] = {"iters": 0} if "rtn" in manner else {"enable_alg_ext": True} if "ext" in manner else {}
    began = time.perf_counter()
    rounding = AutoRound(
        pipe, bits=least, group_size=task["group"], sym="asym" not in manner, layer_config=config, nsamples=count,
        dataset=[([n], [n]) for n in range(count)], device_map="cpu", enable_torch_compile=False, amp=False, **options,
    )  # fmt: skip
    done, _ = rounding.quantize()
    seconds = time.perf_counter() - began
    weights = {name: done.get_submodule(name).weight.detach().clone() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        rounding.save_quantized(folder, format="auto_round")
        nbytes = stored(Path(folder), set(names))
    return weights, nbytes, seconds, ["auto-round"]


def stored(folder: Path, names: set[str]) -> int:
    """Bytes of all tensors of these linears but their biases."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                name, _, leaf = key.rpartition(".")
                if name in names and leaf != "bias":
                    tensor = tensors.get_tensor(key)
                    total += tensor.numel() * tensor.element_size()
    return total


def quanto(model: Any, _: dict[str, torch.Tensor], task: dict[str, Any], manner: str) -> tuple[Any, ...]:
    from optimum.quanto import HqqOptimizer, MaxOptimizer, freeze, qint2, qint4, quantize

    kinds, optimizer = {2: qint2, 4: qint4}, HqqOptimizer() if manner == "hqq" else MaxOptimizer()
    if not set(task["linears"].values()) <= kinds.keys():
        raise SystemExit(f"quanto has weights of 2 and 4 bits, not {sorted(set(task['linears'].values()))}")
    model = model.half()  # its scales have the model's dtype
    began = time.perf_counter()
    for bits, kind in kinds.items():
        wanted = [name for name, own in task["linears"].items() if own == bits]
        if wanted:
            quantize(model, weights=kind, include=wanted, optimizer=optimizer)
    freeze(model)
    seconds = time.perf_counter() - began
    modules = {name: model.get_submodule(name) for name in task["linears"]}
    weights = {name: module.weight.dequantize() for name, module in modules.items()}
    nbytes = sum(
        tensor.numel() * tensor.element_size()
        for module in modules.values()
        for key, tensor in module.state_dict().items()
        if key.startswith("weight")
    )
    return weights, nbytes, seconds, ["optimum-quanto"]


if __name__ == "__main__":
    main()
