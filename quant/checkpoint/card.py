"""The model card (README.md) of a packed checkpoint.

It tells a stranger what this is, how it was made, how well it is known to work, and how to load and remake it. Nothing
in it depends on the run: no time, no date, no place. A killed and resumed run writes the same bytes. Figures that are
measured later come in by `add_evaluation`, between two marks, and may be replaced as often as one likes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.checkpoint.shards import write_text
from quant.checkpoint.summary import (
    Group,
    left_float,
    method_words,
    notes,
    plain,
    specs_words,
    windows_words,
)
from quant.errors import CheckpointError

BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
FOLDER = "path/to/this/folder"

Report = Mapping[str, Any]


def card(report: Report) -> str:
    """The card for the content of report.json."""
    bits, name = report["bits"], report["model"]["name"]
    title = f"# {_words(str(name).rstrip('/').rpartition('/')[2])}, {bits['measured']:.5g} bits per weight"
    sections = [
        _front_matter(report),
        title,
        f"{_code(name)} with {len(report['sites']):,} weight matrices packed by bitwright: "
        f"{_words(specs_words(report['sites']))}. Everything else is the original, bit for bit.",
        _sizes(report),
        "## How to load it",
        _loading(report),
        "## How it was made",
        _making(report),
        "## Evaluation",
        f"{BEGIN}\nNot evaluated yet: `quant-eval {FOLDER} --against` the original.\n{END}",
        *_grouped("## What did not go as asked", notes(report)),
        *_grouped("## Left in float", left_float(report)),
        "## Limits",
        _limits(report),
    ]
    return "\n\n".join(sections) + "\n"


def add_evaluation(folder: str | Path, results: Mapping[str, Any]) -> None:
    """Puts measured figures into the card of the checkpoint in `folder`, in place of earlier ones.

    `results`: what `quant.eval`'s `Report.to_dict()` gives for the checkpoint; figures it lacks are left out. Times and
    memory are not taken over: the card says what holds on every machine.

    Raises:
        CheckpointError: the folder has no README.md.
    """
    path = Path(folder) / "README.md"
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise CheckpointError(f"{path}: cannot be read ({reason}); figures go into a checkpoint's own card") from None
    section = f"{BEGIN}\n{_evaluation(results)}\n{END}"
    start, end = before.find(BEGIN), before.find(END)
    if 0 <= start < end:
        after = before[:start] + section + before[end + len(END) :]
    else:  # somebody rewrote the card and left no mark
        after = f"{before.rstrip()}\n\n## Evaluation\n\n{section}\n"
    write_text(path, after)


def _front_matter(report: Report) -> str:
    source, spec = report["source"], report["recipe"]["spec"]
    asked = spec.get("bits")
    tags = ["bitwright", "quantized", *([f"{asked}-bit"] if asked else [])]
    known = {key: source[key] for key in ("license", "license_name", "license_link", "base_model") if source[key]}
    lines = [f"{key}: {json.dumps(value)}" for key, value in known.items()]
    lines += ["base_model_relation: quantized"] if source["base_model"] else []
    lines += ["library_name: transformers", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    lines += ["quantization:", "  method: bitwright", f"  format_version: {report['format_version']}"]
    lines += [f"  bits_per_weight: {report['bits']['measured']:.5g}"]
    return "\n".join(["---", *lines, "---"])


def _sizes(report: Report) -> str:
    bits, source, asked = report["bits"], report["source"], report["recipe"]["spec"].get("bits")
    after = sum(report["files"].values())
    smaller = source["bytes"] / max(1, after)
    license_ = _code(source["license"]) if source["license"] else "unknown: the base model's folder does not state one"
    rows = [
        ("bits asked", f"{asked} for each code" if asked else "see plan.json"),
        ("bits promised", f"{bits['promised']:.5g} per quantized weight, scales and zeros and all else included"),
        ("bits measured on disk", f"{bits['measured']:.5g} per quantized weight"),
        ("quantized", f"{bits['weights']:,} of {source['parameters']:,} weights, {len(report['sites']):,} matrices"),
        ("their bytes", f"{bits['packed_bytes']:,}"),
        ("whole checkpoint", f"{after:,} bytes of weights (original {source['bytes']:,}: {smaller:.2f} times as much)"),
        ("license", license_),
    ]
    return _table(rows)


def _loading(report: Report) -> str:
    kind = "AutoModelForCausalLM" if str(report["source"]["architecture"]).endswith("ForCausalLM") else "AutoModel"
    generate = [
        'tokens = tokenizer("The", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))",
    ]
    lines = [
        "```python",
        "import quant  # the package bitwright",
        "from transformers import AutoTokenizer",
        "",
        f'model = quant.load("{FOLDER}", device="cpu")  # verified by checksums; packed weights stay packed',
        f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")',
        *(generate if kind == "AutoModelForCausalLM" else []),
        "```",
        "",
        f'`{kind}.from_pretrained("{FOLDER}")` works too, once `quant` is imported. `quant.load(..., dequantize=True)` '
        "gives a plain float model. Without `quant`, transformers refuses the folder.",
    ]
    return "\n".join(lines)


def _making(report: Report) -> str:
    calibration, model, source = report["calibration"], report["model"], report["source"]
    compute = report["compute"]
    commit = f", commit {_code(source['revision'])}" if source["revision"] else ""
    rows = [
        (
            "base model",
            f"{_code(model['name'])}{commit}, sha256 {_code(model['sha256'])} of its config, headers and samples",
        ),
        ("method", _words(method_words(report["recipe"]))),
        (
            "calibration text",
            f"{_code(calibration['text'])}"
            + (f", sha256 {_code(calibration['sha256'])}" if calibration["sha256"] else ""),
        ),
    ]
    if report["recipe"]["calibration"]:
        rows.append(("calibration windows", _words(windows_words(report["recipe"], report["calibration_tokens"]))))
    rows += [
        (
            "computed",
            f"{compute['dtype']} on {_words(compute['device'])} ({compute['machine']}), {compute['threads']} threads",
        ),
        ("versions", ", ".join(f"{_words(name)} {_words(version)}" for name, version in report["versions"].items())),
    ]
    same = (
        "The same bytes come out on the same kind of machine with the same versions; `recipe.json` and `plan.json` "
        "in this folder hold every setting."
    )
    return f"```bash\n{plain(report['command'], 4000)}\n```\n\n{same}\n\n{_table(rows)}"


def _limits(report: Report) -> str:
    bits = report["bits"]["measured"]
    loss = (
        "At 4 bits and more a model of some size usually keeps its abilities nearly whole."
        if bits >= 4
        else "Around 3 bits losses are visible in figures, and in hard tasks."
        if bits >= 2.9
        else "Below 3 bits a model loses much: facts, reasoning and rare languages first."
    )
    read = "the calibration text above" if report["recipe"]["calibration"] else "no text at all"
    return (
        f"{loss} Quantization was guided by {read}; on text of another kind more may be lost than a perplexity shows. "
        "Judge it on your own task. The limits, biases and license terms of the base model hold here as well."
    )


def _grouped(heading: str, groups: Sequence[Group]) -> list[str]:
    return [heading, "\n".join(f"- {_words(group.text)}{_names(group)}" for group in groups)] if groups else []


def _names(group: Group) -> str:
    names = ", ".join(_code(name) for name in group.names[:3])
    more = f" and {len(group.names) - 3:,} more" if len(group.names) > 3 else ""
    return f"{f' ({group.count:,} alike)' if group.count > 1 else ''}: {names}{more}"


def _evaluation(results: Mapping[str, Any]) -> str:
    """The figures as a table, and what they depend on."""
    perplexity, original = results.get("perplexity") or {}, results.get("original") or {}
    divergence, hidden = results.get("divergence") or {}, results.get("hidden") or {}
    settings = results.get("settings") or {}
    rows = [
        ("perplexity per token", perplexity.get("token"), original.get("token"), ".5g"),
        ("bits per byte", perplexity.get("bits_per_byte"), original.get("bits_per_byte"), ".5g"),
        ("perplexity per word", perplexity.get("word"), original.get("word"), ".5g"),
        ("KL divergence to the original, nats per token", divergence.get("kl"), None, ".4g"),
        ("same first choice as the original", divergence.get("top1"), None, ".2%"),
        ("cosine of hidden states, per token", hidden.get("token"), None, ".5f"),
        ("cosine of hidden states, per line", hidden.get("sentence"), None, ".5f"),
    ]
    lines = ["| | this checkpoint | original |", "|---|---|---|"]
    for label, here, there, form in rows:
        if isinstance(here, float | int):
            lines.append(f"| {label} | {here:{form}} | {f'{there:{form}}' if isinstance(there, float | int) else ''} |")
    words = {key: _words(settings.get(key)) for key in ("window_rule", "window", "dtype")}
    stride = f", stride {_words(settings['stride'])}" if settings.get("stride") else ""
    against = f" The original is {_code(results['against'])}." if results.get("against") else ""
    versions = ", ".join(
        f"{_words(name)} {_words(number)}" for name, number in (settings.get("versions") or {}).items()
    )
    text = f"Text {_code(settings.get('text'))}, sha256 {_code(settings.get('text_sha256'))}"
    windows = f"{words['window_rule']} windows of {words['window']} tokens{stride}"
    return "\n".join([*lines, "", f"{text}; {windows}; {words['dtype']}.{against} {versions}."])


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _code(value: object) -> str:
    """Untrusted text as code: one line, nothing that ends the code or the table's cell."""
    return f"`{plain(value).replace('`', chr(39)).replace('|', '/')}`"


def _words(value: object) -> str:
    """Untrusted text as text: its Markdown and HTML signs escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", plain(value))
