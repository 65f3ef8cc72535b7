"""report.html, the model card and their words: right, safe with any name, and the same for the same run."""

from __future__ import annotations

import copy
import json
import random
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import quant.cli
from quant import Recipe, load_recipe
from quant.checkpoint.card import add_evaluation, card
from quant.checkpoint.provenance import command, origin
from quant.checkpoint.report import render
from quant.checkpoint.summary import grouped, kinds, plain, spec_words
from quant.errors import CheckpointError
from quant.kernels.spec import Uniform
from quant.models.source import Source
from quant.recipe import override, shipped_recipes, with_spec
from tests import tiny

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>`|$\\frac{--># [a](b)\x1b[31m\x00\n\u202e\u4e2d'
COMPUTE = {"device": "cpu", "dtype": "float32", "threads": 1}


@pytest.fixture
def report(packed_llama: Path) -> dict[str, Any]:
    return json.loads((packed_llama / "report.json").read_text())


class Page(HTMLParser):
    """What a page is made of: tags with their attributes, in order, and whether they nest."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page(report: dict[str, Any]) -> Page:
    """The rendered page, which must nest, run one script of ours and refer to nothing outside itself."""
    html = render(report)
    found = Page(html)
    assert found.open == []
    assert [tag for tag, _ in found.tags].count("script") == 1
    for tag, attributes in found.tags:
        assert tag not in ("img", "link", "iframe", "object", "a", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href", "src"):
            assert (attributes.get(name) or "#").startswith("#")
    assert html.count("http") == html.count('="http://www.w3.org/') + html.count("http-equiv")
    return found


def large(report: dict[str, Any], blocks: int, experts: int = 0) -> dict[str, Any]:
    """The same report for a model of so many blocks of seven sites, with mixed bits and some notes."""
    source = random.Random(0)
    made = copy.deepcopy(report)
    made["blocks"] = [{"name": f"model.layers.{b}", "seconds": 3.0} for b in range(blocks)]
    made["sites"] = []
    for b in range(blocks):
        for kind in "qkvogud":
            spec = Uniform(source.choice([2, 3, 4]), 32)
            shape = [64 * max(1, experts), 64]
            tokens = [source.randint(0, 900) for _ in range(max(1, experts))]
            few = [
                f"expert {e}: saw {t} tokens, a prior counted as 256 tokens" for e, t in enumerate(tokens) if t < 256
            ]
            made["sites"].append(
                {
                    "block": f"model.layers.{b}",
                    "site": f"model.layers.{b}.mlp.{kind}_proj",
                    "spec": spec.to_dict(),
                    "shape": shape,
                    "experts": experts,
                    "bits_per_weight": spec.bits_per_weight((shape[0], shape[1])),
                    "nbytes": spec.nbytes((shape[0], shape[1])),
                    "error": source.lognormvariate(-4, 1),
                    "tokens": tokens,
                    "notes": few
                    if experts
                    else ["Hessian not positive definite with damp 0.01; 0.1 used"] * (b % 9 == 0),
                    "seconds": 0.1,
                }
            )
    return made


# --- report.html


def test_the_page_answers_the_questions(packed_llama: Path, report: dict[str, Any]) -> None:
    html = (packed_llama / "report.html").read_text(encoding="utf-8")
    said = "".join(page(report).words)
    assert html.count("<svg") == 3
    for fact in (
        f"{report['bits']['measured']:.5g} bits",
        report["calibration"]["sha256"],
        report["command"],
        "outside the blocks",
        "GPTQ (arXiv 2210.17323)",
        *(site["site"] for site in report["sites"]),
        *report["versions"].values(),
    ):
        assert fact in said
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_a_thousand_sites_and_ten_thousand_experts(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    report = large(report, 150)
    found = page(report)
    assert "1,050 sites" in "".join(found.words)
    assert "Bits over depth" in found.words
    monkeypatch.setattr("quant.checkpoint.report.MOST_ROWS", 500)
    assert 500 < len([tag for tag, _ in page(report).tags if tag == "tr"]) < 550
    moe = page(large(report, 12, experts=128))
    assert any("alike" in words for words in moe.words)
    assert any("median" in words and " to " in words for words in moe.words)


def test_one_site_none_and_errors_of_every_size(report: dict[str, Any]) -> None:
    report["blocks"], report["sites"] = report["blocks"][:1], report["sites"][:1]
    for error in (0.0, 1e-30, 0.02, 3.0, float("inf"), float("nan")):
        report["sites"][0]["error"] = error
        assert page(report).words
    report["recipe"]["calibration"] = None
    assert "no text was read" in "".join(page(report).words)
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
    report["source"] |= {"architecture": HOSTILE, "revision": HOSTILE}
    report["versions"] = {HOSTILE: HOSTILE}
    report["machine"]["cpu"] = report["compute"]["device"] = HOSTILE
    report["recipe"]["solver"][HOSTILE] = HOSTILE
    report["files"] = {HOSTILE: 1}
    found = page(report)
    assert not any("\x1b" in words or "\x00" in words for words in found.words)
    written = card(report)
    outside = re.sub(r"```bash\n.*\n```|\\[`<\]]", "", written)  # neither fenced nor escaped
    assert not any("<script" in part or "](b)" in part for part in outside.split("`")[::2])
    assert "\x1b" not in written
    assert yaml.safe_load(written.split("---\n")[1])["library_name"] == "transformers"


def test_low_quality_is_said_first(report: dict[str, Any]) -> None:
    report["sites"][0]["error"] = 0.7
    report["sites"][1]["tokens"] = [3]
    said = " ".join(page(report).words)
    assert "more than half of the output's energy is lost" in said
    assert "3 tokens for 64 inputs: give more samples" in said


# --- words


def test_kinds_are_named_by_what_tells_them_apart() -> None:
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "moe.experts.0.up", "moe.experts.17.up"]
    sites = [{"site": f"h.{b}.{name}", "block": f"h.{b}"} for b in range(3) for name in names]
    assert list(kinds(sites)) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "up"]
    assert len(kinds(sites)["up"]) == 6
    assert list(kinds([{"site": "0"}, {"site": "2"}])) == ["linear"]


def test_notes_group_by_what_they_say() -> None:
    (first, second) = grouped([("a", "expert 3: saw 9"), ("a", "expert 4: saw 1e-3"), ("b", "dead"), ("c", "dead")])
    assert (first.text, first.count, first.names) == ("expert 3: saw 9", 2, ["a"])
    assert str(second) == "dead (and 1 alike): b, c"


def test_specs_in_words() -> None:
    assert spec_words(Uniform(3, 64).to_dict()) == "3-bit, groups of 64, asymmetric"
    words = spec_words(Uniform(8, -1, symmetric=True, scale_dtype="bfloat16").to_dict())
    assert words == "8-bit, whole rows, symmetric, bfloat16 scales"
    assert spec_words({"layout": "trellis", "bits": 2}) == "trellis (bits 2)"
    assert plain("a\x1b[31m\nb" + "c" * 500, 20) == "a\ufffd[31m\ufffdbccccccccccc…"


# --- the command


def recipes() -> Iterator[Recipe]:
    yield from (load_recipe(name) for name in shipped_recipes())
    yield with_spec(load_recipe("gptq"), bits=3, group_size=-1, symmetric=True)
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
    words = shlex.split(command(recipe.to_dict(), "./my models/it's", COMPUTE, "plan.json"))
    assert words[0] == "quantize"
    result = CliRunner().invoke(quant.cli.app, words[1:])
    assert isinstance(result.exception, Asked), result.output
    model, given, settings, _ = asked
    assert (model, given) == ("./my models/it's", recipe)
    assert (settings.device, settings.dtype, settings.threads) == ("cpu", "float32", 1)
    assert settings.plan == Path("plan.json")


def test_a_recipe_far_from_all_shipped_ones_names_its_file() -> None:
    far = Recipe(calibration=None)
    assert command(far.to_dict(), "m", COMPUTE) == (
        "quantize --model m --recipe recipe.json --device cpu --dtype float32 --threads 1"
    )


# --- the card


def test_the_card_says_how_it_was_made(packed_llama: Path, report: dict[str, Any]) -> None:
    written = (packed_llama / "README.md").read_text(encoding="utf-8")
    assert written == card(report)
    front = yaml.safe_load(written.split("---\n")[1])
    assert front["tags"] == ["bitwright", "quantized", "4-bit"]
    assert front["quantization"]["bits_per_weight"] == pytest.approx(report["bits"]["measured"], rel=1e-4)
    assert "license" not in front
    assert "license | unknown" in written
    for fact in (
        report["command"],
        report["calibration"]["sha256"],
        "AutoModelForCausalLM",
        "4 for each code",
        f"{report['bits']['measured']:.5g} per quantized weight",
    ):
        assert fact in written
    total = sum((packed_llama / name).stat().st_size for name in report["files"])
    assert f"{total:,} bytes" in written


def test_the_card_knows_nothing_of_the_run(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    other["seconds"], other["peak_rss_bytes"], other["resumed_blocks"] = 1e6, 1, 1
    other["machine"] = {"cpu": "another", "cores": 96, "gpu": "H", "platform": "Elsewhere"}
    other["verification"]["worst_difference"] = 0.5
    for part in (*other["blocks"], *other["sites"]):
        part["seconds"] = 123.0
    assert card(other) == card(report)


def figures(perplexity: float) -> dict[str, Any]:
    return {
        "against": "models/original",
        "perplexity": {"token": perplexity, "bits_per_byte": 1.5, "word": None},
        "original": {"token": 20.0, "bits_per_byte": 1.25, "word": None},
        "divergence": {"kl": 0.0123, "top1": 0.9},
        "hidden": None,
        "settings": {"text": "python-docs", "text_sha256": "ab", "window_rule": "non-overlapping", "window": 512},
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
    readme.write_text("# Somebody's own card\n")
    add_evaluation(tmp_path, figures(22.5))
    add_evaluation(tmp_path, figures(23.5))
    assert readme.read_text().count("## Evaluation") == 1
    assert "23.5" in readme.read_text()


def test_figures_need_a_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"README\.md: cannot be read \(No such file"):
        add_evaluation(tmp_path, figures(1.0))


@pytest.mark.parametrize(
    ("readme", "known"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", ("apache-2.0", None, None)),
        ("---\nlicense: [mit]\n---\n", ("mit", None, None)),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: https://example.com/LICENSE\n---\n",
            ("other", "llama3", "https://example.com/LICENSE"),
        ),
        ("---\nlicense: 'x]\\n---\\nhostile: yes'\nlicense_link: javascript:alert(1)\n---\n", (None, None, None)),
        ("---\nlicense: [unclosed\n---\n", (None, None, None)),
        ("no front matter", (None, None, None)),
        ("\xff\xfe", (None, None, None)),
    ],
)
def test_the_licence_of_the_base_model(
    readme: str, known: tuple[str | None, ...], llama: Path, tmp_path: Path, report: dict[str, Any]
) -> None:
    folder = tmp_path / "models--some--name" / "snapshots" / ("0123456789" * 4)
    folder.mkdir(parents=True)
    for file in llama.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "README.md").write_bytes(readme.encode("latin-1"))
    found = origin(Source(folder, "some/name"))
    assert tuple(found[key] for key in ("license", "license_name", "license_link")) == known
    assert (found["base_model"], found["revision"]) == ("some/name", "0123456789" * 4)
    report["source"] |= found
    front = yaml.safe_load(card(report).split("---\n")[1])
    assert front.get("license") == known[0]
    assert (front["base_model"], front["base_model_relation"]) == ("some/name", "quantized")


def test_experts_are_summed_up(packed_moe: Path) -> None:
    report = json.loads((packed_moe / "report.json").read_text())
    assert any(len(site["tokens"]) == 8 for site in report["sites"])
    assert "alike" in "".join(page(report).words)
    assert "What did not go as asked" in (packed_moe / "README.md").read_text()


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
    assert "1 block from an earlier run" in "".join(page(report).words)
