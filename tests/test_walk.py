"""What a walk finds, written down for every architecture, and what it refuses or leaves with a reason."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from architectures import (
    ARCHITECTURES,
    Mlp,
    Stack,
    bare_linears,
    batch,
    checkpoint,
    make,
    make_from,
    module_list,
    sequential,
    shake,
)
from quant.errors import ModelError
from quant.models.skeleton import Skeleton
from quant.models.source import find
from quant.models.walk import Block, Site, Walk, walk

# Each line is one stage: sites that read the same tensor. `name out x in`, then +bias, T for stored [in, out], *n for a
# stack of n experts.
LLAMA = """
self_attn.q_proj 64x64, self_attn.k_proj 32x64, self_attn.v_proj 32x64
self_attn.o_proj 64x64
mlp.gate_proj 96x64, mlp.up_proj 96x64
mlp.down_proj 64x96
"""
OPT = """
self_attn.q_proj 64x64 +bias, self_attn.k_proj 64x64 +bias, self_attn.v_proj 64x64 +bias
self_attn.out_proj 64x64 +bias
fc1 96x64 +bias
fc2 64x96 +bias
"""
GEMMA4 = """
self_attn.q_proj {0}x64{1}
self_attn.o_proj 64x{0}
mlp.gate_proj 96x64, mlp.up_proj 96x64
mlp.down_proj 64x96
per_layer_input_gate 16x64
per_layer_projection 64x16
"""
STAGES = {
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "qwen2": """
        self_attn.q_proj 64x64 +bias, self_attn.k_proj 32x64 +bias, self_attn.v_proj 32x64 +bias
        self_attn.o_proj 64x64
        mlp.gate_proj 96x64, mlp.up_proj 96x64
        mlp.down_proj 64x96
        """,
    "qwen3": """
        self_attn.q_proj 96x64, self_attn.k_proj 48x64, self_attn.v_proj 48x64
        self_attn.o_proj 64x96
        mlp.gate_proj 96x64, mlp.up_proj 96x64
        mlp.down_proj 64x96
        """,
    "mistral": LLAMA,
    "gemma3": LLAMA,
    "gemma4": [
        GEMMA4.format(64, ", self_attn.k_proj 32x64, self_attn.v_proj 32x64"),
        GEMMA4.format(96, ", self_attn.k_proj 48x64, self_attn.v_proj 48x64"),
        GEMMA4.format(64, ""),
        GEMMA4.format(96, ""),
    ],
    "phi3": """
        self_attn.qkv_proj 128x64
        self_attn.o_proj 64x64
        mlp.gate_up_proj 192x64
        mlp.down_proj 64x96
        """,
    "opt": OPT,
    "opt-projected": OPT,
    "gpt2": """
        attn.c_attn 192x64 +bias T
        attn.c_proj 64x64 +bias T
        mlp.c_fc 96x64 +bias T
        mlp.c_proj 64x96 +bias T
        """,
    # its parallel branches have a norm each, so they do not share their input
    "gpt-neox": """
        attention.query_key_value 192x64 +bias
        attention.dense 64x64 +bias
        mlp.dense_h_to_4h 96x64 +bias
        mlp.dense_4h_to_h 64x96 +bias
        """,
    # its parallel branches read one norm
    "falcon": """
        self_attention.query_key_value 96x64, mlp.dense_h_to_4h 96x64
        self_attention.dense 64x64
        mlp.dense_4h_to_h 64x96
        """,
    "bert": """
        attention.self.query 64x64 +bias, attention.self.key 64x64 +bias, attention.self.value 64x64 +bias
        attention.output.dense 64x64 +bias
        intermediate.dense 96x64 +bias
        output.dense 64x96 +bias
        """,
    "mixtral": """
        self_attn.q_proj 64x64, self_attn.k_proj 32x64, self_attn.v_proj 32x64
        self_attn.o_proj 64x64
        mlp.experts.gate_up_proj 192x64 *8
        mlp.experts.down_proj 64x96 *8
        """,
    "qwen3-moe": """
        self_attn.q_proj 64x64, self_attn.k_proj 32x64, self_attn.v_proj 32x64
        self_attn.o_proj 64x64
        mlp.experts.gate_up_proj 48x64 *9
        mlp.experts.down_proj 64x24 *9
        """,
}
BLOCKS = {
    "opt": "model.decoder.layers",
    "opt-projected": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "bert": "encoder.layer",
}
EMBEDDING, OUTSIDE = "an embedding", "outside the blocks (a head or a projection)"
LLAMA_LEFT = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": OUTSIDE}
TIED_LEFT = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": "tied to model.embed_tokens.weight"}
OPT_LEFT = {
    "model.decoder.embed_tokens.weight": EMBEDDING,
    "model.decoder.embed_positions.weight": EMBEDDING,
    "lm_head.weight": "tied to model.decoder.embed_tokens.weight",
}
ROUTER = "a matrix of {}, which is no linear layer"
LEFT = {
    "llama": LLAMA_LEFT,
    "llama-tied": TIED_LEFT,
    "qwen2": TIED_LEFT,
    "qwen3": TIED_LEFT,
    "mistral": LLAMA_LEFT,
    "gemma3": TIED_LEFT,
    "gemma4": {
        **TIED_LEFT,
        "model.embed_tokens_per_layer.weight": EMBEDDING,
        "model.per_layer_model_projection.weight": OUTSIDE,
    },
    "phi3": LLAMA_LEFT,
    "opt": OPT_LEFT,
    "opt-projected": {
        **OPT_LEFT,
        "model.decoder.project_in.weight": OUTSIDE,
        "model.decoder.project_out.weight": OUTSIDE,
    },
    "gpt2": {
        "transformer.wte.weight": EMBEDDING,
        "transformer.wpe.weight": EMBEDDING,
        "lm_head.weight": "tied to transformer.wte.weight",
    },
    "gpt-neox": {"gpt_neox.embed_in.weight": EMBEDDING, "lm_head.weight": OUTSIDE},
    "falcon": {
        "transformer.word_embeddings.weight": EMBEDDING,
        "lm_head.weight": "tied to transformer.word_embeddings.weight",
    },
    "bert": {
        "embeddings.word_embeddings.weight": EMBEDDING,
        "embeddings.position_embeddings.weight": EMBEDDING,
        "embeddings.token_type_embeddings.weight": EMBEDDING,
        "pooler.dense.weight": OUTSIDE,
    },
    "mixtral": {
        **LLAMA_LEFT,
        "model.layers.0.mlp.gate.weight": ROUTER.format("MixtralTopKRouter"),
        "model.layers.1.mlp.gate.weight": ROUTER.format("MixtralTopKRouter"),
    },
    "qwen3-moe": {
        **LLAMA_LEFT,
        "model.layers.0.mlp.gate.weight": ROUTER.format("Qwen3MoeTopKRouter"),
        "model.layers.1.mlp.gate.weight": ROUTER.format("Qwen3MoeTopKRouter"),
    },
}


def spelled(block: Block) -> list[str]:
    """A block's stages in the notation above."""

    def spell(site: Site) -> str:
        marks = (" +bias" if site.bias else "") + (" T" if site.transposed else "")
        return f"{site.name.removeprefix(block.name + '.')} {site.out}x{site.inputs}{marks}" + (
            f" *{site.experts}" if site.experts else ""
        )

    return [", ".join(spell(site) for site in stage) for stage in block.stages]


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def assert_nothing_is_missing(model: nn.Module, found: Walk) -> None:
    """Every tensor of two or more dimensions is a site or has its reason, never both."""
    names = {name for name, x in model.named_parameters(remove_duplicate=False) if x.dim() >= 2}
    sites = [site.parameter for site in found.sites]
    assert len(sites) == len(set(sites))
    assert set(sites).isdisjoint(found.left)
    assert set(sites) | set(found.left) == names
    assert all(found.left.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    model = make(name)
    found = walk(model, batch())
    depth = 4 if name in ("gemma3", "gemma4") else 2
    assert found.chain == tuple(f"{BLOCKS.get(name, 'model.layers')}.{index}" for index in range(depth))
    assert [block.name for block in found.blocks] == list(found.chain)
    stages = STAGES[name]
    for block, written in zip(found.blocks, [stages] * depth if isinstance(stages, str) else stages, strict=True):
        assert spelled(block) == lines(written)
    assert found.left == LEFT[name]
    assert_nothing_is_missing(model, found)
    for site in found.sites:
        parameter = model.get_parameter(site.parameter)
        stored = (site.inputs, site.out) if site.transposed else (site.out, site.inputs)
        assert parameter.shape[-2:] == stored
        assert site.shape == (parameter.numel() // site.inputs, site.inputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_skeleton_walks_like_the_model(name: str) -> None:
    """On meta, with the ties and the experts' own loop that `Skeleton` builds."""
    skeleton = Skeleton(find(str(checkpoint(name))))
    assert walk(skeleton.model, batch(2, 5)) == walk(make(name), batch())
    assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())


def test_the_model_comes_back_as_it_was() -> None:
    model = make("gpt2").train()
    state = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    walk(model, batch())
    assert all(part.training for part in model.modules())
    assert {key: tensor.data_ptr() for key, tensor in model.state_dict().items()} == {
        key: pointer for key, (pointer, _) in state.items()
    }
    assert all(torch.equal(tensor, state[key][1]) for key, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_failing_pass_leaves_the_model_as_it_was(name: str) -> None:
    model = make_from("T5Model", **T5) if name == "t5" else make("llama")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match="the forward pass that finds its layers failed, given no_such_input"):
        walk(model, {"no_such_input": torch.zeros(1)})
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# plain modules


def test_a_module_list() -> None:
    model = module_list()
    found = walk(model, batch())
    assert found.chain == ("blocks.0", "blocks.1", "blocks.2")
    assert [spelled(block) for block in found.blocks] == [["up 48x32 +bias", "down 32x48"]] * 3
    assert found.left == {"embedding.weight": EMBEDDING, "head.weight": OUTSIDE}
    assert_nothing_is_missing(model, found)


def test_a_sequential_of_blocks() -> None:
    model = sequential()
    found = walk(model, {"input": batch()["input_ids"]})
    assert found.chain == ("1", "2")
    assert [spelled(block) for block in found.blocks] == [["up 48x32 +bias", "down 32x48"]] * 2
    assert found.left == {"0.weight": EMBEDDING, "3.weight": OUTSIDE}
    assert_nothing_is_missing(model, found)


def test_bare_linears_are_one_block() -> None:
    model = bare_linears()
    found = walk(model, {"input": batch()["input_ids"]})
    assert found.chain == ("",)
    assert spelled(found.blocks[0]) == ["1 48x32 +bias", "4 40x48 +bias", "6 16x40 +bias"]
    assert_nothing_is_missing(model, found)


def test_bare_linears_beside_blocks_are_no_blocks() -> None:
    class Heads(Stack):
        """Several heads in a list, and a small network before the blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
            self.heads = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.before(self.embedding(input_ids))
            for block in self.blocks:
                x = block(x)
            return torch.cat([self.head(x), *(head(x) for head in self.heads)], -1)

    model = shake(Heads())
    found = walk(model, batch())
    assert found.chain == ("blocks.0", "blocks.1", "blocks.2")
    assert {found.left[f"{name}.weight"] for name in ("before.0", "before.2", "heads.0", "heads.2")} == {OUTSIDE}
    assert_nothing_is_missing(model, found)


def test_call_order_not_name_order() -> None:
    class Backwards(Stack):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids)
            for block in reversed(list(self.blocks)):
                x = block(x)
            return self.head(x)

    assert walk(shake(Backwards()), batch()).chain == ("blocks.2", "blocks.1", "blocks.0")


def test_convolutions_are_no_stacks() -> None:
    """A depthwise convolution's weight has three dimensions, and as many channels as a linear may have outputs."""

    class Convolved(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(48, 48, 3, padding=1, groups=48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.conv(self.up(x).mT).mT)

    model = shake(Stack(2, Convolved))
    found = walk(model, batch())
    assert spelled(found.blocks[0]) == ["up 48x32 +bias", "down 32x48"]
    assert found.left["blocks.0.conv.weight"] == "a tensor of Conv1d that is not used as a matrix product"
    assert_nothing_is_missing(model, found)


# experts


class Experts(nn.Module):
    """A mixture whose experts' matrices lie in two stacks; subclasses say how they are multiplied."""

    def __init__(self, experts: int = 10) -> None:
        super().__init__()
        self.router = nn.Linear(32, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 32, 48))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 48))
        self.down_proj = nn.Parameter(torch.zeros(experts, 24, 32))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.router(x).softmax(-1).topk(2)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


class OneByOne(Experts):
    """As gpt-oss does: `x @ stack[i] + bias[i]` for the experts that were hit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.route(flat)
        out = flat.clone()
        for expert in chosen.unique():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            inner = self.gate(flat[rows] @ self.gate_up_proj[expert] + self.gate_up_proj_bias[expert])
            out.index_add_(0, rows, inner @ self.down_proj[expert] * weights[rows, place, None])
        return out.view_as(x)


class AllAtOnce(Experts):
    """As Llama 4 does: every expert on every token, in one batched product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        scores = torch.sigmoid(self.router(flat)).T[..., None]
        inner = self.gate(torch.bmm(flat.expand(len(scores), -1, -1) * scores, self.gate_up_proj))
        return (flat + torch.bmm(inner, self.down_proj).sum(0)).view_as(x)


class Broadcast(Experts):
    """Multiplies one input by all matrices at once: no input of their own, so no Hessian of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        scores = torch.sigmoid(self.router(flat)).T[..., None]
        return (
            flat + (torch.matmul(self.gate(torch.matmul(flat, self.gate_up_proj)), self.down_proj) * scores).sum(0)
        ).view_as(x)


@pytest.mark.parametrize("kind", [OneByOne, AllAtOnce])
def test_stacks_of_experts_of_ones_own(kind: type[Experts]) -> None:
    model = shake(Stack(2, kind))
    found = walk(model, batch())
    assert [spelled(block) for block in found.blocks] == [["gate_up_proj 48x32 T *10", "down_proj 32x24 T *10"]] * 2
    assert found.left["blocks.0.router.weight"].startswith("a router: its 10 outputs choose")
    assert "gate_up_proj_bias" in " ".join(found.left)
    assert_nothing_is_missing(model, found)


def test_a_stack_multiplied_by_one_input_is_left() -> None:
    model = shake(Stack(2, Broadcast))
    found = walk(model, batch())
    assert [site.name for site in found.blocks[0].sites] == ["blocks.0.down_proj"]
    assert found.left["blocks.0.gate_up_proj"].endswith("the whole stack, not one input by each matrix")


class Nested(OneByOne):
    """Its router lies in a module of its own; another linear has as many outputs as there are experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.Linear(32, 10))
        self.keys = nn.Sequential(nn.Linear(32, 10), nn.Linear(10, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.keys(x).softmax(-1))


def test_a_router_is_known_by_what_it_does() -> None:
    model = shake(Stack(2, Nested))
    found = walk(model, batch())
    assert spelled(found.blocks[1])[:2] == ["keys.0 10x32 +bias", "keys.1 32x10 +bias"]
    assert found.left["blocks.1.router.0.weight"].startswith("a router: its 10 outputs choose")
    assert_nothing_is_missing(model, found)


def test_a_matrix_of_another_name_is_left() -> None:
    class Connected(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.fn = nn.Parameter(torch.zeros(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.nn.functional.linear(x, self.fn))

    model = shake(Stack(2, Connected))
    found = walk(model, batch())
    assert found.left["blocks.0.fn"] == "a matrix of Connected, which is no linear layer"
    assert_nothing_is_missing(model, found)


class Listed(nn.Module):
    """The older style: experts are modules in a list, and a token calls those it is routed to."""

    def __init__(self, experts: int = 12) -> None:
        super().__init__()
        self.attention = nn.Linear(32, 32)
        self.gate = nn.Linear(32, experts, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(experts))
        self.shared = Mlp()
        self.shared_gate = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.attention(x).flatten(0, -2)
        weights, chosen = self.gate(flat).softmax(-1).topk(1)
        out = self.shared(flat) * self.shared_gate(flat).sigmoid()
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).any(-1).nonzero().flatten()
            out.index_add_(0, rows, self.experts[expert](flat[rows]) * weights[rows])
        return out.view_as(x)


def test_experts_in_a_list() -> None:
    model = shake(Stack(2, Listed))
    found = walk(model, batch(1, 4))  # four tokens cannot reach twelve experts
    sites = {site.name for site in found.sites}
    assert {"blocks.0.attention", "blocks.1.shared.up"} <= sites
    assert found.left["blocks.0.gate.weight"].startswith("a router: its 12 outputs choose")
    assert found.left["blocks.0.shared_gate.weight"] == "only 1 outputs: too small to be worth it"
    uncalled = [name for name, why in found.left.items() if why.startswith("no product with it was seen")]
    assert len(uncalled) >= 2 * 2 * (12 - 4)
    assert all(".experts." in name for name in uncalled)
    assert any(".experts." in name for name in sites)
    assert_nothing_is_missing(model, found)


@pytest.mark.parametrize("kind", ["GptOss", "Llama4"])
def test_transformers_own_odd_experts(kind: str) -> None:
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 9,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    if kind == "Llama4":
        settings |= {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 1, "attention_chunk_size": 64}
    model = make_from(f"{kind}ForCausalLM", **settings)
    found = walk(model, batch())
    assert_nothing_is_missing(model, found)
    stacks = {site.name: site for site in found.sites if site.experts}
    assert len(stacks) == 4
    assert all(site.transposed and site.experts == 9 for site in stacks.values())
    assert {(site.out, site.inputs) for site in stacks.values()} == {(48, 64), (64, 24)}
    assert any("router" in name for name in found.left)
    assert not any("router" in site.name for site in found.sites)


# linears that are not what they seem


READ = "its weight, or the dtype of it, is read from outside its own forward"


class Odd(nn.Module):
    """A block with one ordinary linear, and `odd`, used in a way of its own."""

    def __init__(self, odd: nn.Module | None = None) -> None:
        super().__init__()
        self.plain = nn.Linear(32, 32)
        self.odd = odd or nn.Linear(32, 32)

    @property
    def weight(self) -> torch.Tensor:
        return self.odd.get_parameter("weight")

    def use(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x) + self.use(x)


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Prescaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * input)


class Biasless(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.weight)


class Half(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.weight[:16]).repeat(1, 1, 2)


class Written(nn.Linear):
    """Falcon's linear: the same in other words, so it is a site."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


class Sliced(Odd):
    def use(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight[:16]).repeat(1, 1, 2)


class Borrowed(Odd):
    def use(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


class Twice(Odd):
    def use(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(self.odd(x))


class BothWays(Odd):
    def use(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(x) @ self.weight


class CastTo(Odd):
    def use(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(x.to(self.weight.dtype))


class ByName(Odd):
    def use(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(input=x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: Odd(Scaled(32, 32)), "Scaled computes more than x W^T + b"),
        (lambda: Odd(Biasless(32, 32)), "Biasless computes more than x W^T + b"),
        (lambda: Odd(Prescaled(32, 32)), "Prescaled changes its input before the product"),
        (lambda: Odd(Half(32, 32)), "only a part of it is multiplied by"),
        (Sliced, "only a part of it is multiplied by"),
        (Borrowed, "its weight is read from outside its own forward"),
        (BothWays, "its weight is read from outside its own forward"),
        (CastTo, READ),
        (ByName, "its weight is read from outside its own forward"),
        (Twice, "used on several inputs in one pass"),
        (lambda: Odd(nn.Linear(32, 32)), None),
        (lambda: Odd(Biasless(32, 32, bias=False)), None),
        (lambda: Odd(Written(32, 32)), None),
    ],
)
def test_only_true_linears_are_sites(block: Any, reason: str | None) -> None:
    model = shake(Stack(2, block))
    found = walk(model, batch())
    names = [site.name for site in found.blocks[1].sites]
    assert names == ["blocks.1.plain"] + ([] if reason else ["blocks.1.odd"])
    assert found.left.get("blocks.1.odd.weight") == reason
    assert not any(site.transposed for site in found.sites)
    assert_nothing_is_missing(model, found)


def test_orientation_of_square_matrices() -> None:
    """Shapes cannot tell `x W` from `x W^T` when W is square."""

    class Square(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, input.flatten(0, -2), self.weight.mT).view_as(input)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = Square(32, 32)
            self.columns = transformers.pytorch_utils.Conv1D(32, 32)
            self.stack = nn.Parameter(torch.zeros(9, 32, 32))
            self.flipped = nn.Parameter(torch.zeros(9, 32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.columns(self.rows(x))
            many = torch.bmm(x.flatten(0, -2).expand(9, -1, -1).clone(), self.stack)
            return x + torch.bmm(many, self.flipped.transpose(1, 2)).mean(0).view_as(x)

    found = walk(shake(Stack(2, Both)), batch())
    assert spelled(found.blocks[0]) == [
        "rows 32x32 +bias",
        "columns 32x32 +bias T",
        "stack 32x32 T *9",
        "flipped 32x32 *9",
    ]


def test_attention_of_torch_is_listed() -> None:
    """nn.MultiheadAttention multiplies inside one call that cannot be looked into: not a site, and not forgotten."""

    class Attention(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.attention(x, x, x, need_weights=False)[0])

    model = shake(Stack(2, Attention))
    found = walk(model, batch())
    assert [site.name for site in found.blocks[0].sites] == ["blocks.0.up", "blocks.0.down"]
    assert found.left["blocks.0.attention.in_proj_weight"].startswith("a tensor of MultiheadAttention")
    assert found.left["blocks.0.attention.out_proj.weight"].startswith("no product with it was seen")
    assert_nothing_is_missing(model, found)


# sharing


def test_a_matrix_shared_by_blocks_is_left() -> None:
    model = Stack(3)
    blocks: Any = model.blocks
    blocks[2].up = blocks[0].up  # one module in two places
    blocks[1].down.weight = blocks[0].down.weight  # one parameter in two modules
    shake(model)
    found = walk(model, batch())
    assert [site.name for site in found.sites] == ["blocks.1.up", "blocks.2.down"]
    assert found.left["blocks.0.up.weight"] == "shared: blocks.2 multiplies by it as well"
    assert found.left["blocks.0.down.weight"] == "shared: blocks.1 multiplies by it as well"
    assert found.left["blocks.1.down.weight"] == "tied to blocks.0.down.weight"
    assert_nothing_is_missing(model, found)


def test_a_matrix_tied_to_the_embedding_is_left() -> None:
    model: Any = nn.Sequential(nn.Embedding(128, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 128, bias=False))
    model[3].weight = model[0].weight
    found = walk(shake(model), {"input": batch()["input_ids"]})
    assert [site.name for site in found.sites] == ["1"]
    assert found.left == {"0.weight": "tied to 3.weight", "3.weight": "tied to 0.weight"}


def test_a_matrix_that_the_head_uses_too_is_left() -> None:
    class Reading(Stack):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            up = self.get_submodule("blocks.0.up")
            return super().forward(input_ids) + up(self.embedding(input_ids)).sum()

    found = walk(shake(Reading()), batch())
    assert found.left["blocks.0.up.weight"] == "shared: the model outside its blocks multiplies by it as well"


def test_blocks_that_run_several_times_are_listed() -> None:
    class Looped(Stack):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](self.embedding(input_ids))
            return self.head(self.blocks[2](self.blocks[1](self.blocks[1](x))))

    model = shake(Looped())
    found = walk(model, batch())
    assert found.chain == ("blocks.0", "blocks.2")
    assert found.left["blocks.1.up.weight"] == "its block blocks.1 runs 2 times in one forward pass"
    assert_nothing_is_missing(model, found)


def test_albert_has_nothing_to_quantize() -> None:
    settings = {"vocab_size": 128, "embedding_size": 32, "hidden_size": 64, "intermediate_size": 96}
    model = make_from("AlbertModel", **settings, num_hidden_layers=3, num_attention_heads=4)
    with pytest.raises(ModelError, match=r"AlbertModel: nothing to quantize .* runs 3 times in one forward pass"):
        walk(model, batch())


# chains


class Unet(Stack):
    """The second half of the blocks reads, from outside, what the first half gave."""

    def __init__(self, how: str) -> None:
        super().__init__(4)
        self.how = how
        self.scale = nn.Parameter(torch.zeros(()))
        self.mix = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)

    def join(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        if self.how == "added":
            return x + skip
        if self.how == "learned scale":
            return x + self.scale * self.norm(skip)
        return self.mix(torch.cat([x, skip], -1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](self.embedding(input_ids))
        second = self.blocks[1](first)
        third = self.blocks[2](second)
        return self.head(self.blocks[3](self.join(third, first)))


@pytest.mark.parametrize("how", ["added", "learned scale", "projected"])
def test_a_skip_connection_past_a_block_is_refused(how: str) -> None:
    with pytest.raises(ModelError, match=r"blocks\.3: reads more than the output of blocks\.2 .*skip connection"):
        walk(Unet(how), batch())


def test_a_skip_inside_an_object_is_refused() -> None:
    """Keys and values of an earlier block, handed on in a list, are neither its output nor in a dict."""

    class Keeper(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, kept: list[torch.Tensor] | None = None) -> torch.Tensor:
            assert kept is not None
            kept.append(self.read(x))
            return super().forward(x) + kept[0]

    class Sharing(Stack):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x, kept = self.embedding(input_ids), []
            for block in self.blocks:
                x = block(x, kept)
            return self.head(x)

    with pytest.raises(ModelError, match=r"blocks\.1: reads more than the output of blocks\.0"):
        walk(Sharing(3, Keeper), batch())


def test_a_head_that_reads_all_blocks_is_refused() -> None:
    class Summed(Stack):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x, total = self.embedding(input_ids), 0
            for block in self.blocks:
                x = block(x)
                total = total + x
            return self.head(total)

    with pytest.raises(ModelError, match=r"the head: reads more than the output of blocks\.2"):
        walk(Summed(), batch())


def test_what_a_model_gives_beside_its_main_output_is_not_asked_for() -> None:
    """XLNet hands out every layer's hidden states; its attention multiplies by einsum, which is listed."""
    settings = {"vocab_size": 128, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    model = make_from("XLNetLMHeadModel", **settings)
    found = walk(model, batch())
    assert spelled(found.blocks[0]) == ["ff.layer_1 48x32 +bias", "ff.layer_2 32x48 +bias"]
    assert found.left["transformer.layer.0.rel_attn.q"].startswith("a tensor of XLNetRelativeAttention")
    assert_nothing_is_missing(model, found)


def test_what_comes_from_the_embeddings_is_no_skip() -> None:
    """Every replay computes it anew: only what earlier blocks made is missing there."""

    class Fed(Stack):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = first = self.embedding(input_ids)
            for block in self.blocks:
                x = block(x + first)
            return self.head(x)

    assert len(walk(Fed(), batch()).sites) == 6


def test_randomness_is_refused() -> None:
    class Dice(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.rand_like(x))

    with pytest.raises(ModelError, match=r"blocks\.0: does not give the same result twice"):
        walk(Stack(2, Dice), batch())


T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "T5Model"])
def test_an_encoder_decoder_is_refused_by_name(kind: str) -> None:
    """A decoder block reads the encoder's output as well as its predecessor's."""
    ids = batch()["input_ids"]
    with pytest.raises(ModelError, match=r"decoder\.block\.1: reads more than the output of decoder\.block\.0"):
        walk(make_from(kind, **T5), {"input_ids": ids, "decoder_input_ids": ids})


def test_an_encoder_decoder_without_decoder_input() -> None:
    with pytest.raises(ModelError, match=r"given input_ids \(.*\); a model that needs more cannot be quantized"):
        walk(make_from("T5Model", **T5), batch())


def test_a_t5_encoder() -> None:
    """Its blocks hand on the position bias beside the hidden states."""
    found = walk(make_from("T5EncoderModel", **T5), batch())
    assert spelled(found.blocks[1]) == [
        "layer.0.SelfAttention.q 32x32, layer.0.SelfAttention.k 32x32, layer.0.SelfAttention.v 32x32",
        "layer.0.SelfAttention.o 32x32",
        "layer.1.DenseReluDense.wi 48x32",
    ]
    reason = found.left["encoder.block.1.layer.1.DenseReluDense.wo.weight"]  # its input is cast to `wo.weight.dtype`
    assert reason == READ


# patterns


def test_only_and_skip() -> None:
    model = make("llama")
    found = walk(model, batch(), only=["*.mlp.*", "*.1.self_attn.q_proj"], skip=["*.0.mlp.down_proj", "*.1.*up_proj"])
    assert [site.name for site in found.sites] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert found.left["model.layers.0.mlp.down_proj.weight"] == "skipped by --skip *.0.mlp.down_proj"
    assert found.left["model.layers.0.self_attn.q_proj.weight"] == "not selected by --only"
    assert found.chain == ("model.layers.0", "model.layers.1")
    assert_nothing_is_missing(model, found)


def test_blocks_without_sites_stay_in_the_chain() -> None:
    found = walk(make("llama"), batch(), only=["model.layers.1.*"])
    assert found.chain == ("model.layers.0", "model.layers.1")
    assert [block.name for block in found.blocks] == ["model.layers.1"]


@pytest.mark.parametrize("patterns", [{"only": ["*.nothing"]}, {"skip": ["*.nothing"]}, {"only": ["lm_head", "*.fc1"]}])
def test_a_pattern_that_matches_nothing(patterns: dict[str, list[str]]) -> None:
    pattern = patterns.get("only", patterns.get("skip", []))[0]
    with pytest.raises(ModelError, match="matches no site") as caught:
        walk(make("llama"), batch(), **patterns)
    assert repr(pattern) in str(caught.value)


def test_everything_skipped() -> None:
    with pytest.raises(ModelError, match=r"nothing to quantize \(.*skipped by --skip \*"):
        walk(make("llama"), batch(), skip=["*"])


@pytest.mark.parametrize("model", [nn.Sequential(nn.Embedding(128, 32), nn.LayerNorm(32)), nn.Embedding(128, 32)])
def test_a_model_without_linears(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="nothing to quantize"):
        walk(model, {"input": batch()["input_ids"]})


def test_a_model_that_gives_no_numbers() -> None:
    with pytest.raises(ModelError, match="its output holds no floating-point tensor"):
        walk(nn.Identity(), {"input": batch()["input_ids"]})


# cost


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("name", ["llama-70b", "mixtral"])
def test_a_walk_costs_no_memory(name: str) -> None:
    """69 billion parameters, or 46 billion of which most are experts, that were never allocated."""
    sizes: dict[str, Any] = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    sizes |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    cls: Any = transformers.LlamaForCausalLM if name == "llama-70b" else transformers.MixtralForCausalLM
    config = cls.config_class(**(sizes if name == "llama-70b" else {}))
    with init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=torch.bfloat16, experts_implementation="eager")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found = walk(model, batch(1, 16))
    grown, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.monotonic() - start
    assert len(found.sites) == (560 if name == "llama-70b" else 32 * 6)
    assert sum(site.shape[0] * site.inputs for site in found.sites) > 40e9
    assert grown < 300 * 1024
    assert seconds < 60  # under ten alone; the machine may be busy


def test_a_mask_made_inside_a_vmap() -> None:
    """Its tensors show no memory (as transformers makes those of pictures' tokens)."""

    class Masked(Stack):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            place = torch.arange(input_ids.shape[1])
            mask = torch.vmap(lambda i: i.new_zeros((), dtype=torch.bool) | (i >= 0))(place)
            x = self.embedding(input_ids) * mask[:, None]
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    assert len(walk(Masked(2), batch()).blocks) == 2
