"""The command line: what a user types, reads and gets back as an exit code."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoModelForCausalLM

from quant import budget, cli
from quant.checkpoint.shards import sizes
from quant.checkpoint.writer import arrangement, promised_pieces
from quant.errors import SettingsError
from quant.kernels.spec import Uniform
from quant.place import Settings
from quant.prepare import prepare
from quant.progress import Progress
from quant.recipe import load_recipe, override, with_spec
from quant.recovery.tuning import BlockTuning
from quant.stopped import Begun

MODEL = str(Path(__file__).parent.parent / "demo" / "model")
FEW = ("--samples", "4", "--sequence-length", "64")


@pytest.fixture
def quantize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, args)])
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_json_report_and_files(quantize, tmp_path: Path) -> None:
    code, out, err = quantize(
        "--model", MODEL, "--bits", 3, "--group-size", 64, "--out", tmp_path / "q", "--json", *FEW
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["bits"]["measured"] == report["bits"]["promised"]
    assert report["recipe"]["spec"]["bits"] == 3
    assert report["recipe"]["calibration"]["samples"] == 4
    for name in (
        "config.json",
        "recipe.json",
        "plan.json",
        "README.md",
        "report.html",
        "report.json",
        "tokenizer.json",
    ):
        assert (tmp_path / "q" / name).stat().st_size > 0
    code, out, err = quantize("--model", MODEL, "--bits", 3, "--out", tmp_path / "q", *FEW)
    assert code == 7
    assert "already holds a checkpoint" in err
    assert "--restart" in err


def test_dry_run_knows_the_bytes(quantize, tmp_path: Path) -> None:
    """Predicted weight bytes are exact, for a ragged group and mixed specs too."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"model.layers.0.self_attn.q_proj": {"layout": "uniform", "bits": 5, "group_size": 48},
                                "model.layers.1.mlp.up_proj": None}))  # fmt: skip
    settings = ("--model", MODEL, "--bits", 3, "--recipe", "rtn", "--plan", plan, "--json", "--quiet")
    code, predicted, err = quantize(*settings, "--dry-run", "--out", tmp_path / "q")
    assert code == 0, err
    assert not (tmp_path / "q").exists()
    code, _, err = quantize(*settings, "--out", tmp_path / "q")
    assert code == 0, err
    assert err == ""
    for name, size in json.loads(predicted)["weight_files"].items():
        assert (tmp_path / "q" / name).stat().st_size == size
    kept = json.loads((tmp_path / "q" / "report.json").read_text())["left_float"]
    assert "plan" in kept["model.layers.1.mlp.up_proj"]


def test_dry_run_table(quantize) -> None:
    code, out, err = quantize("--model", MODEL, "--bits", 2, "--group-size", 64, "--dry-run", *FEW)
    assert code == 0, err
    for words in (
        "*.self_attn.q_proj",
        "2-bit uniform",
        "2-bit, groups of 64, asymmetric: ",
        "an embedding",
        "exactly",
        "peak memory",
        "time",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--bits", 1.01), 2, "1-bit codes take"),
        (("--bits", 2.01, "--group-size", 64), 2, "2-bit codes take"),
        (("--bits", 9), 2, "from 1 to 8"),
        (("--bits", 0), 2, "from 1 to 8"),
        (("--group-size", 0), 2, "group_size"),
        (("--recipe", "nonsense"), 2, "shipped are balanced"),
        (("--set", "solver.dmap=1"), 2, "it has damp"),
        (("--set", "solver.damp=much"), 2, "expected"),
        (("--set", "solver.damp"), 2, "path=value"),
        (("--recipe", "rtn", "--samples", 3), 2, "reads no text"),
        (("--dtype", "int4"), 2, "float32, float16 or bfloat16"),
        (("--resume", "--restart"), 2, "exclude"),
        (("--seed", 10**23), 2, "calibration.seed is 1000"),
        (("--threads", 10**11), 2, "give 1 to 1024"),
        (("--threads", 0), 2, "give 1 to 1024"),
        (("--device", "meta"), 2, "device 'meta': torch cannot use it"),
        (("--bits", "nan"), 2, "from 1 to 8"),
        (("--set", "average=NaN"), 2, "from 1 to 8"),
        (("--set", "recovery=foo"), 2, "expected a JSON object"),
        (("--set", 'recovery={"kind": "Magic"}'), 2, "this version has Assignments, BlockTuning"),
        (("--set", "solver=null"), 2, "has parts"),
        (("--time-budget", "1h"), 2, "give --bits too"),
        (("--time-budget", "soon", "--bits", 2), 2, "30m"),
        (("--time-budget", "1h", "--recipe", "rtn"), 2, "picks a recipe"),
        (("--size", "much"), 2, "write it as 5GiB"),
        (("--size", "300kB"), 2, "narrowest codes make 383,640 bytes"),
        (("--size", "1MB", "--time-budget", "1h"), 2, "picks the bits"),
        (("--only", "*.nothing"), 3, "matches no site"),
        (("--calibration", "no/such/file.txt"), 4, "calibration text no/such/file.txt: no such file"),
        (("--plan", "no-such-plan.json"), 2, "cannot be read"),
        (("--resume", "--samples", 1), 7, "no unfinished run"),
    ],
)
def test_wrong_settings_end_in_one_sentence(quantize, tmp_path: Path, args, code: int, words: str) -> None:
    got, out, err = quantize("--model", MODEL, "--out", tmp_path / "q", *args)
    assert got == code, err
    assert words in err
    assert err.startswith("error:")
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("code", ["RECIPE = Recipe(", "import quant\nRECIPE = 1 / 0\n", "from nowhere import RECIPE\n"])
def test_a_recipe_file_that_cannot_be_run_is_named(quantize, tmp_path: Path, code: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(code)
    got, _, err = quantize("--model", MODEL, "--recipe", file)
    assert got == 2
    assert f"error: --recipe {file}: cannot be run (" in err


def test_an_average_that_a_plan_file_uses_up_is_told_as_it_was_given(quantize, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"*.down_proj": Uniform(bits=4).to_dict()}))
    code, _, err = quantize("--model", MODEL, "--bits", 2.5, "--recipe", "gptq", "--plan", file, *FEW)
    assert code == 2
    assert "error: 2.5 bits on average, of which the plan file leaves 1.9444 to all others" in err


def test_a_model_that_is_not_there(quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("./no-such-folder", "x" * 300, "~nobody-of-this-name/model"):
        code, _, err = quantize("--model", name)
        assert code == 3
        assert "not a folder" in err


def test_unknown_flag(quantize) -> None:
    code, _, err = quantize("--model", MODEL, "--bitz", 4)
    assert code == 2
    assert "--bitz" in err


def test_a_home_that_the_shell_left_in_a_flag(quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bash expands `--out ~/q4` but not `--out=~/q4`: a folder called ~ is one that people delete by its name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    code, _, err = quantize("--model", MODEL, "--recipe", "rtn", "--only", "*.0.*.q_proj", "--out=~/q4")
    assert code == 0, err
    assert (tmp_path / "q4" / "config.json").is_file()
    assert list(here.iterdir()) == []


def test_help_fits_a_terminal(quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    """No word is cut at 80 columns."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    code, out, _ = quantize("--help")
    assert code == 0
    assert "…" not in out


def test_help_has_examples(quantize) -> None:
    code, out, _ = quantize("--help")
    assert code == 0
    assert "--dry-run" in out
    assert "Examples" in out
    assert "130 interrupted" in " ".join(out.split())


def test_interrupted_says_how_to_go_on(quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(parts: Any, out: Path, *_: object) -> None:
        (out / ".bitwright").mkdir(parents=True)
        (out / ".bitwright" / "run.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_all", interrupted)
    code, _, err = quantize("--model", MODEL, "--recipe", "rtn", "--out", tmp_path / "a b")
    assert code == 130
    assert "--resume" in err
    assert f"--out '{tmp_path}/a b'" in err
    chosen = SimpleNamespace(recipe=load_recipe("balanced"), source=SimpleNamespace(inside=""), settings=Settings())
    monkeypatch.setattr(cli, "within", lambda *_: ("balanced", chosen))
    code, _, err = quantize("--model", MODEL, "--bits", 2, "--time-budget", "2h", "--restart", "--out", tmp_path / "q")
    assert code == 130
    assert err.split("\n")[-2].endswith(f"--bits 2 --out {tmp_path}/q --recipe balanced --resume")


@pytest.mark.parametrize("where", ["prepare", "estimate", "run_all"])
def test_interrupted_before_there_is_anything_to_keep(
    quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, where, interrupted)
    dry = ["--dry-run"] if where == "estimate" else []
    code, _, err = quantize("--model", MODEL, "--recipe", "rtn", "--out", tmp_path / "out", *dry)
    assert code == 130
    assert "--resume" not in err
    assert "begins again" in err
    assert not (tmp_path / "out").exists()


def test_what_a_stopped_command_leaves(tmp_path: Path) -> None:
    begun, command = Begun(), ["--model", "m", "--bits", "2", "--out", "q"]
    (tmp_path / "text_encoder" / ".bitwright").mkdir(parents=True)
    old = tmp_path / "text_encoder" / ".bitwright" / "run.json"
    old.write_text("{}")
    os.utime(old, (1, 1))
    for mode, goes_on in ((["--restart"], False), ([], False), (["--resume"], True)):
        assert ("--resume" in begun.told([*command, *mode])) == goes_on  # stopped while the model was prepared
    begun.begin([tmp_path / "transformer", tmp_path / "text_encoder"])
    assert "--resume" not in begun.told([*command, "--restart"])  # what lies there is another run's
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")  # the first component is complete
    assert begun.told(command).endswith("quantize --model m --bits 2 --out q --resume")


def test_a_folder_that_is_taken_is_refused_before_any_work(
    quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--model", MODEL, "--recipe", "rtn", "--out", tmp_path / "out")
    assert quantize(*args)[0] == 0
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    code, out, err = quantize(*args, "--dry-run")
    assert code == 0
    assert "would be refused" in err
    assert "exactly" in out

    def prepared(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(cli, "prepare", prepared)
    (tmp_path / "busy" / ".bitwright").mkdir(parents=True)
    busy = (tmp_path / "busy" / ".bitwright" / "lock").open("w")
    fcntl.flock(busy, fcntl.LOCK_EX)
    for more, words in (
        ((), "already holds a checkpoint"),
        (("--out", tmp_path / "foreign"), "not bitwright's"),
        (("--out", tmp_path / "new", "--resume"), "no unfinished run"),
        (("--out", tmp_path / "busy", "--restart"), "another run is writing here"),
        (("--out", tmp_path / "foreign" / "notes.txt" / "deep"), "no folder can be made"),
    ):
        code, _, err = quantize(*args, *more)
        assert code in (7, 8)
        assert words in " ".join(err.split())
    busy.close()


def test_logs_say_which_recipe_runs(quantize, tmp_path: Path) -> None:
    for flags, words in (
        (("--bits", 4), "recipe gptq: 4-bit, groups of 128"),
        (
            ("--bits", 2.33),
            "recipe balanced: 2-bit trellis, window 13, code mac, 256 rows, rotated, 2.33 bits on avera",
        ),
        (("--recipe", "rtn"), "recipe rtn: 4-bit"),
        (("--set", "spec.bits=2"), "recipe gptq: 2-bit, groups of 128"),
        (("--size", "1GB", "--recipe", "rtn"), "recipe rtn: 8-bit"),
    ):
        code, _, err = quantize("--model", MODEL, *flags, "--dry-run", "--json", *(() if "rtn" in flags else FEW))
        assert code == 0, err
        assert words in err


def test_recipe_json_reruns_to_the_same_bytes(quantize, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert quantize("--model", MODEL, "--bits", 2, "--symmetric", "--seed", 7, "--out", first, *FEW)[0] == 0
    assert quantize("--model", MODEL, "--recipe", first / "recipe.json", "--out", second)[0] == 0
    for path in sorted(first.iterdir()):
        if path.name not in ("report.json", "report.html", "README.md"):
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("size", "bits"), [("450kB", {1, 2}), ("0.55MiB", {2, 3}), ("594592", {3, 4}), ("800 kB", {5, 6}), ("1GB", {8})]
)
def test_a_size_is_used_and_kept(quantize, size: str, bits: set[int], tmp_path: Path) -> None:
    limit = budget.nbytes(size)
    code, out, err = quantize("--model", MODEL, "--size", size, "--dry-run", "--json", "--recipe", "rtn")
    assert code == 0, err
    promised = json.loads(out)["weight_files"]
    assert (0.98 * limit if limit < 1e6 else 0) < sum(promised.values()) <= limit
    code, out, err = quantize("--model", MODEL, "--size", size, "--recipe", "rtn", "--out", tmp_path / "q", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["files"] == promised
    assert {site["spec"]["bits"] for site in report["sites"]} == bits


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in four files."""
    folder = tmp_path_factory.mktemp("shards")
    AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").save_pretrained(folder, max_shard_size="500KB")
    shutil.copy(Path(MODEL) / "tokenizer.json", folder)
    assert len([*folder.glob("*.safetensors")]) == 4
    return folder


@pytest.mark.parametrize(
    ("name", "size", "files"),
    [("rtn", 500_000, 1), ("rtn", 510_000, 1), ("rtn", 560_000, 3), ("balanced", 518_000, 1), ("balanced", 524_000, 3)],
)
def test_a_size_counts_the_files_that_finer_codes_make(shards: Path, name: str, size: int, files: int) -> None:
    """The first file is full at 493,792 bytes; a second one brings an index of 12,313."""
    few = ["calibration.samples=2", "calibration.sequence_length=32"] if name != "rtn" else []
    made = override(load_recipe(name), few)
    ready = budget.sized(
        str(size), lambda bits: with_spec(made, bits=bits), lambda recipe: prepare(str(shards), recipe), Progress()
    )
    found = sizes(arrangement(ready, promised_pieces(ready)), ready.source.stem)
    assert len(found) == files
    assert 0.97 * size < sum(found.values()) <= size


def test_a_time_budget_picks_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of best, balanced, fast whose prediction fits: here they take at most 100, 10 and 1 s."""
    taken, tried = {"best": 100.0, "balanced": 10.0, "fast": 1.0}, list[str]()

    @dataclass(frozen=True)
    class Ready:
        recipe: str
        plan: str = "measured"
        make: Any = None

    def predict(ready: Ready) -> SimpleNamespace:
        tried.append(ready.recipe)
        return SimpleNamespace(seconds=taken[ready.recipe] / 2, again_seconds=taken[ready.recipe] / 2)

    monkeypatch.setattr(budget, "estimate", predict)
    said: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda _, what: said.append(what))
    for limit, name in (("2m", "best"), ("1m30s", "balanced"), ("5s", "fast")):
        found, ready = budget.within(limit, cast(Any, str), cast(Any, Ready), Progress())
        assert (found, ready.recipe, cast(Any, ready.make)(None)) == (name, name, "measured")  # and not once more
        assert said[-1].startswith(f"recipe {name}: about ")
    with pytest.raises(SettingsError, match="give more time"):
        budget.within("0.5s", cast(Any, str), cast(Any, Ready), Progress())
    tried.clear()
    with pytest.raises(SettingsError, match="recipe best alone takes about 100 s here"):
        budget.within("0s", cast(Any, str), cast(Any, Ready), Progress())
    assert tried == ["best"]  # what is over is not spent further


def test_parts_of_a_recipe_are_set_whole_and_taken_away() -> None:
    made = override(load_recipe("best"), ["distillation=null", 'recovery={"kind": "BlockTuning", "steps": 3}'])
    assert made.distillation is None
    assert made.recovery == BlockTuning(steps=3)
    assert override(made, ["recovery=null"]).recovery is None
