"""Quantizes the sentence encoder with llm-compressor, where that is installed, for `encoder.py --peer`.

    python encoder_peer.py MODEL WINDOWS RECIPE BITS GROUP OUT

MODEL: the folder of all-MiniLM-L6-v2; WINDOWS: the tokens that `encoder.py --windows` wrote; RECIPE: gptq or rtn, with
the library's defaults (symmetric); OUT: a folder for the float model that the quantized weights stand for. All linears
of the blocks are quantized. Run it in an environment of its own: it needs nothing of bitwright.
"""

from __future__ import annotations

import sys
import time

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    source, windows, recipe, bits, group, out = sys.argv[1:]
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = load_file(windows)["input_ids"]
    data = Dataset.from_list([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids])
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "encoder.layer" in n}
    how = QuantizationArgs(num_bits=int(bits), type="int", symmetric=True, strategy="group", group_size=int(group))
    scheme = QuantizationScheme(targets=list(linears), weights=how)
    modifier = (GPTQModifier if recipe == "gptq" else QuantizationModifier)(config_groups={"all": scheme})
    began = time.perf_counter()
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, recipe=[modifier], num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1], shuffle_calibration_samples=False,
    )  # fmt: skip
    print(f"{recipe} {bits} bits group {group}: {time.perf_counter() - began:.1f} s")
    for module in linears.values():
        zero, index = getattr(module, "weight_zero_point", None), getattr(module, "weight_g_idx", None)
        module.weight.data.copy_(fake_quantize(module.weight, module.weight_scale, zero, how, index))
    plain, found = AutoModel.from_pretrained(source, dtype=torch.float32), model.state_dict()
    plain.load_state_dict({name: found[name] for name in plain.state_dict()})
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
