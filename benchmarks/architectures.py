"""Which language models can be quantized? Every architecture that transformers has, in small, from end to end.

    python benchmarks/architectures.py [TYPE ...] [--pictures]

A small random model of each type is made from the defaults of its config class, sizes replaced by small ones wherever
they have a usual name (`SMALL`; what needs more is in `OWN`). It is quantized by the pipeline as any other: GPTQ at 4
bits and the trellis of `balanced` at 2, each verified after writing. Then the packed model must give the logits of the
same weights dequantized, and generate tokens. A type of which no small model can be made so is named, not counted: what
fails there is this script's. `--pictures`: models that take pictures too, whose language model is what is quantized.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from shutil import copy
from typing import Any

import record
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import quant
from quant.recipe import override

LARGEST = 50_000_000  # parameters
LIMIT = 300  # seconds for one type
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
QUICK = ["calibration.samples=4", "calibration.sequence_length=64", "calibration.batch_size=2"]
NAMES = {
    64: """hidden_size d_model n_embd dim embedding_size model_dim hidden_dim out_hidden_size projection_dim lru_width
        attention_hidden_size""",
    4: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_attention_heads n_head n_heads
        decoder_attention_heads encoder_attention_heads num_heads max_window_layers num_experts num_local_experts
        n_routed_experts moe_num_experts mm_tokens_per_image vision_soft_tokens_per_image""",
    2: """num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok moe_k num_experts_per_token moe_topk
        top_k_experts depth altup_num_inputs global_attn_every_n_layers num_block_layers""",
    16: """head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim attention_head_dim kv_channels mamba_headdim
        mamba_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim swa_head_dim swa_v_head_dim mamba_d_state
        state_size ssm_state_size d_state hidden_size_per_layer_input index_topk chunk_size mamba_chunk_size
        sliding_window""",
    8: """rotary_dim mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_key_heads index_n_heads
        n_mamba_heads time_step_rank mamba_dt_rank patch_size laurel_rank""",
    96: """intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size
        dense_intermediate_size intermediate_size_mlp block_ff_dim""",
    32: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size
        moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank o_lora_rank index_head_dim image_size
        attention_chunk_size attention_window_size""",
    1: """n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers n_group topk_group
        num_expert_groups mamba_n_groups n_groups zero_expert_num""",
    0: "num_kv_shared_layers num_nextn_predict_layers",
    128: "mamba_d_ssm max_position_embeddings n_positions n_ctx",
    1024: "vocab_size vocab_size_per_layer_input",
}
SMALL = {name: value for value, names in NAMES.items() for name in names.split()}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SPECIAL = ("image", "video", "audio", "vision_start", "vision_end", "boi", "eoi", "boa", "eoa")
SMALL |= {f"{name}_token_{what}": 900 + n for n, name in enumerate(SPECIAL) for what in ("id", "index")}
DERIVED = """layer_types mlp_layer_types layers_block_type block_types attn_layer_indices rope_parameters rope_scaling
    mlp_only_layers full_attn_idxs no_rope_layers moe_layers hybrid_layer_ids compress_ratios id2label label2id
    num_labels activation_sparsity_pattern indexer_types moe_layer_freq attention_layers architectures dtype model_type
    transformers_version per_layer_config"""  # what follows from sizes, and is made anew

FLAT = {"num_key_value_heads": 4}  # latent attention has a key for each head
SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "minicpm3"), FLAT),
    "deepseek_v2": {**FLAT, "topk_method": "greedy", "num_experts_per_tok": 2},
    "longcat_flash": {**FLAT, "qk_head_dim": 32},
    "kimi_linear": {**FLAT, "layer_types": ["linear_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "hunyuan_v1_moe": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "gemma3n_text": {**SHARED, "intermediate_size": 96, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {**SHARED, "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "recurrent_gemma": {"hidden_size": 128, "lru_width": 128},  # blocks of its gates have 32 rows, as sequences do
}


class Unbuilt(Exception):
    """No small float model, or none that runs."""


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("types", nargs="*", help="model types; default: all")
    parser.add_argument("--pictures", action="store_true", help="models that take pictures too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if args.pictures else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    rows: list[dict[str, Any]] = []
    unbuilt: list[str] = []
    signal.signal(signal.SIGALRM, expire)
    for kind in args.types or sorted(known):
        name = known[kind]
        try:
            signal.alarm(LIMIT)
            rows.append({"type": kind, "class": name} | measure(kind, name if isinstance(name, str) else name[0]))
            print(record.table(rows[-1:], list(rows[-1])), flush=True)
        except Unbuilt as error:
            unbuilt.append(kind)
            print(f"{kind}: no small model: {error}", flush=True)
        finally:
            signal.alarm(0)
    good = [row for row in rows if row["4 bits"] == row["2 bits"] == "yes"]
    record.save(
        args.results,
        "architectures_pictures" if args.pictures else "architectures",
        "Language models that take pictures" if args.pictures else "Language models",
        [(f"{len(good)} of {len(rows)} run from end to end", rows, list(rows[0]))],
        [
            "`linears`: packed matrices, a stack of experts counting as one.",
            f"No small model could be made of {len(unbuilt)} more: {', '.join(unbuilt) or 'none'}.",
        ],
    )


def expire(*_: object) -> None:
    raise TimeoutError(f"not done after {LIMIT} seconds")


def measure(kind: str, name: str) -> dict[str, Any]:
    """Makes a model and packs it twice. Raises `Unbuilt` where there is none."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = build(kind, name, Path(folder) / "float")
        row: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        row |= {"linears": None}
        recipes = {"4 bits": ["gptq", "spec.group_size=32"], "2 bits": ["balanced"]}
        for title, (recipe, *settings) in recipes.items():
            try:
                made = override(quant.load_recipe(recipe), [*QUICK, *settings])
                report = quant.quantize(str(Path(folder) / "float"), Path(folder) / title, made).report
                row["linears"] = len(report["sites"])
                check(Path(folder) / title)
                row[title] = "yes"
            except Exception as error:  # a model's own code may raise anything
                row[title] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}".replace(folder, "")
    return row | {"seconds": time.perf_counter() - began}


def build(kind: str, name: str, folder: Path) -> Any:
    """A small random float model of a type in `folder`, with the demonstration model's tokenizer."""
    try:
        config = CONFIG_MAPPING[kind].from_dict({**shrunk(CONFIG_MAPPING[kind]().to_dict()), **OWN.get(kind, {})})
        torch.manual_seed(0)
        cls = getattr(transformers, name)
        try:
            model = cls(config)
        except AttributeError:  # a class for the text alone
            model = cls(config.get_text_config())
        model = model.float().eval()
        if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
            raise ValueError("it is not small")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
            if not torch.isfinite(model(torch.arange(4, 24)[None]).logits).all():
                raise ValueError("its logits are not finite")
        model.save_pretrained(folder)
    except Exception as error:  # as above
        raise Unbuilt(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from None
    for file in TOKENIZER:
        copy(record.DEMO / file, folder / file)
    return model


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with small sizes, those of its parts too."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            made[key] = shrunk(value)
        elif key in SMALL and isinstance(value, int) and not isinstance(value, bool):
            made[key] = SMALL[key]
        elif key not in DERIVED.split():
            made[key] = value
    return made


@torch.no_grad()
def check(folder: Path) -> None:
    """Raises `ValueError` if the packed model is not the same as dequantized, or cannot generate."""
    ids = torch.arange(4, 24)[None]
    packed, plain = quant.load(folder), quant.load(folder, dequantize=True)
    got, expected = packed(ids).logits, plain(ids).logits
    worst, largest = float((got - expected).abs().max()), float(expected.abs().max())
    if not worst <= 1e-4 * largest:
        raise ValueError(f"packed, its logits are off by {worst:.3g} of {largest:.3g}")
    made = packed.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    if made.shape[1] != ids.shape[1] + 3:
        raise ValueError(f"it generated {made.shape[1] - ids.shape[1]} tokens of 3")


if __name__ == "__main__":
    main()
