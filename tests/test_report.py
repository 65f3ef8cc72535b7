"""report.html and the model card: right, safe with any name, and the same for the same run."""

from __future__ import annotations

import copy
import json
import random
import re
import shlex
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import quant.cli
import quant.eval.cli
from quant import Recipe, load_recipe
from quant.blocks import Solved
from quant.checkpoint.card import add_evaluation, card
from quant.checkpoint.provenance import command, origin
from quant.checkpoint.report import render
from quant.checkpoint.words import spec_words
from quant.errors import CheckpointError
from quant.kernels.layouts import PackedUniform
from quant.kernels.spec import Rotated, Uniform
from quant.models.source import Source
from quant.models.walk import Site
from quant.recipe import override, shipped_recipes, with_spec
from tests import tiny

pytestmark = pytest.mark.usefixtures("rendered")

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>`|$\\frac{--># [a](b)\x1b[31m\x00\n\u202e\u4e2d'


@pytest.fixture
def report(packed_llama: Path) -> dict[str, Any]:
    return json.loads((packed_llama / "report.json").read_text())


class Page(HTMLParser):
    """What a page is made of: tags with their attributes, and whether they nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def page(report: dict[str, Any]) -> Page:
    """The rendered page, which must nest, run nothing and refer to nothing outside itself."""
    found = Page(render(report))
    assert found.open == []
    for tag, attributes in found.tags:
        assert tag not in ("script", "link", "iframe", "object", "a", "base", "form", "svg")
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert (attributes.get("src") or "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,")
    return found


# --- report.html


def test_the_page_answers_the_questions(packed_llama: Path, report: dict[str, Any]) -> None:
    html = (packed_llama / "report.html").read_text(encoding="utf-8")
    found = page(report)
    assert [tag for tag, _ in found.tags].count("img") == 4
    for fact in (
        f"{report['bits']['measured']:.5g} bits",
        report["calibration"]["sha256"],
        report["command"],
        "outside the blocks",
        "GPTQ (arXiv 2210.17323)",
        *(site["site"] for site in report["sites"]),
        *report["versions"].values(),
    ):
        assert fact in found.words
    assert "prefers-color-scheme: dark" in html


def test_many_sites_and_many_experts(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """150 blocks of a stack of 128 experts each, at mixed bits: all is shown, and the table of sites has a limit."""
    source = random.Random(0)
    shape = (64 * 128, 64)
    report["blocks"] = [{"name": f"model.layers.{b}", "seconds": 3.0} for b in range(150)]
    report["sites"] = []
    for block in report["blocks"]:
        spec = Uniform(source.choice([2, 3, 4]), 32)
        site = {"site": f"{block['name']}.mlp.experts", "block": block["name"], "spec": spec.to_dict(), "shape": shape}
        site |= {"bits_per_weight": spec.bits_per_weight(shape), "nbytes": spec.nbytes(shape), "experts": 128}
        notes = [f"expert {expert}: saw {expert} tokens" for expert in range(128)]
        report["sites"].append(
            {**site, "error": source.lognormvariate(-4, 1), "tokens": [*range(128)], "notes": notes, "seconds": 0.1}
        )
    found = page(report)
    assert "expert 0: saw 0 tokens; and 127 more in report.json" in found.words
    assert "0 to 127" in found.words
    monkeypatch.setattr("quant.checkpoint.report.MOST_ROWS", 100)
    assert 100 < [tag for tag, _ in page(report).tags].count("tr") < 115


def test_one_site_none_and_errors_of_every_size(report: dict[str, Any]) -> None:
    report["blocks"], report["sites"] = report["blocks"][:1], report["sites"][:1]
    for error in (0.0, 1e-30, 0.02, 3.0, None):
        report["sites"][0]["error"] = error
        assert page(report).words
    assert "its error is not finite" in page(report).words
    report["recipe"]["calibration"] = None
    assert "no text was read" in page(report).words
    report["sites"], report["left_float"], report["files"] = [], {}, {}
    assert page(report).words
    assert card(report)


def test_no_name_escapes(report: dict[str, Any]) -> None:
    name = report["sites"][0]["site"] = report["sites"][0]["block"] = HOSTILE
    report["blocks"][0]["name"] = name
    for site in report["sites"][1:]:
        site["block"], site["notes"] = name, [HOSTILE]
    report["left_float"] = {HOSTILE: HOSTILE, "x" * 10_000: HOSTILE}
    report["model"]["name"] = report["calibration"]["text"] = report["command"] = HOSTILE
    report["source"] |= {"architecture": HOSTILE, "revision": HOSTILE, "license": HOSTILE, "base_model": HOSTILE}
    report["versions"] = {HOSTILE: HOSTILE}
    report["machine"]["cpu"] = report["compute"]["device"] = HOSTILE
    report["recipe"]["solver"][HOSTILE] = HOSTILE
    report["files"] = {HOSTILE: 1}
    assert not any(sign in page(report).words for sign in "\x1b\x00")
    written = card(report)
    assert "\x1b" not in written
    front, _, body = written.removeprefix("---\n").partition("---\n\n")
    assert yaml.safe_load(front)["license"] == HOSTILE
    outside = re.sub(r"```bash\n.*\n```", "", body).split("`")[::2]
    assert not any("<script" in part or "](b)" in part for part in outside)


def test_low_quality_is_said_first(report: dict[str, Any]) -> None:
    report["sites"][0]["error"] = 0.7
    report["sites"][1]["tokens"] = [3]
    for said in (page(report).words, card(report)):
        assert "more than half of the output's energy is lost" in said
        assert "3 tokens for 64 inputs: give more samples" in said


def test_an_infinite_error_is_valid_json() -> None:
    site, spec = Site("a", "linear", 4, 4), Uniform(4, 4)
    packed = PackedUniform.__new__(PackedUniform)
    assert Solved(site, spec, packed, float("inf"), (1,), (), 0.0).record()["error"] is None


def test_specs_in_words() -> None:
    assert spec_words(Uniform(3, 64).to_dict()) == "3-bit, groups of 64, asymmetric"
    words = spec_words(Uniform(8, -1, symmetric=True, scale_dtype="bfloat16").to_dict())
    assert words == "8-bit, whole rows, symmetric, bfloat16 scales"
    assert spec_words({"layout": "cubic", "bits": 2}) == "cubic (bits 2)"
    assert spec_words(Rotated().to_dict()) == "2-bit trellis, window 13, code mac, 256 rows, rotated"


# --- the command


def run(recipe: Recipe, plan: dict[str, Any]) -> dict[str, Any]:
    compute = {"device": "cpu", "dtype": "float32", "threads": 1}
    return {"model": {"name": "./my models/it's"}, "recipe": recipe.to_dict(), "plan": plan, "compute": compute}


def recipes() -> Iterator[Recipe]:
    yield from (load_recipe(name) for name in shipped_recipes())
    yield with_spec(load_recipe("gptq"), bits=3, group_size=-1, symmetric=True)
    yield with_spec(load_recipe("vq4dit"), bits=2.25)
    yield override(load_recipe("rtn"), ["solver.search.steps=5", "spec.scale_dtype=bfloat16"])
    texts = ["calibration.text=my notes.txt", "calibration.samples=7", "calibration.seed=3", "calibration.batch_size=1"]
    yield override(load_recipe("gptq"), [*texts, "solver.damp=0.05", "solver.search.narrowest=0.5", "match=float"])
    yield override(load_recipe("gptq"), ['only=["*.q_proj", "*[ab]"]', 'skip=["*down*"]', "sequential=false"])


class Asked(Exception):
    pass


@pytest.mark.parametrize("recipe", list(recipes()))
def test_the_command_asks_for_the_same(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def prepare(*arguments: Any) -> None:
        asked.extend(arguments)
        raise Asked

    monkeypatch.setattr(quant.cli, "prepare", prepare)
    words = shlex.split(command(run(recipe, {"a": None})))
    assert words[0] == "quantize"
    result = CliRunner().invoke(quant.cli.app, words[1:])
    assert isinstance(result.exception, Asked), result.output
    model, given, settings, *_ = asked
    assert (model, given) == ("./my models/it's", recipe)
    assert (settings.device, settings.dtype, settings.threads) == ("cpu", "float32", 1)
    assert settings.plan == Path("plan.json")


def test_a_recipe_far_from_all_shipped_ones_names_its_file() -> None:
    assert "--recipe recipe.json --bits 4 --device" in command(run(Recipe(calibration=None), {}))


# --- the card


def test_the_card_says_how_it_was_made(packed_llama: Path, report: dict[str, Any]) -> None:
    written = (packed_llama / "README.md").read_text(encoding="utf-8")
    assert written == card(report)
    front = yaml.safe_load(written.split("---\n")[1])
    assert front["tags"] == ["bitwright", "quantized", "4-bit"]
    assert front["quantization"]["bits_per_weight"] == pytest.approx(report["bits"]["measured"], rel=1e-4)
    assert "license" not in front
    total = sum((packed_llama / name).stat().st_size for name in report["files"])
    for fact in (
        report["command"],
        report["calibration"]["sha256"],
        "AutoModelForCausalLM",
        "license of the base model | `unknown",
        f"{report['bits']['measured']:.5g} per quantized weight",
        f"{total:,} bytes",
    ):
        assert fact in written


def test_the_card_knows_nothing_of_the_run(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    other["seconds"], other["peak_rss_bytes"], other["resumed_blocks"] = 1e6, 1, 1
    other["machine"] = {"cpu": "another", "cores": 96, "threads": 1, "gpu": "H", "platform": "Elsewhere"}
    other["verification"]["worst_difference"] = 0.5
    for part in (*other["blocks"], *other["sites"]):
        part["seconds"] = 123.0
    assert card(other) == card(report)


def test_the_card_says_what_a_solver_uses_and_how_many_bits_codes_have(report: dict[str, Any]) -> None:
    assert "stretches" in card(report)  # how grids are searched
    trellis = copy.deepcopy(report)
    spec = {"layout": "rotated", "base": {"layout": "trellis", "bits": 2, "window": 13, "code": "mac", "length": 256}}
    for name in trellis["plan"]:
        trellis["plan"][name] = spec
    for number, site in enumerate(trellis["sites"]):
        site["spec"] = {**spec, "base": {**spec["base"], "bits": 2 + number % 2}}
    assert "stretches" not in card(trellis)
    assert "| bits of each code | 2 or 3 |" in card(trellis)
    trellis["source"]["library"] = "diffusers"
    assert "judge it on your own prompts" in card(trellis)


def figures(perplexity: float) -> dict[str, Any]:
    settings = {"text": "python-docs", "text_sha256": "ab", "window_rule": "non-overlapping", "window": 512}
    return {
        "against": "models/original",
        "perplexity": {"token": perplexity, "bits_per_byte": 1.5, "word": None},
        "original": {"token": 20.0, "bits_per_byte": 1.25, "word": None},
        "divergence": {"kl": 0.0123, "top1": 0.9},
        "hidden": None,
        "settings": {**settings, "dtype": "float32"},
    }


def test_figures_come_into_the_card_and_are_replaced(packed_llama: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((packed_llama / "README.md").read_text() + "\nA word of my own.\n")
    add_evaluation(tmp_path, figures(21.5))
    first = readme.read_text()
    assert "| perplexity per token | 21.5 | 20 |" in first
    assert "| same first choice as the original | 90.00% |  |" in first
    assert "per word" not in first
    assert "Not evaluated yet" not in first
    add_evaluation(tmp_path, figures(22.5))
    assert readme.read_text() == first.replace("21.5", "22.5")
    assert readme.read_text().endswith("A word of my own.\n")
    for windows, said in ((2, True), (1, False)):  # a text of one window is read whole
        cut = figures(22.5)
        cut["settings"]["max_windows"], cut["perplexity"]["windows"] = 2, windows
        add_evaluation(tmp_path, cut)
        assert ("only the first 2 non-overlapping windows" in readme.read_text()) == said
    readme.write_text("# Somebody's own card\n")
    add_evaluation(tmp_path, figures(22.5))
    add_evaluation(tmp_path, figures(23.5))
    assert readme.read_text().count("## Evaluation") == 1
    assert "23.5" in readme.read_text()


def test_quant_eval_puts_its_figures_into_the_card(
    packed_llama: Path, llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant.eval.cli, "_calm", lambda: None)
    mine = shutil.copytree(packed_llama, tmp_path / "mine")
    before = (llama / "README.md").exists()
    settings = ["--against", str(llama), "--text", str(words), "--max-windows", "1", "--no-generate", "--card"]
    result = CliRunner().invoke(quant.eval.cli.app, [str(mine), str(llama), *settings])
    assert result.exit_code == 0, result.output
    written = (mine / "README.md").read_text()
    assert "| KL divergence to the original" in written
    assert "only the first 1 non-overlapping windows of" in written
    assert f"model card: {mine}/README.md" in result.output.replace("\n", "")
    assert (llama / "README.md").exists() == before


def test_figures_need_a_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"README\.md: cannot be read \(No such file"):
        add_evaluation(tmp_path, figures(1.0))


@pytest.mark.parametrize(
    ("readme", "known"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("---\nlicense: [unclosed\n---\n", None),
        ("no front matter", None),
        ("\xff\xfe", None),
    ],
)
def test_the_licence_of_the_base_model(
    readme: str, known: str | None, llama: Path, tmp_path: Path, report: dict[str, Any]
) -> None:
    folder = tmp_path / "models--some--name" / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    for file in llama.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "README.md").write_bytes(readme.encode("latin-1"))
    found = origin(Source(folder, "some/name"))
    assert found["license"] == known
    assert (found["base_model"], found["revision"]) == ("some/name", "0123456789" * 4)
    report["source"] |= found
    front = yaml.safe_load(card(report).split("---\n")[1])
    assert front.get("license") == known
    assert (front["base_model"], front["base_model_relation"]) == ("some/name", "quantized")


# --- whole runs


def test_experts_are_summed_up(packed_moe: Path) -> None:
    report = json.loads((packed_moe / "report.json").read_text())
    assert any(len(site["tokens"]) == 8 for site in report["sites"])
    assert "more in report.json" in page(report).words


def test_a_resumed_run_counts_its_blocks(llama: Path, words: Path, tmp_path: Path) -> None:
    class Stop(quant.pipeline.Progress):
        def advanced(self, index: int, weights: int) -> None:
            raise KeyboardInterrupt

    recipe = tiny.recipe(words)
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(llama), tmp_path / "out", recipe, progress=Stop())
    report = quant.quantize(str(llama), tmp_path / "out", recipe, mode="resume").report
    assert report["resumed_blocks"] == 1
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert "1 from an earlier run" in page(report).words
