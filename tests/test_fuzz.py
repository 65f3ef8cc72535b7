"""Damaged checkpoints: 900 seeded corruptions, each of which ends in our error or in a sound model.

With checksums in place nothing gets through. Without them (a folder written by save_pretrained) or with checksums that
were made again after the damage, names, dtypes, shapes and places still have to fit; what is left is a change that no
reader can know of, a flipped bit in a payload or an edited number in config.json. No case may crash, hang, eat the
memory or raise an error of another kind.
"""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

import quant
from quant.checkpoint.manifest import seal
from quant.errors import BitwrightError, CheckpointError
from quant.recipe import with_spec
from tests.architectures import make_from

IDS = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(5))
SECONDS = 30  # for one case on a busy machine; a sound one takes 0.05
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
JUNK: list[Any] = [
    None, True, 0, -1, 3, 0.5, 2**31, 10**400, 1e999, float("nan"), "", "x", "../x", "\0", "\ud800", [], {}, [[]],
    {"a": 1}, [1, 2, 3], [-1, 8], [2**70, 2**70], "float16", "F64", "uniform",
]  # fmt: skip
BOMBS = ["[" * 100_000, '{"a":' * 50_000, '{"a": ' + "9" * 5000 + "}", "1e999", "NaN", "null", "[]", '"x"', "{", ""]

Damage = Callable[[Path, random.Random], None]


class Hang(BaseException):
    """A case that takes too long."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sealed checkpoints of a dense model and of a mixture of experts, and what save_pretrained makes of them."""
    folder = tmp_path_factory.mktemp("sound")
    made: dict[str, Path] = {}
    models = {"dense": make_from("LlamaForCausalLM", **SIZES)}
    models["experts"] = make_from("MixtralForCausalLM", **SIZES, num_local_experts=4, num_experts_per_tok=2)
    for name, model in models.items():
        model.save_pretrained(folder / f"{name}-float")
        made[name] = folder / name
        recipe = with_spec(quant.load_recipe("rtn"), bits=3, group_size=16)
        quant.quantize(str(folder / f"{name}-float"), made[name], recipe)
        for file in ("report.html", "report.json", "README.md"):
            (made[name] / file).unlink()
        made[f"{name}-saved"] = folder / f"{name}-saved"
        quant.load(made[name]).save_pretrained(made[f"{name}-saved"])
    made["sharded"] = folder / "sharded"
    quant.load(made["dense"]).save_pretrained(made["sharded"], max_shard_size="8KB")
    assert len(list(made["sharded"].glob("*.safetensors"))) > 2
    return made


@pytest.fixture(scope="module")
def expected(sound: dict[str, Path]) -> dict[str, torch.Tensor]:
    return {name: logits(quant.load(folder)) for name, folder in sound.items()}


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """No case may take more than 8 GiB of address space beyond what the process has; nothing is printed."""
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**30, hard))
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(50)
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    logging.set_verbosity(level)
    if bar:
        logging.enable_progress_bar()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def attempt(folder: Path) -> Any:
    """The model, or the error of ours that loading ended in. Any other error is the test's failure."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return quant.load(folder)
    except BitwrightError as error:
        return error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(source: Path, folder: Path, damage: Damage, seed: int) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    damage(folder, random.Random(seed))
    return folder


Judge = Callable[[Any, int], None]


def run(cases: int, sources: list[Path], damages: list[Damage], folder: Path, judge: Judge) -> None:
    """Case n: source and damage n in turn, seed n. Names the case when anything goes wrong."""
    for case in range(cases):
        source, damage = sources[case % len(sources)], damages[case // len(sources) % len(damages)]
        try:
            judge(attempt(damaged(source, folder / "case", damage, case)), case)
        except BaseException as error:
            what = f"case {case}: {damage.__name__} on {source.name}"
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


# --- damage to any file


def pick(folder: Path, chance: random.Random, pattern: str = "*") -> Path:
    return chance.choice(sorted(path for path in folder.glob(pattern) if path.stat().st_size))


def flip_bits(folder: Path, chance: random.Random) -> None:
    file = pick(folder, chance)
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 7])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def truncate(folder: Path, chance: random.Random) -> None:
    file = pick(folder, chance)
    data = file.read_bytes()
    file.write_bytes(data[: chance.choice([0, 1, 8, len(data) - 1, chance.randrange(len(data))])])


def swap_ranges(folder: Path, chance: random.Random) -> None:
    file = pick(folder, chance)
    data = bytearray(file.read_bytes())
    size = chance.randrange(1, len(data) // 3)
    a, b = chance.randrange(size), chance.randrange(2 * size, len(data) - size + 1)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    file.write_bytes(data)


def insert_bytes(folder: Path, chance: random.Random) -> None:
    file = pick(folder, chance)
    data = file.read_bytes()
    at = chance.randrange(len(data) + 1)
    file.write_bytes(data[:at] + chance.randbytes(chance.choice([1, 8, 4096])) + data[at:])


def remove_file(folder: Path, chance: random.Random) -> None:
    pick(folder, chance).unlink()


def swap_files(folder: Path, chance: random.Random) -> None:
    first = pick(folder, chance)
    second = chance.choice([path for path in sorted(folder.iterdir()) if path != first])
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def make_directory(folder: Path, chance: random.Random) -> None:
    file = pick(folder, chance)
    file.unlink()
    file.mkdir()


def bomb(folder: Path, chance: random.Random) -> None:
    pick(folder, chance, "*.json").write_text(chance.choice(BOMBS))


def add_weights(folder: Path, chance: random.Random) -> None:
    name = chance.choice(["model.safetensors.index.json", "model-00001-of-00002.safetensors", "x.safetensors"])
    (folder / name).write_bytes((folder / "model.safetensors").read_bytes() if chance.random() < 0.5 else b"{}")


ANYWHERE: list[Damage] = [
    flip_bits, flip_bits, flip_bits, truncate, swap_ranges, insert_bytes, remove_file, swap_files, make_directory, bomb,
]  # fmt: skip


# --- damage to the tensors


def read(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file: Path, header: Any, payload: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    file.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def weights(change: Callable[[dict[str, Any], bytes, random.Random], tuple[Any, bytes]]) -> Damage:
    """A damage to the header and payload of one of the folder's safetensors files."""

    def damage(folder: Path, chance: random.Random) -> None:
        file = pick(folder, chance, "*.safetensors")
        write(file, *change(*read(file), chance))

    damage.__name__ = change.__name__
    return damage


def a_tensor(header: dict[str, Any], chance: random.Random) -> str:
    return chance.choice(sorted(name for name in header if name != "__metadata__"))


def rename(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    old = a_tensor(header, chance)
    near = [old + "x", old.upper(), "", "a.b", old.rpartition(".")[0], a_tensor(header, chance) + ".weight"]
    new = chance.choice(near)
    return {new if name == old else name: entry for name, entry in header.items()}, payload


def exchange(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    """Two names change places: unlike tensors must be noticed."""
    first = a_tensor(header, chance)
    unlike = [n for n in header if n != "__metadata__" and header[n]["shape"] != header[first]["shape"]]
    if not unlike:
        return drop(header, payload, chance)
    second = chance.choice(sorted(unlike))
    header[first], header[second] = header[second], header[first]
    return header, payload


def drop(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    """The bytes stay behind, or go with the entry."""
    name = a_tensor(header, chance)
    begin, end = header.pop(name)["data_offsets"]
    if chance.random() < 0.5:
        return header, payload
    for other, entry in header.items():
        if other != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
    return header, payload[:begin] + payload[end:]


def duplicate(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    """The same bytes under a second name, or a copy of them at the end."""
    name = a_tensor(header, chance)
    entry = dict(header[name])
    begin, end = entry["data_offsets"]
    if chance.random() < 0.5:
        entry["data_offsets"] = [len(payload), len(payload) + end - begin]
        payload += payload[begin:end]
    return {**header, f"{name}_{chance.randrange(9)}": entry}, payload


def retype(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    name = a_tensor(header, chance)
    others = {"F16", "BF16", "U8", "I8", "F32", "I32", "F64", "BOOL", "F8_E4M3", "X", ""} - {header[name]["dtype"]}
    header[name]["dtype"] = chance.choice([*sorted(others), *JUNK])
    return header, payload


def reshape(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    entry = header[a_tensor(header, chance)]
    shape, count = entry["shape"], math.prod(entry["shape"])
    wrong = [[*shape, 1], [1, *shape], [count, 1], [2, count // 2], [count + 1], [], [-1, *shape[1:]], [0], *JUNK]
    entry["shape"] = chance.choice([other for other in wrong if other != shape])
    return header, payload


def move(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    entry = header[a_tensor(header, chance)]
    begin, end = entry["data_offsets"]
    wrong = [
        [begin + 1, end + 1],
        [begin, end - 1],
        [end, begin],
        [-8, end],
        [begin, 2**63],
        [begin],
        [begin, end, end],
    ]
    entry["data_offsets"] = chance.choice([*wrong, *JUNK])
    return header, payload


def misstate(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    """An entry, or the metadata, that is not what it should be."""
    if chance.random() < 0.3:
        return {**header, "__metadata__": chance.choice(JUNK)}, payload
    header[a_tensor(header, chance)] = chance.choice(JUNK)
    return header, payload


def bombed_header(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    return chance.choice(BOMBS).encode(), payload


def misstate_length(folder: Path, chance: random.Random) -> None:
    file = pick(folder, chance, "*.safetensors")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    wrong = [0, 1, length - 1, length + 1, len(data), len(data) - 8, 2**62, 2**64 - 1]
    file.write_bytes(chance.choice(wrong).to_bytes(8, "little") + data[8:])


STRUCTURE = [
    *map(weights, (rename, exchange, drop, duplicate, retype, reshape, move, misstate, bombed_header)),
    misstate_length,
]


def reorder(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    """The same tensors in another order: a sound file."""
    names = [name for name in header if name != "__metadata__"]
    chance.shuffle(names)
    made, data = {"__metadata__": {"format": "pt"}}, b""
    for name in names:
        begin, end = header[name]["data_offsets"]
        made[name] = {**header[name], "data_offsets": [len(data), len(data) + end - begin]}
        data += payload[begin:end]
    return made, data


def flip_payload(header: dict[str, Any], payload: bytes, chance: random.Random) -> tuple[Any, bytes]:
    data = bytearray(payload)
    for _ in range(chance.choice([1, 1, 64, 4096])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return header, bytes(data)


# --- damage to config.json and the index


def edit(chance: random.Random, nest: Any, name: str) -> None:
    """Removes, replaces or adds one value somewhere inside `nest[name]`."""
    owner, key = nest, name
    while isinstance(owner[key], dict) and owner[key] and chance.random() < 0.75:
        owner, key = owner[key], chance.choice(sorted(owner[key]))
    what = chance.random()
    if what < 0.2 and owner is not nest:
        del owner[key]
    elif what < 0.4 and isinstance(owner[key], dict):
        owner[key][chance.choice(["extra", "bits", "shape", "\ud800", ""])] = chance.choice(JUNK)
    elif isinstance(owner[key], list) and owner[key] and what < 0.7:
        owner[key][chance.randrange(len(owner[key]))] = chance.choice(JUNK)
    else:
        owner[key] = chance.choice(JUNK)


def load_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_sites(folder: Path, chance: random.Random) -> None:
    config = load_config(folder)
    edit(chance, config, "quantization_config")
    (folder / "config.json").write_text(json.dumps(config))


def edit_config(folder: Path, chance: random.Random) -> None:
    """A number of the model itself. Not its count of layers: a thousand million of them take for ever to build, in any
    loader."""
    config = load_config(folder)
    name = chance.choice(sorted(config.keys() - {"quantization_config", "num_hidden_layers", "layer_types"}))
    if chance.random() < 0.2:
        del config[name]
    else:
        config[name] = chance.choice([junk for junk in JUNK if junk != 2**31])
    (folder / "config.json").write_text(json.dumps(config))


def edit_index(folder: Path, chance: random.Random) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = sorted(index["weight_map"])
    what = chance.randrange(5)
    if what == 0:
        edit(chance, {"index": index}, "index")
    elif what == 1:
        files = sorted({*index["weight_map"].values()})
        index["weight_map"] = {name: chance.choice(files) for name in names}
    elif what == 2:
        index["weight_map"][chance.choice(names)] = chance.choice(["../x.safetensors", "/etc/passwd", "gone", ".", 5])
    elif what == 3:
        index["weight_map"] = {name: index["weight_map"][name] for name in names if chance.random() < 0.7}
    else:
        file.write_text(chance.choice(BOMBS))
        return
    file.write_text(json.dumps(index))


# --- what must come of it


def test_with_checksums_nothing_gets_through(
    sound: dict[str, Path], expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """300 cases. The one change that is allowed is none: config.json that says the same in other letters."""
    passed = 0

    def judge(answer: Any, _: int) -> None:
        nonlocal passed
        if not isinstance(answer, CheckpointError):
            passed += 1
            assert load_config(tmp_path / "case") == load_config(sound["dense"])
            assert torch.equal(logits(answer), expected["dense"])

    run(200, [sound["dense"]], [*ANYWHERE, add_weights], tmp_path, judge)
    run(100, [sound["dense"]], STRUCTURE, tmp_path, judge)
    assert passed <= 3


@pytest.mark.parametrize("source", ["dense-saved", "experts-saved"])
@pytest.mark.parametrize("checksums", ["none", "made again"])
def test_a_damaged_structure_is_noticed_without_checksums(
    source: str, checksums: str, sound: dict[str, Path], expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """4 x 50 cases. Metadata that differs changes no number."""
    refused = 0

    def sealed(damage: Damage) -> Damage:
        def both(folder: Path, chance: random.Random) -> None:
            damage(folder, chance)
            manifest, config = seal(folder, load_config(folder), ["model.safetensors", "generation_config.json"])
            (folder / "checksums.json").write_text(manifest)
            (folder / "config.json").write_text(config)

        both.__name__ = damage.__name__
        return both

    def judge(answer: Any, _: int) -> None:
        nonlocal refused
        if isinstance(answer, CheckpointError):
            refused += 1
        else:
            assert torch.equal(logits(answer), expected[source])

    damages = STRUCTURE if checksums == "none" else list(map(sealed, STRUCTURE))
    run(50, [sound[source]], damages, tmp_path, judge)
    assert refused >= 45


def test_tensors_in_another_order_are_the_same_model(
    sound: dict[str, Path], expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    def judge(answer: Any, case: int) -> None:
        assert torch.equal(logits(answer), expected[("dense-saved", "experts-saved")[case % 2]])

    run(20, [sound["dense-saved"], sound["experts-saved"]], [weights(reorder)], tmp_path, judge)


def test_flipped_payloads_load_finite_or_not_at_all(sound: dict[str, Path], tmp_path: Path) -> None:
    answers: list[bool] = []

    def judge(answer: Any, _: int) -> None:
        answers.append(isinstance(answer, CheckpointError))
        if not answers[-1]:
            assert all(bool(torch.isfinite(p).all()) for p in answer.state_dict().values())
            assert logits(answer).shape == (1, 9, 64)

    run(60, [sound["dense-saved"], sound["experts-saved"]], [weights(flip_payload)], tmp_path, judge)
    assert 5 < sum(answers) < 55  # both happen


def test_edited_sites_are_noticed(sound: dict[str, Path], expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """What config.json says of the packed tensors has to be what they are."""
    refused = 0

    def judge(answer: Any, case: int) -> None:
        nonlocal refused
        if isinstance(answer, BitwrightError):
            refused += 1
        else:
            assert torch.equal(logits(answer), expected[("dense-saved", "experts-saved")[case % 2]])

    run(120, [sound["dense-saved"], sound["experts-saved"]], [edit_sites], tmp_path, judge)
    assert refused > 90


def test_an_edited_config_ends_in_our_error_or_in_a_model(sound: dict[str, Path], tmp_path: Path) -> None:
    refused = 0

    def judge(answer: Any, _: int) -> None:
        nonlocal refused
        refused += isinstance(answer, BitwrightError)

    run(80, [sound["dense-saved"], sound["experts-saved"]], [edit_config], tmp_path, judge)
    run(40, [sound["dense-saved"]], ANYWHERE, tmp_path, judge)
    assert refused > 40


def test_a_damaged_index_is_noticed(sound: dict[str, Path], expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """An index may put a tensor into another of its files: all of them are read."""
    refused = 0

    def judge(answer: Any, _: int) -> None:
        nonlocal refused
        if isinstance(answer, CheckpointError):
            refused += 1
        else:
            assert torch.equal(logits(answer), expected["sharded"])

    run(50, [sound["sharded"]], [edit_index], tmp_path, judge)
    run(30, [sound["sharded"]], STRUCTURE, tmp_path, judge)
    assert refused > 50
