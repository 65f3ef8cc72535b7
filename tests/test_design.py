"""The shape of the house: import direction, packages, public names, sizes."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

import quant

ROOT = Path(__file__).parent.parent
MAPPED = ("kernels", "eval", "recipes")
LIMIT = {"quant": 11400, "kernels": 6000, "eval": 2545, "recipes": 50}
"""Lines of code; docstrings, comments and blank lines come on top."""


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if not any(part.is_symlink() for part in path.parents))


def imports(path: Path) -> set[str]:
    """Modules that a file imports at run time; those under TYPE_CHECKING are for the reader of types only."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(inner for part in node.body for inner in ast.walk(part))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(f"{path.name}: relative import")
    return found


def crossings(folder: str, banned: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(folder)
        for name in sorted(imports(path))
        if any(name == ban or name.startswith(ban + ".") for ban in banned)
    ]


def test_imports_point_one_way() -> None:
    inside = sorted(p.name.removesuffix(".py") for p in (ROOT / "quant").iterdir() if not p.is_symlink())
    above_kernels = tuple(f"quant.{name}" for name in inside if name not in ("__init__", "kernels"))
    assert crossings("kernels", (*above_kernels, "quant.eval", "quant.recipes", "transformers")) == []
    assert crossings("quant", ("quant.eval", "quant.recipes")) == []
    assert crossings("eval", ("quant.solvers", "quant.recipes", "quant.pipeline")) == []
    for folder in ("quant", *MAPPED, "tests", "demo", "benchmarks"):
        assert crossings(folder, ("kernels", "eval", "recipes", "pickle")) == []
    assert crossings("quant", ("diffusers",)) == ["quant/models/diffusion.py imports diffusers"]
    for folder in MAPPED:
        assert crossings(folder, ("diffusers",)) == []


def test_the_import_check_sees_a_crossing(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def late():\n    from quant.eval import perplexity\n")
    assert "quant.eval.perplexity" in imports(path)


def test_mapped_folders_are_links_without_init() -> None:
    for name in MAPPED:
        assert not (ROOT / name / "__init__.py").exists()
        assert (ROOT / "quant" / name).is_symlink()
        assert (ROOT / "quant" / name).resolve() == ROOT / name


def test_packages_are_those_on_disk() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    real = {f"quant.{p.parent.name}" if p.parent.name != "quant" else "quant" for p in sources("quant")}
    assert sorted(declared) == sorted(real | {f"quant.{name}" for name in MAPPED})


def test_public_names() -> None:
    assert len(quant.__all__) <= 10
    assert all(hasattr(quant, name) for name in quant.__all__)


def test_recipes_are_short_and_hold_one_recipe() -> None:
    for path in sources("recipes"):
        assert len(path.read_text().splitlines()) <= 30, path.name
        assert isinstance(quant.load_recipe(path.stem), quant.Recipe)


def test_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    total, table, long = 0, [], []
    for folder in ("quant", *MAPPED):
        lines = {path: len(path.read_text().splitlines()) for path in sources(folder)}
        code = sum(code_lines(path) for path in lines)
        total += code
        longest = max(lines, key=lines.__getitem__)
        table.append(
            f"{folder:8} {sum(lines.values()):6} lines, {code:5} of code (at most {LIMIT[folder]}), "
            f"longest {longest.name} ({lines[longest]})"
        )
        long += [f"{folder}: {code} lines of code"] if code > LIMIT[folder] else []
        long += [f"{path.name}: {count} lines" for path, count in lines.items() if count > 300]
    with capsys.disabled():
        print("\n" + "\n".join([*table, f"total    {total:6} lines of code"]))
    assert long == []


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    described = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = (token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in silent)
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - described)


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.name}:{node.lineno} {node.name} {body_lines(node)} lines"
        for folder in ("quant", *MAPPED)
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and body_lines(node) > 60
    ]
    assert long == []


def body_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    described = ast.get_docstring(node, clean=False)
    return (node.end_lineno or 0) - node.lineno + 1 - (len(described.splitlines()) if described else 0)


def test_every_module_opens_with_the_idea() -> None:
    missing = [
        str(path.relative_to(ROOT))
        for folder in ("quant", *MAPPED)
        for path in sources(folder)
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert missing == []


def test_nothing_committed_names_a_private_place() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(work|root|home)/\w")
    texts = (ROOT / name for name in listed.stdout.split() if not name.endswith((".safetensors", ".png")))
    found = [path.name for path in texts if path.is_file() and pattern.search(path.read_text(errors="replace"))]
    assert [name for name in found if name != Path(__file__).name] == []


def test_import_is_silent() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:quant", "-c", "import quant"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == ""
    assert done.stderr == ""


def test_the_page_on_two_bits_has_the_tables_of_its_results() -> None:
    says = "import two_bits as b, record; t = b.PAGE.read_text(encoding='utf-8'); "
    says += "assert b.page(t, b.read(record.HERE / 'results')) == t, 'python benchmarks/two_bits.py --page'"
    done = subprocess.run([sys.executable, "-c", says], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_all_benchmarks_can_be_asked_what_they_are() -> None:
    """And start none of them."""
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "make bench" in done.stdout
    assert "--data" in done.stdout
