"""What the tests share: one thread, no network, and a few models, texts and checkpoints made once."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default, but unset it warns

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import quant
from quant.calibration.statistics import Statistics
from tests import interpreter, sketches, tiny
from tests.processes import Children, Start

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.hasten()

ROOT = Path(__file__).parent.parent
gc.collect()
gc.freeze()  # what was imported is never garbage


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of reports become SVG, see `sketches`."""
    monkeypatch.setattr("quant.checkpoint.plots.rendered", sketches.RENDERED)


@pytest.fixture
def started() -> Iterator[Start]:
    """Starts a function in a process of its own; what still runs at the end of the test is killed."""
    children = Children()
    yield children.start
    children.end()


@pytest.fixture(scope="session")
def demo() -> Path:
    """The trained model that lies in the repository: two million weights, 1024 tokens, tied embeddings."""
    return ROOT / "demo" / "model"


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 6000 characters."""
    return tiny.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks with a tokenizer. Never write into it."""
    return tiny.model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def packed_llama(llama: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` at 4 bits, group 32. Never write into it."""
    out = tmp_path_factory.mktemp("packed") / "llama"
    quant.quantize(str(llama), out, tiny.recipe(words))
    return out


@pytest.fixture(scope="session")
def packed_moe(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral at 3 bits, its experts included. Never write into it."""
    folder = tmp_path_factory.mktemp("moe")
    quant.quantize(str(tiny.model("mixtral", folder / "model")), folder / "out", tiny.recipe(words, bits=3))
    return folder / "out"


@pytest.fixture(scope="session")
def trained(demo: Path) -> tuple[Tensor, Statistics]:
    """160 rows of a trained weight of the demo model, and the Hessian of outputs of another one: inputs with real
    correlations."""
    stored = safetensors.torch.load_file(demo / "model.safetensors")
    names = sorted(name for name in stored if "gate_proj" in name)
    weight, other = stored[names[0]].float(), stored[names[1]].float()
    hessian = other.T @ other
    return weight[:160], Statistics(hessian / hessian.diagonal().mean(), 1000)


def pytest_unconfigure() -> None:
    gc.unfreeze()
