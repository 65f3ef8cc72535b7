"""transformers' rules for stored tensors where some of those are packed.

A Qwen3-VL mixture has a rule that turns a stack of experts, which it finds by the name that the packed one has too.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

import quant
from tests import tiny
from tests.architectures import make_from

TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8,
    "deepstack_visual_indexes": [0],
}  # fmt: skip


def test_a_packed_stack_is_not_turned(tmp_path: Path) -> None:
    """Packed, one layer's experts left float beside them, and saved again; as the whole model and as its base."""
    model = make_from("Qwen3VLMoeForConditionalGeneration", text_config=TEXT, vision_config=VISION)
    model.save_pretrained(tmp_path / "float")
    tiny.add_tokenizer(tmp_path / "float")
    recipe = tiny.recipe(tiny.text(tmp_path), 'skip=["*layers.1.mlp.experts*"]')
    report = quant.quantize(str(tmp_path / "float"), tmp_path / "packed", recipe).report
    assert sum("experts" in site["site"] for site in report["sites"]) == 2
    ids = torch.arange(20)[None]
    packed = quant.load(tmp_path / "packed")
    with torch.no_grad():
        logits = packed(ids).logits
        assert float((logits - model(ids).logits).abs().max()) < 0.5 * float(logits.abs().max())
        packed.save_pretrained(tmp_path / "again")
        assert torch.equal(quant.load(tmp_path / "again")(ids).logits, logits)
        hidden = transformers.AutoModel.from_pretrained(tmp_path / "packed").eval()(ids).last_hidden_state
        assert torch.equal(packed.lm_head(hidden), logits)
        plain = quant.load(tmp_path / "packed", dequantize=True)
        plain.save_pretrained(tmp_path / "plain")
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
        torch.testing.assert_close(loaded(ids).logits, logits)
