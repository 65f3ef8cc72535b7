"""What a user installs: the wheel, in an environment of its own, away from the repository."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_every_module_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("quant", "kernels", "eval", "recipes"):
        prefix = "quant" if folder == "quant" else f"quant/{folder}"
        for path in (ROOT / folder).glob("*.py"):
            assert f"{prefix}/{path.name}" in names
    assert {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")} == {"quant"}
    assert len(names) == len(set(names))


def test_quickstart_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Installed away from the repository; its dependencies are lent by the environment that runs the tests."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    site = next((home / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # a .pth file adds the libraries but not the editable install of this repository, which is a finder and not a path
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = QUICKSTART.format(model=ROOT / "demo" / "model", out=tmp_path / "q4", site=site)
    command = [str(home / "bin" / "python"), "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generated 8 tokens" in done.stdout


QUICKSTART = """
import quant, transformers
assert quant.__file__ == "{site}/quant/__init__.py", quant.__file__
recipe = quant.load_recipe("rtn")
quant.quantize("{model}", "{out}", recipe)
model = quant.load("{out}")
tokenizer = transformers.AutoTokenizer.from_pretrained("{out}")
ids = tokenizer("The return value is", return_tensors="pt").input_ids
text = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=8, min_new_tokens=8, do_sample=False)
print("generated", text.shape[1] - ids.shape[1], "tokens")
"""
