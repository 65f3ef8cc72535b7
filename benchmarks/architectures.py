"""Which language models can be quantized? Every architecture that transformers has, in small, from end to end.

    python benchmarks/architectures.py [TYPE ...] [--pictures]

A small random model of each type is made from the defaults of its config class, sizes replaced by small ones wherever
they have a usual name (`SMALL`; what needs more is in `OWN`). It is quantized by the pipeline as any other: GPTQ at 4
bits and the trellis of `balanced` at 2, each verified after writing. Then the packed model must give the logits of the
same weights dequantized, and generate tokens. A type of which no small model can be made so that transformers loads it
and generates with it is named, not counted. `--pictures`: models that take pictures too, whose language model is what
is quantized. Types that are named are measured anew, and take their places among what the results have.
"""

from __future__ import annotations

import json
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

LARGEST = 30_000_000  # parameters
LIMIT = 300  # seconds for one type
IDS = torch.arange(4, 24)[None]  # what every model is asked
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
        mamba_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim swa_head_dim swa_v_head_dim
        linear_head_dim mamba_d_state state_size ssm_state_size d_state hidden_size_per_layer_input
        index_topk chunk_size mamba_chunk_size
        sliding_window""",
    8: """rotary_dim mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_key_heads index_n_heads
        linear_num_heads n_mamba_heads time_step_rank mamba_dt_rank patch_size laurel_rank""",
    96: """intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff
        dense_intermediate_size intermediate_size_mlp block_ff_dim""",
    32: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size
        moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank o_lora_rank index_head_dim image_size
        attention_chunk_size attention_window_size""",
    1: """n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers n_group topk_group
        num_expert_groups num_expert_group mamba_n_groups n_groups zero_expert_num""",
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

GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}},
}
GEMMA3N = {
    "layer_types": GEMMA["layer_types"],
    "num_kv_shared_layers": 2,
    "intermediate_size": 96,
    "activation_sparsity_pattern": [0.0] * 4,
}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
HALF = {"rope_parameters": {**SECTIONS["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": HYBRID,
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4, "rope_parameters": {"full_attention": None}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA},
    "gemma4_text": GEMMA,
    "gemma4_unified": {"text_config": GEMMA},
    "gemma4_unified_text": GEMMA,
    "glm46v": {"text_config": SECTIONS},
    "glm4v": {"text_config": SECTIONS},
    "glm4v_moe": {"text_config": HALF},
    "glm_ocr": {"text_config": HALF},
    "glmga": {"text_config": HALF},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": HYBRID,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "paddleocr_vl": {"text_config": SECTIONS},
    "qwen2_5_omni_thinker": {"text_config": SECTIONS},
    "qwen2_5_vl": {"text_config": SECTIONS},
    "qwen2_vl": {"text_config": SECTIONS, "vision_config": {"embed_dim": 64, "hidden_size": 64}},
    "recurrent_gemma": {"hidden_size": 128, "lru_width": 128},  # blocks of its gates have 32 rows, as sequences do
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
    },
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
    name, title = "architectures", "Language models"
    if args.pictures:
        name, title = "architectures_pictures", "Language models that take pictures"
    rows, unbuilt = earlier(args.results / f"{name}.json") if args.types else ({}, {})
    signal.signal(signal.SIGALRM, expire)
    for kind in args.types or sorted(known):
        rows.pop(kind, None)
        unbuilt.pop(kind, None)
        cls = known[kind] if isinstance(known[kind], str) else known[kind][0]
        try:
            signal.alarm(LIMIT)
            rows[kind] = {"type": kind, "class": cls, **measure(kind, cls), "commit": record.commit()}
            print(record.table([rows[kind]], list(rows[kind])), flush=True)
        except Unbuilt as error:
            unbuilt[kind] = str(error)
            print(f"{kind}: no small model: {error}", flush=True)
        finally:
            signal.alarm(0)
    shown = [rows[kind] for kind in sorted(rows)]
    good = sum(row["4 bits"] == row["2 bits"] == "yes" for row in shown)
    record.save(
        args.results,
        name,
        title,
        [(f"{good} of {len(shown)} run from end to end", shown, list(shown[0]))],
        [
            "`linears`: packed matrices, a stack of experts counting as one. Types that are named in the command were "
            "measured anew; each row says its commit.",
            f"No small model could be made of {len(unbuilt)} more: {', '.join(sorted(unbuilt)) or 'none'}.",
        ],
        unbuilt=unbuilt,
    )


def earlier(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The rows by type that the results have, and why others have none."""
    if not file.exists():
        return {}, {}
    data = json.loads(file.read_text(encoding="utf-8"))
    return {row["type"]: row for rows in data["tables"].values() for row in rows}, data["unbuilt"]


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
        config = CONFIG_MAPPING[kind].from_dict(merged(shrunk(CONFIG_MAPPING[kind]().to_dict()), OWN.get(kind, {})))
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
            said = model(IDS).logits
            if not torch.isfinite(said).all():
                raise ValueError("its logits are not finite")
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder)
            if not torch.allclose(again(IDS).logits, said, rtol=1e-3, atol=1e-3):
                raise ValueError("transformers does not load what it saved")
            generated(again)
    except Exception as error:  # as above
        raise Unbuilt(f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:200]}") from None
    for file in TOKENIZER:
        copy(record.DEMO / file, folder / file)
    return model


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with small sizes, those of its parts too."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if key in DERIVED.split():
            continue
        if isinstance(value, dict) and key.endswith("_config"):
            made[key] = shrunk(value)
        elif key in SMALL and isinstance(value, int) and not isinstance(value, bool):
            made[key] = SMALL[key]
        else:
            made[key] = value
    if "qk_rope_head_dim" in made:  # latent attention has a key for each head
        made["num_key_value_heads"] = made["num_attention_heads"]
    return made


def merged(config: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The config with settings of `own` in their places, at any depth."""
    for key, value in own.items():
        deeper = isinstance(value, dict) and key.endswith("_config") and isinstance(config.get(key), dict)
        config[key] = merged(config[key], value) if deeper else value
    return config


@torch.no_grad()
def check(folder: Path) -> None:
    """Raises `ValueError` if the packed model is not the same as dequantized, or cannot generate."""
    packed, plain = quant.load(folder), quant.load(folder, dequantize=True)
    got, expected = packed(IDS).logits, plain(IDS).logits
    worst, largest = float((got - expected).abs().max()), float(expected.abs().max())
    if not worst <= 1e-3 * largest:  # as of the verification
        raise ValueError(f"packed, its logits are off by {worst:.3g} of {largest:.3g}")
    generated(packed)


def generated(model: Any) -> None:
    """Raises `ValueError` if it cannot generate."""
    made = model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    if made.shape[1] != IDS.shape[1] + 3:
        raise ValueError(f"it generated {made.shape[1] - IDS.shape[1]} tokens of 3")


if __name__ == "__main__":
    main()
