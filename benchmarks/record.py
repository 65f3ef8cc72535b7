"""What every benchmark leaves behind: a JSON file and the same as a Markdown table, with what is needed to judge them.

A number without its machine, versions, commit and load is not a result. This module imports nothing but the standard
library: Linux hands a parent's peak memory down to a forked child, so a parent that imported torch would falsify the
figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network

HERE = Path(__file__).parent
ROOT = HERE.parent
DEMO = ROOT / "demo" / "model"
PACKAGES = ("bitwright", "torch", "transformers", "safetensors")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON and the table")
    made.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ["BITWRIGHT_DATA"]) if "BITWRIGHT_DATA" in os.environ else None,
        help="folder with models/ and texts/ (or the variable BITWRIGHT_DATA); what is not there is skipped",
    )
    return made


def present(data: Path | None, *names: str) -> list[Path] | None:
    """The named files or folders under `data`; None, with a line that says so, when one is not there."""
    if data is None:
        print(f"skipped: {', '.join(names)}: no --data folder given", flush=True)
        return None
    paths = [data / name for name in names]
    for path, name in zip(paths, names, strict=True):
        if not path.exists():
            print(f"skipped: {name} is not in the --data folder", flush=True)
            return None
    return paths


@dataclass(frozen=True)
class Child:
    """A finished process. `peak`: bytes of its largest resident set; `load`: the machine's 1-minute load before it."""

    seconds: float
    cpu: float
    peak: int
    stdout: str
    load: float


def run(command: Sequence[str]) -> Child:
    """Runs a command in a fresh process. Raises `RuntimeError` with its last words if it fails."""
    load, began = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    stdout = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)}: exit code {process.returncode}\n{stdout[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return Child(time.perf_counter() - began, cpu, usage.ru_maxrss * 1024, stdout, load)


def quantize(*arguments: str | Path) -> tuple[Child, dict[str, Any]]:
    """The command line in a fresh process, and the JSON it prints."""
    command = [sys.executable, "-m", "quant.cli", *map(str, arguments), "--quiet", "--json"]
    child = run(command)
    return child, json.loads(next(line for line in reversed(child.stdout.splitlines()) if line.startswith("{")))


def facts() -> dict[str, Any]:
    """Machine, versions, commit and load, at the time of asking."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "commit": commit(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the package's source, with `+` if its files differ from it."""
    found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        return "not a git checkout"
    package = ["git", "status", "--porcelain", "--", "quant", "kernels", "eval", "recipes"]
    changed = subprocess.run(package, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return found.stdout.strip() + ("+" if changed else "")


def command_line() -> str:
    """The command that was given, without the places of this machine."""
    script = Path(sys.argv[0]).resolve()
    shown = [script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name]
    hidden = ("--data", "--results", "--python")
    for before, argument in zip(sys.argv, sys.argv[1:], strict=False):
        name = argument.split("=")[0]
        place = f"{name}=PEER" if before == "--peer" else before.removeprefix("--").upper()
        known = re.sub(r"^/([^/\s:]+/)*", "", argument)
        shown.append(place if before in (*hidden, "--peer") else shlex.quote(known))
    return "python " + " ".join(shown)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 4):.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def save(
    folder: Path,
    name: str,
    title: str,
    parts: Sequence[tuple[str, Sequence[Mapping[str, Any]], Sequence[str]]],
    notes: Sequence[str] = (),
    **more: Any,
) -> None:
    """Writes `name`.json and `name`.md and prints the tables. `parts`: heading, rows, columns shown."""
    known = facts()
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "benchmark": name,
        "command": command_line(),
        **known,
        **more,
        "notes": list(notes),
        "tables": {heading: list(rows) for heading, rows, _ in parts},
    }
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    used = ", ".join(f"{package} {number}" for package, number in known["versions"].items())
    text = [f"# {title}", "", f"`{data['command']}`", ""]
    text += [f"{known['cpu']}, {known['cores']} cores; Python {known['python']}, {used}; commit {known['commit']};"]
    text += [f"load average {known['load'][0]} at the end; {known['date']}.", ""]
    for heading, rows, columns in parts:
        text += [f"## {heading}", "", table(rows, columns), ""]
    text += [f"- {note}" for note in notes]
    written = "\n".join(text).rstrip() + "\n"
    (folder / f"{name}.md").write_text(written, encoding="utf-8")
    print(written, flush=True)
