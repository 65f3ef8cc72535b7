"""The contract of reliability: each of these ends in a clear error or in a recorded, stated fallback.

what goes wrong                         test
--------------------------------------  ----------------------------------------------------------------------------
non-finite weights                      test_weights_that_are_not_finite
non-finite activations                  test_activations_that_are_not_finite
Hessian not positive definite           test_a_hessian_that_is_not_positive_definite
dead columns                            test_inputs_that_are_always_zero
sites that saw no token                 test_experts_that_saw_no_token
                                        test_pipeline.test_experts_that_saw_few_tokens_are_named
shapes that do not divide               test_shapes_that_do_not_divide
fused 3-D expert parameters             test_experts_fused_into_one_parameter
                                        test_pipeline.test_an_architecture_goes_in_and_the_same_function_comes_out
tied weights                            test_tied_weights
                                        test_checkpoint.test_what_stays_float_keeps_its_bits_and_its_dtype
conv1d-style linears                    test_linears_that_lie_on_their_side
                                        test_checkpoint.test_transformers_alone_refuses
a text too short                        test_a_text_that_is_too_short
unknown keys in a recipe                test_unknown_keys_in_a_recipe
                                        test_unknown_names_in_a_plan
missing, extra, truncated or altered    test_a_checkpoint_that_is_not_whole
tensors                                 test_fuzz.test_with_checksums_nothing_gets_through
disk full                               test_a_full_disk
                                        test_a_limit_on_files
out of memory                           test_out_of_memory
                                        test_out_of_memory_while_loading
SIGINT, SIGTERM                         test_resume.test_a_signal_leaves_a_folder_that_resumes
SIGKILL                                 test_resume.test_killed_ten_times_at_random_instants
                                        test_resume.test_killed_at_every_step_on_disk
two runs on one folder                  test_resume.test_two_runs_in_one_folder
a hub that cannot be reached            test_a_hub_that_cannot_be_reached
"""

from __future__ import annotations

import errno
import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quant
from quant import Calibration, Settings, quantize
from quant.checkpoint import shards
from quant.checkpoint.journal import FOLDER
from quant.errors import (
    BitwrightError,
    CalibrationError,
    CheckpointError,
    ModelError,
    ResourceError,
    SettingsError,
)
from quant.prepare import prepare
from quant.recipe import recipe_from_dict, with_spec
from tests import tiny
from tests.architectures import VOCABULARY, make, make_from
from tests.processes import PATIENCE, Start, quiet

HERE = Path(__file__).parent


def test_the_table_names_tests_that_exist() -> None:
    named = re.findall(r"(?:(test_\w+)\.)?(test_\w+)", __doc__ or "")
    assert len(named) > 25
    for module, name in named:
        text = (HERE / f"{module or 'test_contract'}.py").read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{module}.{name}"


@pytest.fixture
def changed(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny Llama whose stored tensors a function has changed."""

    def change(edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        folder = Path(shutil.copytree(llama, tmp_path / "changed"))
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids)[0]


# --- numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["layers.1.mlp.up_proj", "embed_tokens", "norm"])
def test_weights_that_are_not_finite(
    changed: Callable[..., Path], words: Path, tmp_path: Path, place: str, bad: float
) -> None:
    name = f"model.{place}.weight"
    model = changed(lambda tensors: tensors[name].view(-1)[17:18].fill_(bad))
    said = rf"changed: {re.escape(name)} holds NaN or infinite weights; the checkpoint is damaged or was saved in too"
    for recipe in (tiny.recipe(words), quant.load_recipe("rtn")):
        with pytest.raises(ModelError, match=said):
            quantize(str(model), tmp_path / "out", recipe, mode="restart" if (tmp_path / "out").exists() else "new")


def test_activations_that_are_not_finite(changed: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    """Weights of a sensible size for float32 whose products leave float16."""

    def louder(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("gate", "up"):
            tensors[f"model.layers.0.mlp.{part}_proj.weight"] *= 2e3

    model = changed(louder)
    said = r"model\.layers\.0\.mlp\.down_proj: inputs of channels \[.*\] of 96 are not finite.* or calibrate in float32"
    with pytest.raises(CalibrationError, match=said):
        quantize(str(model), tmp_path / "out", tiny.recipe(words), settings=Settings(dtype="float16"))
    said = r"model\.layers\.0: its output is not finite; the model overflows in this dtype \(try --dtype float32\)"
    with pytest.raises(ModelError, match=said):  # without data nobody looks at inputs
        quantize(str(model), tmp_path / "free", quant.load_recipe("rtn"), settings=Settings(dtype="float16"))
    quantize(str(model), tmp_path / "wide", tiny.recipe(words))


def test_a_hessian_that_is_not_positive_definite(llama: Path, words: Path, tmp_path: Path) -> None:
    """Eight tokens for 64 inputs, and damping that is nothing, or too little at first."""
    few = ["calibration.samples=1", "calibration.sequence_length=8"]
    report = quantize(str(llama), tmp_path / "none", tiny.recipe(words, *few, "solver.damp=0.0")).report
    fallback = "Hessian not positive definite with damp 0 to 0 (8 tokens seen); rounded to nearest"
    assert {site["site"]: site["notes"] for site in report["sites"]} == {s["site"]: [fallback] for s in report["sites"]}
    assert "8 tokens seen" in (tmp_path / "none" / "report.html").read_text()
    report = quantize(str(llama), tmp_path / "little", tiny.recipe(words, *few, "solver.damp=1e-17")).report
    notes = [note for site in report["sites"] for note in site["notes"]]
    assert notes
    assert all(note.startswith("Hessian not positive definite with damp 1e-17") for note in notes)
    report = quantize(str(llama), tmp_path / "enough", tiny.recipe(words, *few)).report
    assert [site["notes"] for site in report["sites"]] == [[]] * 14


def test_inputs_that_are_always_zero(changed: Callable[..., Path], words: Path, tmp_path: Path) -> None:
    """A norm that silences channel 5: what reads it rounds it to nearest, and loses nothing elsewhere by it."""
    name = "model.layers.0.self_attn.q_proj"

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][5] = 0

    model = changed(silence)
    for order in ("gar", "act", "none"):
        for sweeps in (0, 2):
            recipe = tiny.recipe(words, f"solver.order={order}", f"solver.sweeps={sweeps}")
            report = quantize(str(model), tmp_path / f"{order}-{sweeps}", recipe).report
            site = next(site for site in report["sites"] if site["site"] == name)
            assert site["error"] < 0.02
            assert site["notes"] == []
        weight = load_file(model / "model.safetensors")[f"{name}.weight"]
        packed = quant.load(tmp_path / f"{order}-0").get_submodule(name).packed
        step = packed.scales.float().abs().repeat_interleave(32, 1)[:, 5]
        inside = (weight[:, 5].abs() < weight[:, :32].abs().amax(1) * 0.5).nonzero().flatten()  # not clipped
        lost = (packed.dequantize()[:, 5] - weight[:, 5]).abs()
        assert len(inside) > 20
        assert bool((lost[inside] <= step[inside] * 0.501).all())


def test_experts_that_saw_no_token(words: Path, tmp_path: Path) -> None:
    """A router that knows two experts of eight: the others take the mean of all inputs, and are named."""
    model = make("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[2:] = 0
        layer.mlp.gate.weight.data[:2] *= 1e-3
        layer.post_attention_layernorm.weight.data.abs_()
    model.save_pretrained(tmp_path / "model")
    tiny.add_tokenizer(tmp_path / "model")
    recipe = tiny.recipe(words, "calibration.samples=1", "calibration.sequence_length=4")
    report = quantize(str(tmp_path / "model"), tmp_path / "out", recipe).report
    stacks = [site for site in report["sites"] if site["experts"]]
    assert stacks
    for site in stacks:
        unseen = [expert for expert, tokens in enumerate(site["tokens"]) if not tokens]
        assert unseen
        for expert in unseen:
            note = f"expert {expert}: saw 0 tokens, its stack's mean Hessian counted as 256 tokens beside 0 seen"
            assert note in site["notes"]
        assert 0 < site["error"] < 0.1
    assert torch.isfinite(logits(quant.load(tmp_path / "out"))).all()


# --- shapes


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(3, 24, False), (5, 7, True), (1, -1, True), (8, -1, True), (2, 1000, False), (7, 1, False)],
)
def test_shapes_that_do_not_divide(llama: Path, tmp_path: Path, bits: int, group: int, symmetric: bool) -> None:
    """64 and 96 inputs: a ragged last group, rows that end inside a byte, groups longer than the row."""
    recipe = with_spec(quant.load_recipe("rtn"), bits=bits, group_size=group, symmetric=symmetric)
    result = quantize(str(llama), tmp_path / "out", recipe)
    packed = 0
    for rows, columns in [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)] * 2:
        groups = -(-columns // (columns if group == -1 else min(group, columns)))
        packed += rows * (-(-columns * bits // 8) + 2 * groups + (0 if symmetric else -(-groups * bits // 8)))
    assert result.report["bits"]["packed_bytes"] == packed
    assert result.report["bits"]["measured"] == result.report["bits"]["promised"]
    plain = logits(quant.load(tmp_path / "out", dequantize=True))
    torch.testing.assert_close(logits(quant.load(tmp_path / "out")), plain, rtol=0, atol=1e-4)


def test_experts_fused_into_one_parameter(words: Path, packed_moe: Path) -> None:
    """Found, packed as one site each, and never left out in silence."""
    report = json.loads((packed_moe / "report.json").read_text())
    stacks = {site["site"]: site for site in report["sites"] if site["experts"]}
    names = {f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in ("gate_up_proj", "down_proj")}
    assert stacks.keys() == names
    assert stacks["model.layers.0.mlp.experts.gate_up_proj"]["shape"] == [8 * 2 * 96, 64]
    assert not any("experts" in name for name in report["left_float"])
    stored = load_file(packed_moe / "model.safetensors")
    assert not any(re.search(r"experts\.\d", name) for name in stored)
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].shape == (8 * 2 * 96 * 64 * 3 // 8,)


def test_tied_weights(words: Path, tmp_path: Path) -> None:
    """A matrix that the embedding shares is not quantized behind its back."""
    source = tiny.model("qwen2", tmp_path / "model")
    report = quantize(str(source), tmp_path / "out", tiny.recipe(words)).report
    assert report["left_float"]["lm_head.weight"] == "tied to model.embed_tokens.weight"
    model = quant.load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


def test_linears_that_lie_on_their_side(words: Path, tmp_path: Path) -> None:
    """GPT-2's Conv1D stores [in, out]; groups run along the input all the same."""
    source = tiny.model("gpt2", tmp_path / "model")
    report = quantize(str(source), tmp_path / "out", tiny.recipe(words, bits=8)).report
    shapes = {site["site"].removeprefix("transformer.h.0."): site["shape"] for site in report["sites"][:4]}
    assert shapes == {
        "attn.c_attn": [192, 64], "attn.c_proj": [64, 64], "mlp.c_fc": [96, 64], "mlp.c_proj": [64, 96],
    }  # fmt: skip
    sites = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sites"]
    assert all(site["transposed"] for site in sites.values())
    original = load_file(source / "model.safetensors")
    plain = quant.load(tmp_path / "out", dequantize=True).transformer.h[0].mlp.c_fc
    name = next(name for name in original if name.endswith("h.0.mlp.c_fc.weight"))
    assert type(plain).__name__ == "Conv1D"
    torch.testing.assert_close(plain.weight, original[name], rtol=0, atol=2e-3)


# --- what is asked for


def test_a_text_that_is_too_short(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("only thirty-three characters long")
    said = (
        r"calibration text short\.txt: 33 tokens, and one window takes 32; give a longer text \(128 windows want about "
        r"65,000 tokens\) or a smaller --sequence-length"
    )
    with pytest.raises(CalibrationError, match=said):
        quantize(str(llama), tmp_path / "out", tiny.recipe(tmp_path / "short.txt"))
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match=r"text blank\.txt: it is empty"):
        quantize(str(llama), tmp_path / "out", tiny.recipe(tmp_path / "blank.txt"))
    with pytest.raises(CalibrationError, match=r"gone\.txt: no such file, and not a known name"):
        quantize(str(llama), tmp_path / "out", tiny.recipe(tmp_path / "gone.txt"))
    assert not (tmp_path / "out").exists()


def test_unknown_keys_in_a_recipe(tmp_path: Path) -> None:
    whole = quant.Recipe().to_dict()
    assert recipe_from_dict(whole) == quant.Recipe()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"colour": 1}, r"recipe: unknown key 'colour'; known are spec, solver, calibration"),
        ({"solver": {**whole["solver"], "dump": 1}}, r"solver: unknown key 'dump'; known are damp, block"),
        ({"solver": {"kind": "Magic"}}, r"recipe: solver kind 'Magic' is unknown; this version has Feedback, Nearest"),
        ({"spec": {**whole["spec"], "bit": 3}}, r"recipe: spec .*unexpected keyword argument 'bit'"),
        ({"spec": {"layout": "cubic"}}, r"recipe: layout of .* is unknown; this version knows .*uniform"),
        ({"spec": {"layout": ["uniform"]}}, r"recipe: layout of .* is unknown; this version knows .*uniform"),
        ({"spec": {**whole["spec"], "bits": 9}}, r"bits is 9; a uniform grid takes a whole number from 1 to 8"),
        ({"calibration": {"texts": "x"}}, r"calibration: unknown key 'texts'; known are text, samples"),
        ({"calibration": {"samples": "many"}}, r"calibration: samples is 'many'; expected int"),
        ({"match": "both"}, r"recipe: match is 'both'; choose quantized, float"),
    ]
    for change, said in wrong:
        (tmp_path / "recipe.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(SettingsError, match=said):
            quant.load_recipe(str(tmp_path / "recipe.json"))
    for text in ("{", "[]", "[" * 100_000, "\xff"):
        (tmp_path / "recipe.json").write_bytes(text.encode("latin1"))
        with pytest.raises(SettingsError, match=r"recipe\.json: (cannot be read|expected a JSON object)"):
            quant.load_recipe(str(tmp_path / "recipe.json"))


def test_unknown_names_in_a_plan(llama: Path, tmp_path: Path) -> None:
    site = "model.layers.0.mlp.up_proj"
    wrong: list[tuple[Any, str]] = [
        (
            {"model.layers.7.mlp.up_proj": None},
            r"model\.layers\.7\.mlp\.up_proj is no site of this model and no pattern of one; --dry-run",
        ),
        (
            {site: {"layout": "uniform", "bit": 3}},
            r"model\.layers\.0\.mlp\.up_proj: spec .* unexpected keyword argument 'bit'",
        ),
        ({site: {"layout": "uniform", "bits": 0}}, r"model\.layers\.0\.mlp\.up_proj: bits is 0"),
        ({site: 4}, r"model\.layers\.0\.mlp\.up_proj: layout of 4 is unknown"),
        ({site: {"layout": {}}}, r"model\.layers\.0\.mlp\.up_proj: layout of .* is unknown"),
        ([site], r"expected a JSON object"),
    ]
    for plan, said in wrong:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(SettingsError, match=r"--plan .*plan\.json: " + said):
            quantize(
                str(llama), tmp_path / "out", quant.load_recipe("rtn"), settings=Settings(plan=tmp_path / "plan.json")
            )
    with pytest.raises(SettingsError, match=r"--plan .*gone\.json: cannot be read"):
        quantize(str(llama), tmp_path / "out", quant.load_recipe("rtn"), settings=Settings(plan=tmp_path / "gone.json"))
    (tmp_path / "plan.json").write_text("[" * 100_000)
    with pytest.raises(SettingsError, match=r"--plan .*plan\.json: cannot be read"):
        quantize(str(llama), tmp_path / "out", quant.load_recipe("rtn"), settings=Settings(plan=tmp_path / "plan.json"))
    assert not (tmp_path / "out").exists()


def test_a_plan_may_hold_patterns_and_must_suit_the_solver(llama: Path, tmp_path: Path) -> None:
    plan, settings = tmp_path / "plan.json", Settings(plan=tmp_path / "plan.json")
    six, three = {"layout": "uniform", "bits": 6}, {"layout": "uniform", "bits": 3}
    plan.write_text(json.dumps({"model.layers.1.mlp.up_proj": three, "*.mlp.*": six, "*.o_proj": None}))
    specs = prepare(str(llama), quant.load_recipe("rtn"), settings).plan.specs
    for name, spec in specs.items():
        wanted = 3 if name == "model.layers.1.mlp.up_proj" else 6 if ".mlp." in name else 4
        assert (spec is None) if name.endswith("o_proj") else (spec is not None and spec.to_dict()["bits"] == wanted)
    plan.write_text(json.dumps({"*.up_proj": {"layout": "trellis"}}))
    with pytest.raises(SettingsError, match=r"up_proj: round to nearest knows uniform grids, and this is a trellis"):
        quantize(str(llama), tmp_path / "out", "rtn", settings=Settings(plan=plan))  # each reads its file once
    assert not (tmp_path / "out").exists()


# --- the checkpoint


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", r"model\.layers\.0\.mlp\.up_proj\.scales is missing; Uniform\(.*\) of .*up_proj needs it"),
        ("extra", r"unexpected keys: \['model\.layers\.0\.mlp\.up_proj\.extra'\]; copy the checkpoint again"),
        ("truncated", r"lies at bytes \d+ to \d+, past the end: the file was cut short\); copy the checkpoint again"),
        ("altered", r"model\.layers\.0\.mlp\.up_proj: scales: 1 of \d+ are not finite"),
        ("gone", r"model\.safetensors: missing; copy the checkpoint again, whole"),
    ],
)
def test_a_checkpoint_that_is_not_whole(
    packed_llama: Path, tmp_path: Path, damage: str, said: str, sealed: bool
) -> None:
    """The checksums notice first; without them every damage still has its sentence."""
    folder = Path(shutil.copytree(packed_llama, tmp_path / "copied"))
    file, site = folder / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(file)
    if damage == "missing":
        del tensors[f"{site}.scales"]
    elif damage == "extra":
        tensors[f"{site}.extra"] = torch.zeros(3)
    elif damage == "altered":
        tensors[f"{site}.scales"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "gone":
        file.unlink()
    if not sealed:
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]["checksums"]
        (folder / "config.json").write_text(json.dumps(config))
    elif damage != "gone":
        said = r"model\.safetensors: its content is not what was written \(checksum differs\); copy it again"
    with pytest.raises(CheckpointError, match=said):
        quant.load(folder)


# --- the machine


@pytest.mark.parametrize("place", ["00001.safetensors", "model.safetensors", "README.md", "run.json"])
def test_a_full_disk(
    llama: Path, words: Path, packed_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whatever it was that did not fit: the finished blocks are kept, and with space the run goes on."""
    out, write = tmp_path / "out", shards.Atomic.write

    def full(self: shards.Atomic, data: bytes) -> None:
        if self.path.name == place:
            self.stream.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(shards.Atomic, "write", full)
        said = (
            rf"{place}: cannot be written \(No space left on device\); free some space, then run the same command with"
        )
        with pytest.raises(ResourceError, match=said):
            quantize(str(llama), out, tiny.recipe(words))
    assert not list(out.rglob("*.part"))
    assert not (out / place).exists()
    done = len(list((out / FOLDER).glob("0*.json")))
    assert done == {"run.json": 0, "00001.safetensors": 1}.get(place, 2)
    assert quantize(str(llama), out, tiny.recipe(words), mode="resume").report["resumed_blocks"] == done
    assert tiny.contents(out) == tiny.contents(packed_llama)


def test_a_folder_that_may_not_be_written(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    said = r"out: no folder can be made or read here \(Permission denied\); choose another --out"
    with pytest.raises(ResourceError, match=said):
        quantize(str(llama), tmp_path / "out", quant.load_recipe("rtn"))


@pytest.mark.parametrize("spill", [0, 2**30])
def test_a_limit_on_files(
    llama: Path, words: Path, packed_llama: Path, tmp_path: Path, started: Start, spill: int
) -> None:
    """The operating system itself refuses: the first time inside a block's file, or in activations that spill."""
    out = tmp_path / "out"
    child = started(quiet, _with_limit, resource.RLIMIT_FSIZE, 12_000, tmp_path / "said", str(llama), out, words, spill)
    child.join(PATIENCE)
    said = (tmp_path / "said").read_text()
    assert said.startswith("ResourceError: "), said
    assert "File too large" in said
    assert "with --resume: finished blocks are kept" in said
    quantize(str(llama), out, tiny.recipe(words), mode="resume")
    assert tiny.contents(out) == tiny.contents(packed_llama)


def test_out_of_memory(words: Path, tmp_path: Path, started: Start) -> None:
    """A Hessian of a gigabyte, where 600 MB are left."""
    model = make_from(
        "LlamaForCausalLM", vocab_size=128, hidden_size=16, intermediate_size=16384, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    tiny.add_tokenizer(tmp_path / "model")
    out, said = tmp_path / "out", tmp_path / "said"
    child = started(
        quiet, _with_limit, resource.RLIMIT_AS, 600 * 2**20, said, str(tmp_path / "model"), out, words, 2**30
    )
    child.join(PATIENCE)
    assert said.read_text().startswith("ResourceError: out of memory ("), said.read_text()
    assert (
        "lower --set calibration.batch_size=1 or --samples, then --restart; --dry-run predicts the" in said.read_text()
    )
    assert (out / FOLDER / "run.json").exists()


def _with_limit(which: int, size: int, said: Path, model: str, out: Path, words: Path, spill: int) -> None:
    recipe = tiny.recipe(words)
    if which == resource.RLIMIT_AS:
        with open("/proc/self/statm") as stream:
            size += int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(which, (size, resource.RLIM_INFINITY))
    try:
        quantize(model, out, recipe, settings=Settings(spill_bytes=spill))
    except BaseException as error:
        resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_while_loading(
    llama: Path, packed_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("transformers.LlamaForCausalLM.from_pretrained", fail)
        with pytest.raises(ResourceError, match=r"out of memory while it was loaded \(.*\); free some"):
            quant.load(packed_llama)
    monkeypatch.setattr("quant.pipeline._blocks", fail)
    with pytest.raises(ResourceError, match=r"out of memory \(.*\); lower --set calibration\.batch_size=1"):
        quantize(str(llama), tmp_path / "out", quant.load_recipe("rtn"))


def test_an_error_of_another_kind_is_not_hidden(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("quant.pipeline._blocks", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        quantize(str(llama), tmp_path / "out", quant.load_recipe("rtn"))
    assert not issubclass(RuntimeError, BitwrightError)


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, and with a network that does not answer."""
    said = (
        r"nobody/such-model: no folder of this name here, and the hub did not give it \(.+\)\. Give the path of a "
        r"local folder, or download the model where there is a network and copy it here\."
    )
    for failure in (None, OSError("We couldn't connect to the Hub"), ConnectionError("no route"), TimeoutError()):

        def refuse(*_: Any, failure: Any = failure, **__: Any) -> None:
            raise failure

        if failure is not None:
            monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(ModelError, match=said):
            quantize("nobody/such-model", tmp_path / "out", quant.load_recipe("rtn"))
        with pytest.raises(ModelError, match=said):
            quant.load("nobody/such-model")
    for odd in ("a b/c", "../gone", "~/gone", "three/part/name"):
        with pytest.raises(ModelError, match=r"(not a folder; give the folder|no folder of this name here)"):
            quantize(odd, tmp_path / "out", quant.load_recipe("rtn"))
    assert not (tmp_path / "out").exists()


def test_settings_from_python_are_checked_as_those_of_the_command_line() -> None:
    with pytest.raises(SettingsError, match="dtype 'int8': choose float32, float16 or bfloat16"):
        Settings(dtype="int8")
    with pytest.raises(SettingsError, match=r"device 'gpu': .*choose cpu"):
        Settings(device="gpu")
    with pytest.raises(SettingsError, match="at most 1,000,000 windows"):
        Calibration(samples=10**9)
