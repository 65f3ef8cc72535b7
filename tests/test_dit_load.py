"""Packed diffusion transformers in the hands of diffusers, accelerate and PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_dit
import torch

import quant
from quant.errors import BitwrightError, CheckpointError
from quant.kernels.spec import LowRank
from quant.linear import PackedLinear
from quant.models.arguments import build, find_form
from quant.models.stream import first_tensor
from quant.recipe import load_recipe, with_spec


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], torch.Tensor]:
    """A packed model, arguments for it, and what it makes of them."""
    folder = tmp_path_factory.mktemp("flux")
    source = tiny_dit.folder("FluxTransformer2DModel", folder / "float")
    out = quant.quantize(str(source), folder / "packed", with_spec(load_recipe("rtn"), group_size=16)).out
    model = tiny_dit.library().FluxTransformer2DModel.from_pretrained(source)
    form = find_form(model)
    given = build(model, form.layout, form.traced, 2)
    return out, given, run(quant.load(out), given)


@torch.no_grad()
def run(model: Any, given: dict[str, Any]) -> torch.Tensor:
    return first_tensor(model(**given))


def test_without_quant_the_error_is_clear(flux: tuple[Path, Any, Any]) -> None:
    """And diffusers may be imported, and have failed, before this package is."""
    code = f"""
import diffusers
load = lambda: diffusers.FluxTransformer2DModel.from_pretrained({str(flux[0])!r})
try:
    load()
except ValueError as error:
    print(error)
import quant
load()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "Unknown quantization type, got bitwright" in done.stdout


def test_bfloat16_keeps_the_packed_tensors_as_stored(flux: tuple[Path, Any, Any]) -> None:
    given = {k: v.bfloat16() if v.is_floating_point() and "ids" not in k else v for k, v in flux[1].items()}
    model = tiny_dit.library().FluxTransformer2DModel.from_pretrained(flux[0], torch_dtype=torch.bfloat16)
    exact = quant.load(flux[0])
    for (name, module), other in zip(model.named_modules(), exact.modules(), strict=True):
        if isinstance(module, PackedLinear):
            for key, tensor in module.packed.tensors().items():
                assert torch.equal(tensor, other.packed.tensors()[key]), f"{name}.{key}"
    expected = run(quant.load(flux[0], dtype="bfloat16", dequantize=True), given).float()
    assert float((run(model, given).float() - expected).norm() / expected.norm()) < 0.05


def test_saved_again_it_is_the_same(flux: tuple[Path, Any, torch.Tensor], tmp_path: Path) -> None:
    quant.load(flux[0]).save_pretrained(tmp_path)
    again = tiny_dit.library().AutoModel.from_pretrained(str(tmp_path))
    torch.testing.assert_close(run(again, flux[1]), flux[2], rtol=0, atol=0)
    with pytest.raises(ValueError, match="dtype"):
        again.to(torch.float16)


def test_damage_is_found_before_a_tensor_is_used(flux: tuple[Path, Any, Any], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(flux[0], tmp_path / "bad")
    file = tmp_path / "bad" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum differs"):
        quant.load(tmp_path / "bad")
    with pytest.raises(BitwrightError, match="checksum differs"):
        tiny_dit.library().FluxTransformer2DModel.from_pretrained(tmp_path / "bad")
    quant.load(tmp_path / "bad", verify=False)  # as it was asked for


@pytest.mark.parametrize("how", ["accelerate", "block_level", "leaf_level"])
def test_offloaded_to_the_cpu_it_computes_the_same(how: str, flux: tuple[Path, Any, torch.Tensor]) -> None:
    import accelerate

    model, cpu = quant.load(flux[0]), torch.device("cpu")
    if how == "accelerate":
        accelerate.cpu_offload(model, cpu, offload_buffers=True)
        assert model.transformer_blocks[0].attn.to_q.weight.device.type == "meta"
    else:
        blocks = {"num_blocks_per_group": 1} if how == "block_level" else {}
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=how, **blocks)
    torch.testing.assert_close(run(model, flux[1]), flux[2], rtol=0, atol=0)


def test_beside_another_quantizer_in_one_pipeline(flux: tuple[Path, Any, Any]) -> None:
    """A pipeline-wide config speaks of float components; what is packed keeps its own."""
    diffusers = tiny_dit.library()
    tables = sys.modules["diffusers.quantizers.auto"]
    config = tables.AUTO_QUANTIZATION_CONFIG_MAPPING["bitwright"]()
    mapped = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config})
    given = mapped._resolve_quant_config(True, "transformer")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = diffusers.FluxTransformer2DModel.from_pretrained(flux[0], quantization_config=given)
    torch.testing.assert_close(run(model, flux[1]), flux[2], rtol=0, atol=0)


def test_lora_trains_on_packed_linears(flux: tuple[Path, Any, torch.Tensor]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = quant.load(flux[0])
    assert model.hf_quantizer.is_trainable
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights="gaussian"))
    torch.testing.assert_close(run(model, flux[1]), flux[2], rtol=0, atol=0)
    first_tensor(model(**flux[1])).square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(g is not None and float(g.abs().sum()) > 0 for g in gradients)
    with pytest.raises(BitwrightError, match="cannot be merged"):
        model.fuse_lora()


def test_a_low_rank_branch_comes_along(tmp_path: Path) -> None:
    source = tiny_dit.folder("DiTTransformer2DModel", tmp_path / "float", "DDIMScheduler")
    spec = LowRank(quant.Uniform(bits=3, group_size=16), rank=4, rounds=0)
    recipe = quant.Recipe(spec, calibration=quant.Calibration(samples=4, batch_size=4))
    out = quant.quantize(str(source), tmp_path / "packed", recipe).out
    model = tiny_dit.library().DiTTransformer2DModel.from_pretrained(out)
    assert model.transformer_blocks[0].ff.net[2].packed.spec == spec


def test_dequantized_it_can_be_saved_as_a_float_model(
    flux: tuple[Path, dict[str, Any], torch.Tensor], tmp_path: Path
) -> None:
    quant.load(flux[0], dequantize=True).save_pretrained(tmp_path)
    again = tiny_dit.library().FluxTransformer2DModel.from_pretrained(tmp_path)
    assert not any(isinstance(module, PackedLinear) for module in again.modules())
    torch.testing.assert_close(run(again, flux[1]), flux[2])
