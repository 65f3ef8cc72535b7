"""Kill a run at any instant: it goes on to the same bytes, or says why it will not."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import quant.cli
from quant import Settings, pairs, quantize
from quant.checkpoint import journal, shards
from quant.checkpoint.journal import FOLDER, Journal
from quant.errors import CheckpointError, ResumeError
from quant.inspect import look
from quant.prepare import Prepared
from quant.progress import Progress
from quant.recipe import override
from tests import tiny
from tests.architectures import make
from tests.processes import PATIENCE, Start, quiet, wait_for


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks of two kinds."""
    return tiny.model("gemma3", tmp_path_factory.mktemp("models") / "gemma3")


def begun(out: Path) -> bool:
    return (out / FOLDER / "run.json").exists()


def mode(out: Path) -> Any:
    return "resume" if begun(out) or journal.complete(out) else "new"


# --- SIGKILL


def test_killed_ten_times_at_random_instants(gemma: Path, words: Path, tmp_path: Path, started: Start) -> None:
    """The instants are fractions of an undisturbed run; the last attempts meet a journal that is nearly full."""
    recipe = tiny.recipe(words)
    whole, out = tmp_path / "whole", tmp_path / "out"
    child = started(quiet, quantize, str(gemma), whole, recipe)
    wait_for(lambda: begun(whole), child)
    began = time.monotonic()
    child.join(PATIENCE)
    seconds = time.monotonic() - began
    assert child.exitcode == 0
    instants, killed, done = random.Random(2), 0, [0]
    for _ in range(10):
        before = stamp(out)
        child = started(quiet, quantize, str(gemma), out, recipe, mode=mode(out))
        wait_for(partial(stirred, child, out, before))
        child.join(instants.uniform(0, 0.3) * seconds)
        child.kill()
        child.join(PATIENCE)
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
        done.append(len(list((out / FOLDER).glob("[0-9]*.json"))))
    finished = journal.complete(out)
    assert killed >= 8
    assert finished or done == sorted(done)
    report = quantize(str(gemma), out, recipe, mode="resume").report
    assert finished or report["resumed_blocks"] == done[-1]
    assert tiny.contents(out) == tiny.contents(whole)


def stamp(out: Path) -> int:
    marker = out / FOLDER / "run.json"
    return marker.stat().st_mtime_ns if marker.exists() else 0


def stirred(child: Any, out: Path, before: int) -> bool:
    """Whether the run in a child has ended, or has taken the folder."""
    return not child.is_alive() or stamp(out) != before


def test_killed_at_every_step_on_disk(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves is what is on the disk: the folder is copied before and after every rename and in the middle
    of every write, copy and removal, and a run resumes in each copy."""
    recipe, out, kept = quant.load_recipe("rtn"), tmp_path / "out", tmp_path / "kept"
    seen: dict[str, int] = {}

    def snapshot() -> None:
        state = json.dumps(tiny.contents(out)) + str([str(path) for path in sorted(out.rglob("*"))])
        if state not in seen:
            seen[state] = len(seen)
            shutil.copytree(out, kept / f"{seen[state]:02d}")

    with monkeypatch.context() as patched:
        watch_disk(patched, snapshot)
        quantize(str(llama), out, recipe)
    assert len(seen) > 30
    monkeypatch.setattr("quant.checkpoint.writer.render", lambda _: "")  # a page of plots each time would take long
    expected, asked = tiny.contents(out), []
    for folder in sorted(kept.iterdir()):
        asked.append((mode(folder), begun(folder)))
        quantize(str(llama), folder, recipe, mode=mode(folder))
        assert tiny.contents(folder) == expected, folder
    assert set(asked) == {("new", False), ("resume", True), ("resume", False)}


def watch_disk(patched: pytest.MonkeyPatch, touch: Callable[[], None]) -> None:
    """Calls `touch` around and within whatever changes the disk."""

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            touch()
            result = real(*args, **kwargs)
            touch()
            return result

        return wrapped

    def write(self: shards.Atomic, data: bytes) -> None:
        self.stream.write(data[: len(data) // 2])
        self.stream.flush()
        touch()
        self.stream.write(data[len(data) // 2 :])

    def copyfile(source: Path, target: Path) -> None:
        data = Path(source).read_bytes()
        target.write_bytes(data[: len(data) // 2])
        touch()
        target.write_bytes(data)

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        for item in sorted(path.rglob("*")):
            if item.is_file():
                item.unlink()
                touch()
        real_rmtree(path, ignore_errors)

    real_rmtree, real_copytree = shutil.rmtree, shutil.copytree
    patched.setattr(shards.Atomic, "write", write)
    patched.setattr(os, "replace", around(os.replace))
    patched.setattr(os, "rename", around(os.rename))
    patched.setattr("quant.checkpoint.writer.shutil", SimpleNamespace(copyfile=copyfile))
    patched.setattr("quant.checkpoint.journal.shutil", SimpleNamespace(rmtree=rmtree, copytree=real_copytree))


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_killed_after_a_block_with_activations_on_disk(name: str, words: Path, tmp_path: Path, started: Start) -> None:
    """What the float path and the spilled activations were is computed again, to the last bit."""
    model = tiny.model(name, tmp_path / "model")
    recipe, where = tiny.recipe(words, "match=float"), Settings(spill_bytes=0)
    quantize(str(model), tmp_path / "whole", recipe, settings=where)
    out = tmp_path / "out"
    child = started(quiet, quantize, str(model), out, recipe, settings=where)
    wait_for((out / FOLDER / "00000.json").exists, child)
    wait_for((out / FOLDER / "activations").exists, child)
    child.kill()
    child.join(PATIENCE)
    assert quantize(str(model), out, recipe, settings=where, mode="resume").report["resumed_blocks"] >= 1
    assert tiny.contents(out) == tiny.contents(tmp_path / "whole")


# --- SIGINT and SIGTERM, through the command line


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_folder_that_resumes(
    sent: int, code: int, gemma: Path, words: Path, tmp_path: Path, started: Start
) -> None:
    out = tmp_path / "out put"
    asked = ["quantize", "--model", str(gemma), "--bits", "4", "--group-size", "32", "--calibration", str(words)]
    asked += ["--samples", "24", "--sequence-length", "32", "--out", str(out), "--set", "calibration.batch_size=2"]
    child = started(_command_line, asked, tmp_path / "said")
    wait_for((out / FOLDER / "00000.json").exists, child)
    os.kill(child.pid, sent)
    child.join(PATIENCE)
    said = (tmp_path / "said").read_text()
    assert child.exitcode == code, said
    assert "stopped; finished blocks are kept. Continue with:" in said
    assert f"--out '{out}' --set calibration.batch_size=2 --resume" in said
    assert "Traceback" not in said
    done = len(list((out / FOLDER).glob("[0-9]*.json")))
    assert 1 <= done < 4
    child = started(_command_line, [*asked, "--resume"], tmp_path / "said")
    child.join(PATIENCE)
    assert child.exitcode == 0, (tmp_path / "said").read_text()
    assert json.loads((out / "report.json").read_text())["resumed_blocks"] == done
    assert tiny.contents(out)["model.safetensors"] == _undisturbed(gemma, words, tmp_path)


def _undisturbed(gemma: Path, words: Path, folder: Path) -> str:
    recipe = tiny.recipe(words, "calibration.samples=24")
    quantize(str(gemma), folder / "whole", recipe)
    return tiny.contents(folder / "whole")["model.safetensors"]


def _command_line(argv: list[str], said: Path) -> None:
    from quant import cli

    with said.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = argv
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background inherits a deaf one
    cli.main()


# --- what is not the same run


@pytest.fixture
def unfinished(llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """A run that stopped after its first block: (model, text, out), which a test may change."""
    model, text, out = tmp_path / "model", tmp_path / "words.txt", tmp_path / "out"
    shutil.copytree(llama, model)
    shutil.copyfile(words, text)
    monkeypatch.setattr("quant.pipeline._advance", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), out, tiny.recipe(text))
    monkeypatch.undo()
    assert (out / FOLDER / "00000.json").exists()
    return model, text, out


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_unfinished_run_is_no_checkpoint(unfinished: tuple[Path, Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="out: an unfinished run; continue it with quantize --resume"):
        quant.load(unfinished[2])


def test_another_recipe_is_refused(unfinished: tuple[Path, Path, Path]) -> None:
    model, text, out = unfinished
    said = "the unfinished run there is another one: recipe.spec.bits = 4 then, 3 now. Resume with what it was begun"
    with pytest.raises(ResumeError, match=said):
        quantize(str(model), out, tiny.recipe(text, bits=3), mode="resume")
    with pytest.raises(ResumeError, match=r"recipe\.solver\.damp = 0\.01 then, 0\.05 now.* or use --restart"):
        quantize(str(model), out, tiny.recipe(text, "solver.damp=0.05"), mode="resume")
    with pytest.raises(ResumeError, match=r"recipe\.calibration\.seed = 0 then, 1 now"):
        quantize(str(model), out, tiny.recipe(text, "calibration.seed=1"), mode="resume")


def test_another_recipe_is_refused_before_anything_is_measured(
    unfinished: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, out = unfinished
    monkeypatch.setattr(Prepared, "plan", property(lambda _: pytest.fail("a plan was made")))
    other = override(quant.load_recipe("balanced"), [f"calibration.text={text}", "calibration.sequence_length=32"])
    with pytest.raises(ResumeError, match=r"the unfinished run there is another one: recipe\.spec\."):
        quantize(str(model), out, other, mode="resume")


def test_another_model_is_refused(unfinished: tuple[Path, Path, Path]) -> None:
    model, text, out = unfinished
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match=r'is another one: model\.sha256 = "[0-9a-f]{64}" then, "[0-9a-f]{64}" now'):
        quantize(str(model), out, tiny.recipe(text), mode="resume")


def test_another_text_is_refused(unfinished: tuple[Path, Path, Path]) -> None:
    model, text, out = unfinished
    text.write_text(text.read_text() + "one word more")
    with pytest.raises(ResumeError, match=r'is another one: calibration\.sha256 = "[0-9a-f]{64}" then'):
        quantize(str(model), out, tiny.recipe(text), mode="resume")


def test_another_tokenizer_is_refused(unfinished: tuple[Path, Path, Path]) -> None:
    model, text, out = unfinished
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ResumeError, match=r'is another one: calibration\.tokens_sha256 = "'):
        quantize(str(model), out, tiny.recipe(text), mode="resume")


def test_another_plan_dtype_or_version_is_refused(
    unfinished: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, out = unfinished
    plan = model.parent / "plan.json"
    plan.write_text(json.dumps({"model.layers.1.mlp.up_proj": None}))
    with pytest.raises(ResumeError, match=r"plan\.model\.layers\.1\.mlp\.up_proj = \{.*\"bits\": 4.*\} then, null now"):
        quantize(str(model), out, tiny.recipe(text), settings=Settings(plan=plan), mode="resume")
    with pytest.raises(ResumeError, match=r'compute\.dtype = "float32" then, "bfloat16" now'):
        quantize(str(model), out, tiny.recipe(text), settings=Settings(dtype="bfloat16"), mode="resume")
    with pytest.raises(ResumeError, match=r"compute\.threads = 1 then, 2 now"):
        quantize(str(model), out, tiny.recipe(text), settings=Settings(threads=2), mode="resume")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(ResumeError, match=r'versions\.torch = ".*" then, "9\.9\.9" now'):
        quantize(str(model), out, tiny.recipe(text), mode="resume")


@pytest.mark.parametrize("name", ["run.json", "00000.json", "00000.safetensors"])
def test_a_damaged_journal_is_refused(name: str, unfinished: tuple[Path, Path, Path]) -> None:
    model, text, out = unfinished
    file = out / FOLDER / name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ResumeError, match=rf"{name}: cannot be read \(.*\); begin anew with --restart"):
        quantize(str(model), out, tiny.recipe(text), mode="resume")
    quantize(str(model), out, tiny.recipe(text), mode="restart")


def test_a_flipped_bit_in_a_finished_block_is_refused(unfinished: tuple[Path, Path, Path]) -> None:
    """Where nothing else would tell: a header can be read, and codes are as good as others."""
    model, text, out = unfinished
    file = out / FOLDER / "00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    for attempt in (lambda: quantize(str(model), out, tiny.recipe(text), mode="resume"), lambda: look(out)):
        with pytest.raises(ResumeError, match=r"00000.safetensors: cannot be read \(it was altered.*; begin anew"):
            attempt()
    assert look(out, check=False)["blocks_done"] == 1


def test_a_plan_need_not_be_given_again(words: Path, tmp_path: Path) -> None:
    model, plan = tiny.model("llama", tmp_path / "model"), tmp_path / "plan.json"
    plan.write_text(json.dumps({"*.up_proj": None, "*.down_proj": quant.Uniform(bits=3, group_size=32).to_dict()}))
    settings, recipe, out = Settings(plan=plan), tiny.recipe(words), tmp_path / "out"
    quantize(str(model), tmp_path / "whole", recipe, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), out, recipe, settings=settings, progress=Stops())
    quantize(str(model), out, recipe, mode="resume")
    assert tiny.contents(out) == tiny.contents(tmp_path / "whole")
    assert quantize(str(model), out, recipe, mode="resume").out == out  # finished
    with pytest.raises(ResumeError, match=r"the finished checkpoint there is another one: recipe\.only"):
        quantize(str(model), out, replace(recipe, only=("*.q_proj",)), mode="resume")
    (out / "report.json").unlink()  # it says no more whose it is
    with pytest.raises(ResumeError, match="does not say what it was made from"):
        quantize(str(model), out, replace(recipe, only=("*.q_proj",)), mode="resume")


class Stops(Progress):
    """Kills a run after its first block."""

    def advanced(self, index: int, weights: int) -> None:
        raise KeyboardInterrupt


def test_what_was_measured_is_not_measured_again(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits and how much rows count, each and two together, lie in the journal; what was altered there is refused."""
    monkeypatch.setattr(pairs, "AGREED", -1.0)  # random weights have nothing to agree on
    model, out = tiny.model("llama", tmp_path / "model"), tmp_path / "out"
    short = ["calibration.samples=4", "calibration.sequence_length=32", "spec.base.window=8", "spec.base.length=32"]
    recipe = override(quant.load_recipe("balanced"), [f"calibration.text={words}", *short])

    quantize(str(model), tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), out, recipe, progress=Stops())
    said = shlex.split(look(out)["resume"])
    assert "--plan" not in said
    altered = shutil.copytree(out, tmp_path / "altered")
    rows = load_file(altered / FOLDER / "rows.safetensors")
    assert sum(name.startswith("rows.") for name in rows) == 14
    assert any(name.startswith("pairs.") for name in rows)
    for kind in ("rows.", "pairs."):
        name = next(name for name in rows if name.startswith(kind))
        save_file(rows | {name: rows[name] + 1}, altered / FOLDER / "rows.safetensors")
        with pytest.raises(ResumeError, match='is another one: rows = "'):
            quantize(str(model), altered, recipe, mode="resume")
    (altered / FOLDER / "rows.safetensors").write_bytes(b"0" * 40)
    with pytest.raises(ResumeError, match=r"cannot be read .*begin anew with --restart"):
        quantize(str(model), altered, recipe, mode="resume")
    told = json.loads((altered / FOLDER / "run.json").read_text())
    told["plan"]["model.layers.0.mlp.up_proj"]["layout"] = "treadmill"
    (altered / FOLDER / "run.json").write_text(json.dumps(told))
    with pytest.raises(ResumeError, match=r"cannot be read .*treadmill.*begin anew with --restart"):
        quantize(str(model), altered, recipe, mode="resume")
    edited = tmp_path / "edited.json"
    edited.write_text('{"model.layers.1.mlp.up_proj": null}')
    with pytest.raises(ResumeError, match=r"plan\.model\.layers\.1\.mlp\.up_proj = \{.* then, null now"):
        quantize(str(model), out, recipe, settings=Settings(plan=edited), mode="resume")
    done = CliRunner().invoke(quant.cli.app, said[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "measuring" not in done.output  # stderr included
    assert tiny.contents(out) == tiny.contents(tmp_path / "whole")
    again = CliRunner().invoke(quant.cli.app, said[1:], catch_exceptions=False)
    assert again.exit_code == 0
    assert "already complete" in again.output
    assert "measuring" not in again.output


# --- which folder


def test_which_folders_a_run_takes(unfinished: tuple[Path, Path, Path], packed_llama: Path, tmp_path: Path) -> None:
    model, text, out = unfinished
    recipe = tiny.recipe(text)
    said = r"holds an unfinished run \(blocks done: 1\); continue it with --resume, or begin anew with --restart"
    with pytest.raises(ResumeError, match=said):
        quantize(str(model), out, recipe)
    finished = shutil.copytree(packed_llama, tmp_path / "finished")
    with pytest.raises(ResumeError, match="already holds a checkpoint; choose another --out, or --restart to"):
        quantize(str(model), finished, recipe)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    for asked in ("new", "resume", "restart"):
        with pytest.raises(ResumeError, match="holds files that are not bitwright's; choose another --out"):
            quantize(str(model), tmp_path / "foreign", recipe, mode=asked)
        with pytest.raises(ResumeError, match=r"words\.txt: is a file; choose another --out"):
            quantize(str(model), text, recipe, mode=asked)
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        with pytest.raises(ResumeError, match="holds no unfinished run to resume; run without --resume"):
            quantize(str(model), tmp_path / folder, recipe, mode="resume")
    for folder in ("empty", "absent/and deep"):
        quantize(str(model), tmp_path / folder, quant.load_recipe("rtn"))


def test_two_runs_in_one_folder(gemma: Path, words: Path, packed_llama: Path, tmp_path: Path, started: Start) -> None:
    """The first is stopped, not killed: it holds its lock, and finishes when it is let go."""
    out, recipe = tmp_path / "out", tiny.recipe(words)
    child = started(quiet, quantize, str(gemma), out, recipe)
    wait_for((out / FOLDER / "00000.json").exists, child)
    os.kill(child.pid, signal.SIGSTOP)
    before = tiny.contents(out)
    for asked in ("new", "resume", "restart"):
        with pytest.raises(ResumeError, match="another run is writing here; wait for it, stop it, or choose"):
            quantize(str(gemma), out, recipe, mode=asked)
    assert tiny.contents(out) == before
    os.kill(child.pid, signal.SIGCONT)
    child.join(PATIENCE)
    assert child.exitcode == 0
    quantize(str(gemma), tmp_path / "whole", recipe)
    assert tiny.contents(out) == tiny.contents(tmp_path / "whole")


def test_a_failed_run_gives_its_lock_back(unfinished: tuple[Path, Path, Path]) -> None:
    model, text, out = unfinished
    identity = json.loads((out / FOLDER / "run.json").read_text())
    with Journal(out, identity, "resume"), pytest.raises(ResumeError, match="another run is writing here"):
        quantize(str(model), out, tiny.recipe(text), mode="resume")
    assert quantize(str(model), out, tiny.recipe(text), mode="resume").report["resumed_blocks"] == 1


# --- restart


def test_restart_deletes_what_is_ours_and_nothing_else(
    unfinished: tuple[Path, Path, Path], llama: Path, packed_llama: Path, words: Path, tmp_path: Path
) -> None:
    _, _, out = unfinished
    finished = Path(shutil.copytree(packed_llama, tmp_path / "finished"))
    saved = tmp_path / "saved"
    quant.load(packed_llama).save_pretrained(saved, max_shard_size="20KB")
    recipe, foreign = tiny.recipe(words), {"notes.txt", "numbers.json", "sub/thesis.md"}
    for folder in (out, finished, saved):
        (folder / "notes.txt").write_text("mine")
        (folder / "numbers.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "thesis.md").write_text("mine too")
        quantize(str(llama), folder, recipe, mode="restart")
        left = tiny.contents(folder)
        assert foreign <= left.keys()
        made = {name: digest for name, digest in left.items() if name not in foreign}
        assert made == tiny.contents(packed_llama), folder
        assert len(list(folder.glob("*.safetensors*"))) == 1
        quant.load(folder)


def test_restart_after_a_kill_in_the_last_phase(
    llama: Path, words: Path, packed_llama: Path, tmp_path: Path, started: Start
) -> None:
    """Shards of a first, sharded run do not stay behind when the second makes one file; a killed restart included."""
    make("llama").save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    tiny.add_tokenizer(tmp_path / "sharded")
    out = tmp_path / "out"
    for name, model, asked in (("config.json", tmp_path / "sharded", "new"), ("run.json", llama, "restart")):
        child = started(quiet, _die_writing, name, str(model), out, quant.load_recipe("rtn"), mode=asked)
        child.join(PATIENCE)
        assert child.exitcode == -signal.SIGKILL
        assert (len(list(out.glob("model-*.safetensors"))) > 1) == (asked == "new")
    (out / FOLDER / "files.json").write_text('["damaged"')
    quantize(str(llama), out, tiny.recipe(words), mode="restart")
    assert tiny.contents(out) == tiny.contents(packed_llama)


def _die_writing(name: str, *args: Any, **kwargs: Any) -> None:
    real = shards.Atomic.__enter__

    def enter(self: shards.Atomic) -> shards.Atomic:
        if self.path.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self)

    shards.Atomic.__enter__ = enter
    quantize(*args, **kwargs)


# --- a finished folder


def test_resuming_a_finished_run_ends_at_once(
    llama: Path, words: Path, packed_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(packed_llama, tmp_path / "out"))
    (out / ".bitwright-done").mkdir()  # killed while the journal was being removed
    (out / ".bitwright-done" / "00000.safetensors").write_bytes(b"half")
    monkeypatch.setattr("quant.pipeline._blocks", _interrupt)
    result = quantize(str(llama), out, tiny.recipe(words), mode="resume")
    report = json.loads((packed_llama / "report.json").read_text())
    assert result.report == report
    assert result.written.files == report["files"]
    assert result.written.measured_bits == report["bits"]["measured"]
    assert tiny.contents(out) == tiny.contents(packed_llama)


def test_resuming_another_finished_run_is_refused(llama: Path, words: Path, packed_llama: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(packed_llama, tmp_path / "out"))
    said = r"the finished checkpoint there is another one: recipe\.spec\.bits = 4 then, 3 now\."
    with pytest.raises(ResumeError, match=said):
        quantize(str(llama), out, tiny.recipe(words, bits=3), mode="resume")
    (out / "report.json").unlink()
    with pytest.raises(ResumeError, match=r"whose report\.json does not say what it was made from; choose"):
        quantize(str(llama), out, tiny.recipe(words), mode="resume")
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its content is not what was written"):
        quantize(str(llama), out, tiny.recipe(words), mode="resume")


def test_a_resumed_run_may_change_what_does_not_matter(unfinished: tuple[Path, Path, Path], packed_llama: Path) -> None:
    model, text, out = unfinished
    result = quantize(str(model), out, tiny.recipe(text), settings=Settings(spill_bytes=0), mode="resume")
    made = tiny.contents(out)
    assert result.report["resumed_blocks"] == 1
    assert made["model.safetensors"] == tiny.contents(packed_llama)["model.safetensors"]


@pytest.mark.parametrize("mode", ["new", "resume", "restart"])
def test_a_journal_that_is_a_link_is_refused(mode: Any, llama: Path, words: Path, tmp_path: Path) -> None:
    """A restart would empty the folder that it leads to."""
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    (other / "own.txt").write_text("own")
    (out / FOLDER).symlink_to(other)
    with pytest.raises(ResumeError, match="a link to another place"):
        quant.quantize(str(llama), out, tiny.recipe(words), mode=mode)
    assert [path.name for path in other.iterdir()] == ["own.txt"]
