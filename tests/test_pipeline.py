"""The main job, end to end: a float checkpoint goes in, a packed one comes out, and it is what the run promised."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import quant
from quant import Recipe, Settings, blocks, load_recipe
from quant.calibration.statistics import Statistics
from quant.checkpoint.manifest import read_config, read_sites
from quant.errors import ModelError, SettingsError
from quant.eval.perplexity import encode, measure, resolve, rule_for
from quant.eval.subject import open_subject
from quant.kernels.spec import Spec, Uniform
from quant.prepare import prepare
from quant.recipe import override, with_spec
from quant.solvers.feedback import Feedback
from quant.solvers.nearest import Nearest
from quant.solvers.solution import Problem, Solution
from tests import tiny
from tests.architectures import ARCHITECTURES, VOCABULARY, make_from, save

CALIBRATION = ["calibration.samples=16", "calibration.sequence_length=256"]


def logits(model: Any, length: int = 12) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids)[0]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, read by the library alone."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    return tensors


def packed_bytes(folder: Path) -> int:
    """Bytes of all packed tensors in a folder, by their names in config.json."""
    tensors = stored(folder)
    sites = read_sites(read_config(folder)["quantization_config"], "test")
    return sum(tensors[name].nbytes for site in sites.values() for name in site.stored())


# --- every architecture


@pytest.mark.parametrize("kind", ["RobertaForMaskedLM", "MPNetModel", "BertModel"])
def test_positions_behind_a_row_for_padding_are_fewer(kind: str, words: Path, tmp_path: Path) -> None:
    """RoBERTa's 514 positions take 512 tokens."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    made = make_from(kind, **sizes, num_attention_heads=2, max_position_embeddings=34, pad_token_id=1)
    made.save_pretrained(tmp_path / "model")
    source, most = str(tiny.add_tokenizer(tmp_path / "model")), 34 if kind == "BertModel" else 32
    report = quant.quantize(source, tmp_path / "out", tiny.recipe(words, "calibration.sequence_length=1024")).report
    assert all(site["tokens"] == [4 * most] for site in report["sites"])
    for folder in (source, tmp_path / "out"):
        subject = open_subject(folder)
        assert subject.max_length == most
        with pytest.raises(SettingsError, match=f"takes at most {most} tokens"):
            rule_for(subject, most + 1, None, None)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_goes_in_and_the_same_function_comes_out(name: str, words: Path, tmp_path: Path) -> None:
    source = tiny.model(name, tmp_path / "model")
    result = quant.quantize(str(source), tmp_path / "out", tiny.recipe(words, bits=3))
    packed = quant.load(tmp_path / "out")
    plain = quant.load(tmp_path / "out", dequantize=True)
    expected = logits(plain)
    assert torch.isfinite(expected).all()
    # one sum in another order: roundoff of float32, a few layers deep
    torch.testing.assert_close(logits(packed), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    # each weight of the plain model is the original's, bit for bit, unless it belongs to a site; then it is near it
    original = type(plain).from_pretrained(source, dtype=torch.float32)
    sites = {site["site"] for site in result.report["sites"]}
    parameters = dict(plain.named_parameters())
    near = {key for key in parameters if key in sites or key.removesuffix(".weight") in sites}
    assert len(near) == len(sites)
    for key, weight in original.named_parameters():
        if key in near:
            gone = float((parameters[key].detach() - weight.detach()).norm() / weight.detach().norm())
            assert 0 < gone < 0.5, key
        else:
            assert torch.equal(parameters[key], weight), key

    # every matrix is a site or has its reason
    left = result.report["left_float"]
    for key, weight in original.named_parameters():
        assert weight.dim() < 2 or (key in near) != bool(left.get(key)), key
    assert result.report["bits"]["packed_bytes"] == packed_bytes(tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "bert", "qwen3-moe"])
def test_without_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round to nearest reads no text and needs no tokenizer."""
    source = save(name, tmp_path / "model")
    made, identity = list[int](), Statistics.identity
    free = classmethod(lambda _, features, device="cpu": made.append(features) or identity(features, device))
    monkeypatch.setattr(Statistics, "identity", free)
    result = quant.quantize(str(source), tmp_path / "out", with_spec(load_recipe("rtn"), bits=4, group_size=32))
    assert len(made) <= len(result.report["sites"]), "all experts of a stack share one"
    assert {site["error"] < 0.02 for site in result.report["sites"]} == {True}
    assert result.report["calibration"]["text"] == "none (data-free)"
    assert torch.isfinite(logits(quant.load(tmp_path / "out"))).all()


# --- the trained model: quality


class Judged:
    """The demonstration model by recipe and bits: the result and the held-out perplexity, made when first asked for."""

    def __init__(self, demo: Path, folder: Path) -> None:
        self.demo, self.folder = demo, folder
        self.found: dict[tuple[str, int], tuple[Any, float]] = {}

    def __call__(self, name: str, bits: int) -> tuple[Any, float]:
        if (name, bits) not in self.found:
            gptq = override(load_recipe("gptq"), CALIBRATION)
            recipes = {"gptq": gptq, "rtn": load_recipe("rtn"), "rtn-weighted": replace(gptq, solver=Nearest())}
            recipes["balanced"] = override(load_recipe("balanced"), CALIBRATION)
            recipe = with_spec(recipes[name], bits=bits, group_size=None if name == "balanced" else 64)
            result = quant.quantize(str(self.demo), self.folder / f"{name}-{bits}", recipe)
            subject = open_subject(str(result.out), "cpu", "float32")
            encoded = encode(subject.tokenizer(), resolve("python-docs"))
            self.found[name, bits] = (result, measure(subject, encoded, rule_for(subject, 256, None, 32)).token)
        return self.found[name, bits]


@pytest.fixture(scope="module")
def judged(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return Judged(demo, tmp_path_factory.mktemp("judged"))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_beats_round_to_nearest(judged: Judged, bits: int) -> None:
    assert judged("gptq", bits)[1] < judged("rtn", bits)[1]


def test_gptq_loses_less_at_every_site(judged: Judged) -> None:
    """Its error on the calibration inputs, against rounding whose grids know the same inputs."""
    reports = (judged(name, 3)[0].report for name in ("gptq", "rtn-weighted"))
    gptq, nearest = ({site["site"]: site["error"] for site in report["sites"]} for report in reports)
    assert len(gptq) == 28
    assert [name for name in gptq if not gptq[name] < nearest[name]] == []


def test_a_trellis_loses_half_of_what_a_grid_loses_in_fewer_bits(judged: Judged, demo: Path) -> None:
    (trellis, found), (grid, other) = judged("balanced", 2), judged("gptq", 2)
    subject = open_subject(str(demo), "cpu", "float32")
    base = measure(subject, encode(subject.tokenizer(), resolve("python-docs")), rule_for(subject, 256, None, 32)).token
    assert trellis.written.measured_bits < 2.1 < grid.written.measured_bits
    assert math.log(found / base) < 0.5 * math.log(other / base)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_bytes_are_what_the_specs_promise(judged: Judged, demo: Path, bits: int) -> None:
    result, _ = judged("rtn", bits)
    spec, bytes_, weights = Uniform(bits, 64), 0, 0
    tensors = stored(result.out)
    float_tensors = stored(demo)
    for site in result.report["sites"]:
        shape = tuple(site["shape"])
        assert float_tensors[f"{site['site']}.weight"].shape == shape
        on_disk = sum(tensors[f"{site['site']}.{part}"].nbytes for part in ("weight", "scales", "zeros"))
        assert on_disk == spec.nbytes(shape) == site["nbytes"]
        bytes_, weights = bytes_ + on_disk, weights + shape[0] * shape[1]
    assert len(result.report["sites"]) == 4 * 7
    figures = result.report["bits"]
    assert figures["packed_bytes"] == bytes_
    assert figures["weights"] == weights
    assert figures["promised"] == figures["measured"] == 8 * bytes_ / weights
    assert figures["promised"] == {4: 4.3125, 3: 3.3125, 2: 2.3072916666666665}[bits]
    assert result.written.files == {"model.safetensors": (result.out / "model.safetensors").stat().st_size}
    assert json.loads((result.out / "report.json").read_text())["bits"] == figures


# --- what the settings do


def test_the_same_run_gives_the_same_bytes(llama: Path, words: Path, packed_llama: Path, tmp_path: Path) -> None:
    quant.quantize(str(llama), tmp_path / "again", tiny.recipe(words))
    assert tiny.contents(tmp_path / "again") == tiny.contents(packed_llama)
    assert set(tiny.contents(packed_llama)) >= {"model.safetensors", "config.json", "recipe.json", "README.md"}


def test_activations_on_disk_give_the_same_bytes(
    llama: Path, words: Path, packed_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spilled: list[int] = []
    from quant.calibration import activations

    real = activations.save_file
    monkeypatch.setattr(activations, "save_file", lambda tensors, path: (spilled.append(1), real(tensors, path)))
    quant.quantize(str(llama), tmp_path / "out", tiny.recipe(words), settings=Settings(spill_bytes=0))
    # the first block's outputs on two batches and the probe, of the last the probe's; and both blocks' attention's
    assert len(spilled) == (3 + 1) + (3 + 3)
    assert tiny.contents(tmp_path / "out") == tiny.contents(packed_llama)


def test_sites_solved_together_get_the_same_bytes(
    llama: Path, words: Path, packed_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v, and gate and up, are one matrix of more rows."""
    rows, real = list[int](), Feedback.solve_all

    def counted(self: Feedback, problems: Sequence[Problem], spec: Spec) -> list[Solution]:
        rows.extend(len(problem.weight) for problem in problems)
        return real(self, problems, spec)

    monkeypatch.setattr(Feedback, "solve_all", counted)
    quant.quantize(str(llama), tmp_path / "together", tiny.recipe(words))
    assert rows == 2 * [64 + 32 + 32, 64, 96 + 96, 64]
    monkeypatch.setattr(blocks, "TOGETHER", 0)
    quant.quantize(str(llama), tmp_path / "apart", tiny.recipe(words))
    assert len(rows) == 2 * 4 + 2 * 7
    assert tiny.contents(tmp_path / "apart") == tiny.contents(tmp_path / "together") == tiny.contents(packed_llama)


def test_its_own_recipe_and_plan_rerun_it(llama: Path, packed_llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(packed_llama / "recipe.json"))
    quant.quantize(str(llama), tmp_path / "out", recipe, settings=Settings(plan=packed_llama / "plan.json"))
    mine, other = (tiny.contents(folder, people=False) for folder in (tmp_path / "out", packed_llama))
    assert mine == other


def test_a_dotted_setting_reaches_the_solver(llama: Path, words: Path, packed_llama: Path, tmp_path: Path) -> None:
    quant.quantize(str(llama), tmp_path / "out", tiny.recipe(words, "solver.damp=1000.0"))
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["solver"]["damp"] == 1000.0
    mine, other = stored(tmp_path / "out"), stored(packed_llama)
    assert any(not torch.equal(mine[name], other[name]) for name in mine)
    with pytest.raises(SettingsError, match=r"--set solver\.dump=1: Feedback has no 'dump'; it has damp, block"):
        tiny.recipe(words, "solver.dump=1")


def test_skip_and_only(llama: Path, words: Path, tmp_path: Path) -> None:
    recipe = replace(tiny.recipe(words), only=("*.mlp.*",), skip=("*.1.mlp.down_proj",))
    report = quant.quantize(str(llama), tmp_path / "out", recipe).report
    mlp = "model.layers.{}.mlp.{}_proj"
    wanted = {mlp.format(0, p) for p in ("gate", "up", "down")} | {mlp.format(1, p) for p in ("gate", "up")}
    assert {site["site"] for site in report["sites"]} == wanted
    left = report["left_float"]
    assert left["model.layers.1.mlp.down_proj.weight"] == "skipped by --skip *.1.mlp.down_proj"
    assert left["model.layers.0.self_attn.q_proj.weight"] == "not selected by --only"
    assert left["model.embed_tokens.weight"] == "an embedding"
    assert left["lm_head.weight"] == "outside the blocks (a head or a projection)"
    assert set(read_sites(read_config(tmp_path / "out")["quantization_config"], "")) == wanted
    assert torch.isfinite(logits(quant.load(tmp_path / "out"))).all()
    with pytest.raises(ModelError, match=r"the pattern '\*\.mpl' matches no site; list the sites with --dry-run"):
        prepare(str(llama), replace(recipe, skip=("*.mpl",)))


def test_a_plan_file(llama: Path, words: Path, packed_llama: Path, tmp_path: Path) -> None:
    plan = {
        "model.layers.0.self_attn.q_proj": None,
        "model.layers.0.mlp.up_proj": {"layout": "uniform", "bits": 2, "group_size": 16, "symmetric": True},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    settings = Settings(plan=tmp_path / "plan.json")
    report = quant.quantize(str(llama), tmp_path / "out", tiny.recipe(words), settings=settings).report
    sites = {site["site"]: site for site in report["sites"]}
    assert len(sites) == 13
    assert "model.layers.0.self_attn.q_proj" not in sites
    assert report["left_float"]["model.layers.0.self_attn.q_proj"] == "the plan keeps it float"
    assert sites["model.layers.0.mlp.up_proj"]["bits_per_weight"] == 2 + 16 / 16
    assert sites["model.layers.0.mlp.up_proj"]["nbytes"] == 96 * (64 * 2 // 8 + 4 * 2)
    assert sites["model.layers.0.mlp.down_proj"]["nbytes"] == 64 * (96 * 4 // 8 + 3 * 2 + 2)
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written["model.layers.0.self_attn.q_proj"] is None
    assert written["model.layers.0.mlp.up_proj"]["bits"] == 2
    float_weight = stored(llama)["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(stored(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"], float_weight)


def test_true_sequential_order_is_a_choice(llama: Path, words: Path, packed_llama: Path, tmp_path: Path) -> None:
    """At once, only the first stage of the first block sees what it sees in turn."""
    quant.quantize(str(llama), tmp_path / "out", tiny.recipe(words, "sequential=false"))
    mine, other = stored(tmp_path / "out"), stored(packed_llama)
    same = {name for name in mine if torch.equal(mine[name], other[name])}
    first = {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"}
    assert {name for name in same if name.endswith("_proj.weight")} == first


@pytest.mark.parametrize("sequential", ["true", "false"])
def test_matching_the_float_path(llama: Path, words: Path, tmp_path: Path, sequential: str) -> None:
    """The first stage's inputs are those of the float path; from then on the two aims part."""
    order = f"sequential={sequential}"
    quant.quantize(str(llama), tmp_path / "out", tiny.recipe(words, order, "match=float"))
    quant.quantize(str(llama), tmp_path / "own", tiny.recipe(words, order))
    mine, other = stored(tmp_path / "out"), stored(tmp_path / "own")
    same = {name for name in mine if torch.equal(mine[name], other[name])}
    first = {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"}
    if sequential == "false":  # the whole first block is solved before its outputs part
        first |= {f"model.layers.0.{p}_proj.weight" for p in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    assert {name for name in same if name.endswith("_proj.weight")} == first
    assert torch.isfinite(logits(quant.load(tmp_path / "out"))).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_computation(llama: Path, words: Path, tmp_path: Path, dtype: str) -> None:
    result = quant.quantize(str(llama), tmp_path / "out", tiny.recipe(words), settings=Settings(dtype=dtype))
    assert result.report["verification"]["worst_difference"] <= 0.1 * result.report["verification"]["largest_logit"]
    assert result.report["compute"]["dtype"] == dtype
    original = stored(llama)
    kept = {name: t for name, t in stored(tmp_path / "out").items() if not name.rpartition(".")[0].endswith("_proj")}
    assert len(kept) == 7  # the embedding, the head and five norms
    for name, tensor in kept.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, original[name]), name


# --- mixtures of experts


def test_experts_that_saw_few_tokens_are_named(words: Path, tmp_path: Path) -> None:
    source = tiny.model("mixtral", tmp_path / "model")
    short = tiny.recipe(words, "calibration.samples=1", "calibration.sequence_length=2", bits=3)
    report = quant.quantize(str(source), tmp_path / "out", short).report
    stacks = [site for site in report["sites"] if site["experts"]]
    assert len(stacks) == 4
    for site in stacks:
        assert len(site["tokens"]) == 8
        assert sum(site["tokens"]) == 2 * 2  # two tokens, two experts each
        for expert, tokens in enumerate(site["tokens"]):
            fallback = f"expert {expert}: saw {tokens} tokens, its stack's mean Hessian counted as 256 tokens beside"
            assert any(note.startswith(fallback) for note in site["notes"])
    assert {site["site"].rpartition(".")[2] for site in stacks} == {"gate_up_proj", "down_proj"}
    assert report["left_float"]["model.layers.0.mlp.gate.weight"].startswith("a matrix of MixtralTopKRouter")


def test_an_expert_s_token_is_one_that_was_sent_to_it(words: Path, tmp_path: Path) -> None:
    """Llama 4 multiplies every expert by every token, those of the others as zeros."""
    settings = {"hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 48, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8}
    settings |= {"interleave_moe_layer_step": 1, "attention_chunk_size": 64, "num_experts_per_tok": 1}
    model = make_from("Llama4ForCausalLM", vocab_size=VOCABULARY, pad_token_id=0, **settings)
    model.save_pretrained(tmp_path / "model")
    tiny.add_tokenizer(tmp_path / "model")
    report = quant.quantize(str(tmp_path / "model"), tmp_path / "out", tiny.recipe(words)).report
    stacks = [site for site in report["sites"] if site["experts"]]
    assert len(stacks) == 4
    for site in stacks:
        assert sum(site["tokens"]) == 4 * 32
        assert any("its stack's mean Hessian counted as 256 tokens" in note for note in site["notes"])


def test_experts_do_not_match_the_float_path_and_say_so(words: Path, tmp_path: Path) -> None:
    source = tiny.model("mixtral", tmp_path / "model")
    report = quant.quantize(str(source), tmp_path / "out", tiny.recipe(words, "match=float")).report
    said = {site["site"]: site["notes"][:1] for site in report["sites"]}
    note = "matches its own outputs: the float path may send a token to other experts"
    assert said == {site["site"]: [note] if site["experts"] else [] for site in report["sites"]}


def test_experts_with_enough_tokens_need_no_prior(words: Path, tmp_path: Path) -> None:
    source = tiny.model("mixtral", tmp_path / "model")
    report = quant.quantize(str(source), tmp_path / "out", tiny.recipe(words, "experts.minimum_tokens=1")).report
    for site in report["sites"]:
        assert all("saw 0 tokens" in note for note in site["notes"] if "saw" in note)
        if site["experts"]:
            assert sum(site["tokens"]) == 4 * 32 * 2
        else:
            assert site["tokens"] == [4 * 32]


def test_a_stack_that_saw_nothing_is_rounded_without_data() -> None:
    from quant.blocks import BlockSolver

    solver = BlockSolver.__new__(BlockSolver)
    solver.recipe = Recipe()
    nothing = {expert: Statistics(torch.zeros(4, 4), 0) for expert in range(3)}
    mended, notes = solver._with_priors(nothing)
    assert notes == ("no expert saw a token: rounded without data",)
    assert all(torch.equal(statistics.hessian, torch.eye(4)) for statistics in mended.values())
    assert len({id(statistics) for statistics in mended.values()}) == 1, "of 128 experts, 128 would be gigabytes"


# --- a progress that watches


def test_progress_is_told_everything_in_order(llama: Path, words: Path, tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []

    class Watcher(quant.pipeline.Progress):
        def begin(self, blocks: int, weights: int, done: int) -> None:
            told.append(("begin", blocks, weights, done))

        def block(self, index: int, name: str) -> None:
            told.append(("block", index, name))

        def site(self, solved: Any) -> None:
            told.append(("site", solved.site.name))

        def advanced(self, index: int, weights: int) -> None:
            told.append(("advanced", index, weights))

        def step(self, what: str) -> None:
            told.append(("step", what))

    result = quant.quantize(str(llama), tmp_path / "out", tiny.recipe(words), progress=Watcher())
    weights = result.report["bits"]["weights"]
    assert [kind for kind, *_ in told] == (
        ["step", "step", "begin"] + 2 * (["block"] + 7 * ["site"] + ["advanced"]) + ["step", "step"]
    )
    assert told[2] == ("begin", 2, weights, 0)
    assert sum(entry[2] for entry in told if entry[0] == "advanced") == weights
    assert [site["site"] for site in result.report["sites"]] == [e[1] for e in told if e[0] == "site"]
